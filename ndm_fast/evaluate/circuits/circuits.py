"""Circuit tests: patch every subspace on a known circuit's prompts, and see how few of them matter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ndm_fast.activations.site_rows import site_activations
from ndm_fast.config import HubOptions
from ndm_fast.errors import InputError
from ndm_fast.evaluate.baselines import STANDARD_BASELINES, baseline_partition
from ndm_fast.evaluate.circuits.bootstrap import gini_intervals
from ndm_fast.evaluate.circuits.prompts import TESTS, CircuitTest, chosen_tests
from ndm_fast.evaluate.circuits.results import (
    CircuitResults,
    MethodResult,
    TestResult,
    Yardsticks,
    mean_of_seeds,
)
from ndm_fast.evaluate.circuits.trace import Trace, tests_at
from ndm_fast.evaluate.circuits.words import CircuitPrompts
from ndm_fast.evaluate.circuits.yardsticks import DAS_STEPS, yardstick_partitions
from ndm_fast.evaluate.gini import effect_ginis, top_share
from ndm_fast.evaluate.patching.language_model import check_lengths, load_language_model
from ndm_fast.evaluate.patching.layers_above import LayersAbove
from ndm_fast.evaluate.patching.patching import patch_effects
from ndm_fast.evaluate.patching.prompts import pad_prompts
from ndm_fast.evaluate.revision import trained_on
from ndm_fast.partition import SubspacePartition
from ndm_fast.train.merge.mutual_information import subspace_variances

RANDOM_SEEDS = 5
"""Random rotations that the baseline is the mean of."""

_TRAINING_PROMPTS = 256
"""Most prompts that yardsticks are made from."""


@dataclass(frozen=True)
class CircuitOptions:
    """How circuit tests are run."""

    prompts: int = 1000
    """Of each test."""
    seed: int = 0
    """Of the prompts, the intervals and DAS."""
    templates: str = "all"
    """One of ``TEMPLATE_SETS``."""
    rows: int = 64
    """Prompts in one forward pass."""
    complement: bool = True
    """Also patch all subspaces but one, for each; doubles the time."""
    random_seeds: int = RANDOM_SEEDS
    yardsticks: bool = False
    das_steps: int = DAS_STEPS


@dataclass(frozen=True)
class _Bench:
    """A model at a site, with ordinary text's activations [N, d] there."""

    model: Any
    tokenizer: Any
    site: str
    activations: Tensor
    options: CircuitOptions


def circuit_effects(
    model: Any,
    site: str,
    partition: SubspacePartition,
    prompts: CircuitPrompts,
    activations: Tensor,
    *,
    rows: int = 64,
    complement: bool = True,
    seed: int = 0,
) -> MethodResult:
    """Effects of all subspaces in one test, with their Gini coefficients.

    Args:
        activations: [N, d] of the site on ordinary text, for each subspace's share of the variance.
        complement: also patch all but each subspace.
        seed: of the intervals.
    """
    device = next(model.parameters()).device
    every = range(len(partition))
    complements = [[other for other in every if other != s] for s in every] if complement else []
    found = patch_effects(
        model,
        site,
        partition,
        pad_prompts(prompts.prompts, device=device),
        pad_prompts(prompts.counterfactuals, device=device),
        prompts.metric,
        positions=prompts.positions,
        groups=[[s] for s in every] + complements,
        rows=rows,
    )
    single, without = found.by_group[: len(partition)], found.means[len(partition) :]
    effects = found.means[: len(partition)]
    variance = subspace_variances(activations, partition.rotation, partition.widths)
    whole = float(found.whole.double().mean())
    return MethodResult(
        clean=float(found.clean.double().mean()),
        whole=whole,
        widths=list(partition.widths),
        variance=variance.tolist(),
        effect=effects.tolist(),
        share_of_whole=[effect / whole if whole else float("nan") for effect in effects.tolist()],
        complement=without.tolist() if complement else None,
        gini=effect_ginis(effects, partition.widths, variance),
        gini_interval=gini_intervals(single, partition.widths, variance, seed=seed),
        top_share=top_share(effects),
    )


