"""Circuit tests: patch every subspace on a known circuit's prompts, and see how few of them matter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ndm_fast.activations.models import load_model
from ndm_fast.activations.site_rows import site_activations
from ndm_fast.errors import InputError
from ndm_fast.evaluate.baselines import STANDARD_BASELINES, baseline_partition
from ndm_fast.evaluate.circuits.prompts import TESTS, CircuitPrompts, CircuitTest
from ndm_fast.evaluate.gini import effect_ginis, top_share
from ndm_fast.evaluate.patching.layers_above import LayersAbove
from ndm_fast.evaluate.patching.patching import patch_effects
from ndm_fast.evaluate.patching.prompts import pad_prompts
from ndm_fast.partition import SubspacePartition
from ndm_fast.train.merge.mutual_information import subspace_variances


def circuit_effects(
    model: Any,
    site: str,
    partition: SubspacePartition,
    prompts: CircuitPrompts,
    activations: Tensor,
    *,
    rows: int = 64,
) -> dict[str, Any]:
    """Effects of all subspaces in one test, with their Gini coefficients.

    Args:
        activations: [N, d] of the site on ordinary text, for each subspace's share of the variance.

    Returns:
        ``clean`` and ``whole``: mean of the metric, and its drop when the whole activation is patched;
        ``widths``, ``variance``, ``effect`` (mean drop), ``gini`` by normalisation, ``top_share``.
    """
    device = next(model.parameters()).device
    found = patch_effects(
        model,
        site,
        partition,
        pad_prompts(prompts.prompts, device=device),
        pad_prompts(prompts.counterfactuals, device=device),
        prompts.metric,
        positions=prompts.positions,
        rows=rows,
    )
    variance = subspace_variances(activations, partition.rotation, partition.widths)
    return {
        "clean": float(found.clean.double().mean()),
        "whole": float(found.whole.double().mean()),
        "widths": list(partition.widths),
        "variance": variance.tolist(),
        "effect": found.means.tolist(),
        "gini": effect_ginis(found.means, partition.widths, variance),
        "top_share": top_share(found.means),
    }


def run_circuits(
    partitions: dict[str, SubspacePartition],
    model_name: str,
    *,
    tests: Sequence[str] | None = None,
    prompts: int = 1000,
    seed: int = 0,
    data: str | None = None,
    rows: int = 64,
    device: str = "cpu",
    context_length: int | None = None,
) -> dict[str, Any]:
    """Run the tests that belong to each partition's site, for NDM and the four baselines.

    Args:
        partitions: by name; each says in ``source`` which site, and perhaps which text, it was trained on.
        tests: names of tests to run at every partition's site; default those made for that site.
        prompts: of each test. seed: of the prompts.
        data: text for variances and principal components; default what the partition was trained on.

    Returns:
        By partition and test: ``what``, ``site``, ``example`` (a prompt), and ``methods`` (see
        :func:`circuit_effects`), ``"ndm"`` first.

    Raises:
        InputError: no test for a site, unknown tests, a tokenizer that splits the words, no text.
    """
    if prompts < 1:
        raise InputError(f"{prompts} prompts are too few: give at least 1")
    model, tokenizer = load_model(model_name, device=device, head=True)
    results: dict[str, Any] = {}
    for name, partition in partitions.items():
        site = partition.source.get("site")
        if not site:
            raise InputError(
                f"{name} does not say which site it is for: import it, or train it with ndm-fast"
            )
        cut = LayersAbove(model, site)
        cut.check_fits(partition)
        site = cut.site.name
        chosen = _chosen(tests, site, name)
        activations = site_activations(
            model, tokenizer, site, data or partition.source.get("data"), context_length=context_length
        )
        results[name] = {}
        for test in chosen:
            built = test.build(tokenizer, prompts, seed)
            methods = {"ndm": partition.to(device)} | {
                kind: baseline_partition(kind, partition.widths, activations) for kind in STANDARD_BASELINES
            }
            results[name][test.name] = {
                "what": test.what,
                "site": site,
                "prompts": prompts,
                "example": built.texts[0],
                "methods": {
                    kind: circuit_effects(model, site, method, built, activations, rows=rows)
                    for kind, method in methods.items()
                },
            }
    return results


def _chosen(names: Sequence[str] | None, site: str, partition: str) -> list[CircuitTest]:
    unknown = [name for name in names or () if name not in TESTS]
    if unknown:
        raise InputError(f"unknown circuit test {unknown[0]!r}: take of {', '.join(TESTS)}")
    chosen = [TESTS[name] for name in names] if names else [t for t in TESTS.values() if t.site == site]
    if not chosen:
        made_for = ", ".join(f"{test.name} ({test.site})" for test in TESTS.values())
        raise InputError(
            f"no circuit test is made for {site} of {partition}: name some with --tests; they are {made_for}"
        )
    return chosen


def circuit_rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """One table row per partition, test and method, from :func:`run_circuits`."""
    return [
        {
            "partition": Path(partition).name,
            "test": test,
            "method": kind,
            "clean": method["clean"],
            "whole_effect": method["whole"],
            "largest_effect": max(method["effect"], key=abs),
            **{f"gini_{name}": value for name, value in method["gini"].items()},
        }
        for partition, tests in results.items()
        for test, found in tests.items()
        for kind, method in found["methods"].items()
    ]


def mean_ginis(results: dict[str, Any]) -> dict[str, float]:
    """Mean Gini of each method over tests and normalisations, the paper's headline figure."""
    by_method: dict[str, list[float]] = {}
    for tests in results.values():
        for found in tests.values():
            for kind, method in found["methods"].items():
                by_method.setdefault(kind, []).extend(method["gini"].values())
    return {kind: float(torch.tensor(values).mean()) for kind, values in by_method.items()}
