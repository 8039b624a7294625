"""Does NDM find variables that are known to be there? The planted language model, from training to Gini."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ndm_fast.config import MergeConfig, TrainConfig
from ndm_fast.errors import InputError
from ndm_fast.evaluate.baselines import STANDARD_BASELINES, baseline_partition
from ndm_fast.evaluate.gini import gini, top_share
from ndm_fast.evaluate.patching.patching import patch_effects
from ndm_fast.evaluate.patching.prompts import Prompts
from ndm_fast.evaluate.truth.planted_model import PlantedLanguage, planted_activations, train_planted_model
from ndm_fast.partition import SubspacePartition
from ndm_fast.seeds import seeded
from ndm_fast.train.restarts import Trained, best, random_starts, train_on

SITE = "blocks.1.hook_resid_post"


_WIDTH, _ROWS, _MODEL_STEPS = 64, 131072, 1500

_KEYS = 512
"""With more keys than joint states of two variables, one subspace that holds both costs nothing: every query
finds its twin there. Measured at 6 variables of 8 values: 16,384 keys end at a mean Gini of 0.53 to 0.70."""

_FIRST_STEPS, _TRIES, _ESCAPE_STEPS, _RATE = 500, 40, 100, 5e-2


_KEPT, _MORE_TRIES, _LAST_STEPS, _LAST_RATE = 3, 150, 1000, 5e-3

_UNIT, _UNIT_STARTS, _UNIT_KEYS = 4, 2, 64
"""Units narrower than a variable see each of its coordinates take few values; only few keys make a mixture of
them dear. Measured on one model: with 512 keys the units' mean Gini is 0.51, with 64 it is 0.85."""

_MERGE_INTERVAL, _MERGE_RATE, _MI_KEYS = 300, 1e-2, 4096

_PROMPTS = 30
"""What the random numbers are for."""


def variable_effects(
    model: Any,
    language: PlantedLanguage,
    site: str,
    partition: SubspacePartition,
    *,
    prompts: int = 256,
    seed: int = 0,
) -> Tensor:
    """[variables, S] mean effect of patching each subspace for each variable.

    The counterfactual differs in the value of one variable. Patched and read is a random position after the
    cues whose own token tells of another variable, which is the same in both. Effect: drop of
    logit(true value) - logit(counterfactual value).
    """
    effects = []
    for variable in range(language.variables):
        generator = seeded(seed, _PROMPTS, variable)
        values, places = language.draw(prompts, generator)
        others = values.clone()
        shift = torch.randint(1, language.values, (prompts,), generator=generator)
        others[:, variable] = (values[:, variable] + shift) % language.values
        position = torch.randint(1 + language.variables, language.length, (prompts,), generator=generator)
        elsewhere = torch.randint(1, language.variables, (prompts,), generator=generator)
        # `places` starts after BOS; the position's own token is one of the other variables.
        places[torch.arange(prompts), position - 1] = (variable + elsewhere) % language.variables
        first = 1 + variable * language.values
        right, wrong = first + values[:, variable], first + others[:, variable]

        def difference(logits: Tensor, rows: Tensor, right: Tensor = right, wrong: Tensor = wrong) -> Tensor:
            at = logits[:, 0]
            return (at.gather(1, right[rows, None]) - at.gather(1, wrong[rows, None]))[:, 0]

        found = patch_effects(
            model,
            site,
            partition,
            _unpadded(language.tokens(values, places)),
            _unpadded(language.tokens(others, places)),
            difference,
            positions=position[:, None],
            read=position[:, None],
            rows=1024,
        )
        effects.append(found.means)
    return torch.stack(effects)


def _unpadded(tokens: Tensor) -> Prompts:
    return Prompts(tokens, torch.ones_like(tokens))


def planted_scores(effects: Tensor) -> dict[str, Any]:
    """Mean Gini and top share over variables of [variables, S] effects, and what they come from."""
    ginis, shares = [gini(row.abs()) for row in effects], [top_share(row) for row in effects]
    return {
        "gini": sum(ginis) / len(ginis),
        "top_share": sum(shares) / len(shares),
        "gini_by_variable": ginis,
        "top_subspace": effects.abs().argmax(1).tolist(),
        "effects": effects.tolist(),
    }