def run_circuits(
    partitions: dict[str, SubspacePartition],
    model_name: str,
    *,
    tests: Sequence[str] | None = None,
    site: str | None = None,
    trace: Trace | None = None,
    data: str | None = None,
    context_length: int | None = None,
    device: str = "cpu",
    hub: HubOptions | None = None,
    options: CircuitOptions | None = None,
) -> CircuitResults:
    """Run circuit tests at each partition's site, for NDM, the four baselines and perhaps yardsticks.

    Args:
        partitions: by name; each says in ``source`` which site, and perhaps which text, it was trained on.
        tests: names; default those that peak at the site in ``trace``, without one those made for it.
        site: where to patch; default each partition's own.
        data: text for variances and principal components; default what the partition was trained on.
        hub: the model's revision, default the one that the partition was trained on, and whether its own code
            may run.

    Raises:
        InputError: no test for a site, unknown tests, a model without a head, a tokenizer that splits the
            words, no text.
    """
    options = options or CircuitOptions()
    for count, things in ((options.prompts, "prompts"), (options.random_seeds, "random seeds")):
        if count < 1:
            raise InputError(f"{count} {things} are too few: give at least 1")
    model, tokenizer = load_language_model(
        model_name, device, hub=trained_on(model_name, hub, *(p.source for p in partitions.values()))
    )
    results: CircuitResults = {}
    for name, partition in partitions.items():
        where = site or partition.source.get("site")
        if not where:
            raise InputError(f"{name} does not say which site it is for: give --site")
        cut = LayersAbove(model, where)
        cut.check_fits(partition)
        chosen = _chosen(tests, trace, cut.site.name, name)
        activations = site_activations(
            model, tokenizer, cut.site.name, partition.source, data=data, context_length=context_length
        )
        bench = _Bench(model, tokenizer, cut.site.name, activations, options)
        results[name] = {test.name: _run_test(bench, test, partition.to(device)) for test in chosen}
    return results


def _chosen(names: Sequence[str] | None, trace: Trace | None, site: str, partition: str) -> list[CircuitTest]:
    if names:
        return chosen_tests(names)
    if trace is not None:
        return tests_at(trace, site)
    chosen = [test for test in TESTS.values() if test.site == site]
    if not chosen:
        made_for = ", ".join(f"{test.name} ({test.site})" for test in TESTS.values())
        raise InputError(
            f"no circuit test is made for {site} of {partition}: name some with --tests, or give the --trace "
            f"of this model; in GPT-2 they are {made_for}"
        )
    return chosen


def _run_test(bench: _Bench, test: CircuitTest, partition: SubspacePartition) -> TestResult:
    options = bench.options
    made = test.build(bench.tokenizer, options.prompts, options.seed, options.templates)
    check_lengths(bench.model, made.prompts)
    methods = {"ndm": [partition]}
    mirrored = partition.widths == partition.widths[::-1]
    for kind in STANDARD_BASELINES:
        if kind == "pca_descending" and mirrored:
            continue  # the same subspaces as ascending, in the opposite order
        seeds = range(options.random_seeds if kind == "random" else 1)
        methods[kind] = [baseline_partition(kind, partition.widths, bench.activations, s) for s in seeds]
    found = {}
    total = sum(map(len, methods.values()))
    with tqdm(total=total, desc=f"test {test.name}", unit="partition", leave=False, disable=None) as bar:
        for kind, some in methods.items():
            results = []
            for one in some:
                results.append(_measured(bench, one, made))
                bar.update()
            found[kind] = results[0] if len(results) == 1 else mean_of_seeds(results)
    if mirrored:
        found["pca_descending"] = found["pca_ascending"].reversed()
    return TestResult(
        what=f"{test.what}{f' ({made.form})' if made.form else ''}",
        site=bench.site,
        prompts=options.prompts,
        templates=options.templates,
        right=_share_right(bench, made),
        example=made.texts[0],
        methods=found,
        yardsticks=_yardsticks(bench, test, partition) if options.yardsticks else None,
    )


def _measured(bench: _Bench, partition: SubspacePartition, made: CircuitPrompts) -> MethodResult:
    options = bench.options
    return circuit_effects(
        bench.model,
        bench.site,
        partition,
        made,
        bench.activations,
        rows=options.rows,
        complement=options.complement,
        seed=options.seed,
    )


def _share_right(bench: _Bench, made: CircuitPrompts) -> float:
    values = []
    for which in torch.arange(len(made.prompts)).split(bench.options.rows):
        prompts = pad_prompts([made.prompts[n] for n in which.tolist()], device=bench.activations.device)
        with torch.no_grad():
            logits = bench.model(**prompts.model_inputs(), use_cache=False, logits_to_keep=1).logits
        values.append(made.metric(logits, which))
    return float((torch.cat(values) > made.right_above).double().mean())


def _yardsticks(bench: _Bench, test: CircuitTest, partition: SubspacePartition) -> Yardsticks:
    """Made from set a; NDM's subspace of the largest effect there gives the width."""
    options = bench.options
    training = test.build(bench.tokenizer, min(options.prompts, _TRAINING_PROMPTS), options.seed, "a")
    held_out = test.build(bench.tokenizer, options.prompts, options.seed, "b")
    best = _measured(bench, partition, training).best
    made = yardstick_partitions(
        bench.model,
        bench.site,
        training,
        partition.widths,
        best,
        steps=options.das_steps,
        seed=options.seed,
    )
    methods = {kind: _measured(bench, one, held_out) for kind, one in ({"ndm": partition} | made).items()}
    return Yardsticks(partition.widths[best], options.prompts, methods)