def run_planted(
    variables: int = 6, values: int = 8, *, seed: int = 0, starts: int = 4, merge: bool = False
) -> dict[str, Any]:
    """Train the model, find its subspaces, patch them, and hold them against the four baselines.

    Args:
        seed: of model, text, starts and escapes.
        starts: random starts of NDM; the three of lowest held-out loss go on, and the lowest of them counts.
        merge: also start from 4-wide units and let ``merge_threshold="auto"`` decide which belong together.

    Returns:
        ``methods``: by name the scores of :func:`planted_scores` with ``widths`` and, for NDM, ``loss``;
        ``starts``: loss and Gini of every start; ``model_loss`` and its ``floor``, nats; ``largest_gini``;
        ``seconds`` on the clock, and ``cpu_seconds`` of the one thread.
    """
    if starts < 1:
        raise InputError(f"{starts} starts: give at least 1 start")
    began, began_cpu = time.perf_counter(), time.process_time()
    language = PlantedLanguage(variables, values)
    with _one_thread():
        model, loss = train_planted_model(language, width=_WIDTH, steps=_MODEL_STEPS, seed=seed)
        activations = planted_activations(model, language, SITE, _ROWS, seed=seed)

        def scored(partition: SubspacePartition, **more: Any) -> dict[str, Any]:
            effects = variable_effects(model, language, SITE, partition, seed=seed)
            return {**planted_scores(effects), "widths": list(partition.widths), **more}

        tried = random_starts(activations, first_settings(seed), starts)
        ranked = sorted(tried, key=lambda one: one.loss)
        found = best([refine(one, activations, seed) for one in ranked[:_KEPT]])
        methods = {"ndm": scored(found.partition, loss=found.loss)}
        for kind in STANDARD_BASELINES:
            methods[kind] = scored(baseline_partition(kind, found.partition.widths, activations, seed))
        if merge:
            merged = merge_units(activations, seed)
            methods["ndm_merged"] = scored(merged.partition, loss=merged.loss)
        by_start = [{"loss": one.loss, "gini": scored(one.partition)["gini"]} for one in tried]
    return {
        "planted": {"variables": variables, "values": values, "seed": seed},
        "model_loss": loss,
        "floor": language.floor,
        "methods": methods,
        "starts": by_start,
        "largest_gini": 1 - 1 / len(found.partition),
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - began_cpu,
    }


def first_settings(seed: int, width: int = 8) -> TrainConfig:
    """Settings of one start: many short escapes at a high rate, few keys."""
    return TrainConfig(
        unit_size=width,
        keys=_KEYS,
        heldout_keys=_KEYS,
        pool_rows=_ROWS // 2,
        heldout_queries=min(2048, _ROWS // 8),
        search_every=4,
        lr=_RATE,
        escape_tries=_TRIES,
        escape_steps=_ESCAPE_STEPS,
        max_steps=_FIRST_STEPS + _TRIES * _ESCAPE_STEPS,
        eval_every=1000,
        checkpoint_every=1_000_000,
        seed=seed,
    )


def refine(start: Trained, activations: Tensor, seed: int) -> Trained:
    """More escapes, then a last stretch at a low rate."""
    settings = first_settings(seed + 1)  # other escapes than before
    steps = _FIRST_STEPS + _MORE_TRIES * _ESCAPE_STEPS
    more = dataclasses.replace(settings, escape_tries=_MORE_TRIES, max_steps=steps)
    better = train_on(start.partition, activations, more)
    last = dataclasses.replace(settings, escape_tries=0, max_steps=_LAST_STEPS, lr=_LAST_RATE)
    return train_on(better.partition, activations, last)


def merge_units(activations: Tensor, seed: int) -> Trained:
    """From 4-wide units, merged by the automatic threshold; then trained on at a low rate."""
    settings = dataclasses.replace(first_settings(seed, _UNIT), keys=_UNIT_KEYS, heldout_keys=_UNIT_KEYS)
    units = best(random_starts(activations, settings, _UNIT_STARTS))
    steps = len(units.partition) * _MERGE_INTERVAL
    merging = dataclasses.replace(settings, escape_tries=0, max_steps=steps, lr=_MERGE_RATE)
    merge = MergeConfig(
        "auto", merge_start=_MERGE_INTERVAL, merge_interval=_MERGE_INTERVAL, mi_queries=512, mi_keys=_MI_KEYS
    )
    return train_on(units.partition, activations, merging, merge)


def planted_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """One table row per method, from :func:`run_planted`."""
    return [
        {
            "method": kind,
            "subspaces": len(method["widths"]),
            "mean_gini": method["gini"],
            "top_share": method["top_share"],
            "distinct_tops": len(set(method["top_subspace"])),
        }
        for kind, method in result["methods"].items()
    ]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Matrices this small gain nothing from a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
