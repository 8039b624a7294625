"""Does NDM find variables that are known to be there? The planted language model, from training to Gini."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ndm_fast.config import MergeConfig, RunSettings, TrainConfig
from ndm_fast.errors import InputError
from ndm_fast.evaluate.baselines import STANDARD_BASELINES, baseline_partition
from ndm_fast.evaluate.gini import gini, top_share
from ndm_fast.evaluate.patching.patching import patch_effects
from ndm_fast.evaluate.truth.one_thread import one_thread
from ndm_fast.evaluate.truth.planted_model import PlantedLanguage, planted_activations, train_planted_model
from ndm_fast.evaluate.truth.planted_pairs import planted_pairs
from ndm_fast.partition import SubspacePartition
from ndm_fast.train.restarts import Trained, best, random_starts, train_on

SITE = "blocks.1.hook_resid_post"


@dataclass(frozen=True)
class PlantedSettings:
    """How the model is trained, and how its subspaces are looked for."""

    width: int = 64
    """Of the model."""
    rows: int = 131072
    """Activations."""
    model_steps: int = 1500
    keys: int = 512
    """With more keys than joint states of two variables, one subspace that holds both costs nothing: every
    query finds its twin there. Measured at 6 variables of 8 values: 16,384 keys end at a mean Gini of 0.53 to
    0.70."""
    subspace: int = 8
    """Width of each subspace."""
    first_steps: int = 500
    """Of a start, before its first escape."""
    tries: int = 40
    """Escapes of a start."""
    escape_steps: int = 100
    rate: float = 5e-2
    kept: int = 3
    """Starts of lowest held-out loss, which go on."""
    more_tries: int = 150
    """Escapes of those that go on."""
    last_steps: int = 1000
    """Of the last stretch, without escapes."""
    last_rate: float = 5e-3
    unit: int = 4
    """Width of units that are to be merged."""
    unit_starts: int = 2
    unit_keys: int = 64
    """Units narrower than a variable see each of its coordinates take few values; only few keys make a
    mixture of them dear. Measured on one model: with 512 keys the units' mean Gini is 0.51, with 64 it is
    0.85."""
    merge_interval: int = 300
    merge_rate: float = 1e-2
    mi_keys: int = 4096


_SETTINGS = PlantedSettings()

RARELY = RunSettings(eval_every=1000, checkpoint_every=1_000_000)


def settings() -> PlantedSettings:
    """Those of ``evaluate planted``."""
    return _SETTINGS


class Scores(NamedTuple):
    """How well a partition tells the variables apart."""

    gini: float
    """Mean over variables."""
    top_share: float
    """Mean over variables."""
    gini_by_variable: list[float]
    top_subspace: list[int]
    """The one that matters most for each variable."""
    effects: list[list[float]]
    """[variables, S]"""


class Method(NamedTuple):
    """A way to come to a partition."""

    scores: Scores
    widths: list[int]
    loss: float | None = None
    """Held-out loss, of NDM."""

    def record(self) -> dict[str, Any]:
        """Plain JSON values, in one dict."""
        loss = {} if self.loss is None else {"loss": self.loss}
        return {**self.scores._asdict(), "widths": self.widths, **loss}


@dataclass(frozen=True)
class PlantedResult:
    """What came of a planted model."""

    planted: dict[str, int]
    """Variables, values and seed."""
    model_loss: float
    """Nats."""
    floor: float
    """Lowest possible ``model_loss``."""
    methods: dict[str, Method]
    starts: list[dict[str, float]]
    """``loss`` and ``gini`` of every start."""
    largest_gini: float
    """That these subspaces can reach."""
    seconds: float
    """On the clock."""
    cpu_seconds: float
    """Of the one thread."""

    def record(self) -> dict[str, Any]:
        """Plain JSON values: what ``planted.json`` holds."""
        return {**vars(self), "methods": {kind: method.record() for kind, method in self.methods.items()}}


def variable_effects(
    model: Any,
    language: PlantedLanguage,
    site: str,
    partition: SubspacePartition,
    *,
    prompts: int = 256,
    seed: int = 0,
) -> Tensor:
    """[variables, S] mean effect of patching each subspace for each variable, at the position that is read.

    Prompts and effect are those of :func:`planted_pairs`.
    """
    effects = []
    for variable in range(language.variables):
        pairs = planted_pairs(language, variable, prompts, seed)
        found = patch_effects(
            model,
            site,
            partition,
            pairs.prompts,
            pairs.counterfactuals,
            pairs.metric,
            positions=pairs.position,
            read=pairs.position,
            rows=1024,
        )
        effects.append(found.means)
    return torch.stack(effects)


def planted_scores(effects: Tensor) -> Scores:
    """Mean Gini and top share over variables of [variables, S] effects, and what they come from."""
    ginis, shares = [gini(row.abs()) for row in effects], [top_share(row) for row in effects]
    return Scores(
        sum(ginis) / len(ginis),
        sum(shares) / len(shares),
        ginis,
        effects.abs().argmax(1).tolist(),
        effects.tolist(),
    )


def run_planted(
    variables: int = 6, values: int = 8, *, seed: int = 0, starts: int = 4, merge: bool = False
) -> PlantedResult:
    """Train the model, find its subspaces, patch them, and hold them against the four baselines.

    Args:
        seed: of model, text, starts and escapes.
        starts: random starts of NDM; the three of lowest held-out loss go on, and the lowest of them counts.
        merge: also start from 4-wide units and let ``merge_threshold="auto"`` decide which belong together.
    """
    if starts < 1:
        raise InputError(f"{starts} starts: give at least 1 start")
    began, began_cpu = time.perf_counter(), time.process_time()
    language = PlantedLanguage(variables, values)
    with one_thread():
        model, loss = train_planted_model(
            language, width=_SETTINGS.width, steps=_SETTINGS.model_steps, seed=seed
        )
        activations = planted_activations(model, language, SITE, _SETTINGS.rows, seed=seed).activations

        def scored(partition: SubspacePartition, loss: float | None = None) -> Method:
            effects = variable_effects(model, language, SITE, partition, seed=seed)
            return Method(planted_scores(effects), list(partition.widths), loss)

        tried = random_starts(activations, first_settings(seed), starts, RARELY)
        ranked = sorted(tried, key=lambda one: one.loss)
        found = best([refine(one, activations, seed) for one in ranked[: _SETTINGS.kept]])
        methods = {"ndm": scored(found.partition, loss=found.loss)}
        for kind in STANDARD_BASELINES:
            methods[kind] = scored(baseline_partition(kind, found.partition.widths, activations, seed))
        if merge:
            merged = merge_units(activations, seed)
            methods["ndm_merged"] = scored(merged.partition, loss=merged.loss)
        by_start = [{"loss": one.loss, "gini": scored(one.partition).scores.gini} for one in tried]
    return PlantedResult(
        planted={"variables": variables, "values": values, "seed": seed},
        model_loss=loss,
        floor=language.floor,
        methods=methods,
        starts=by_start,
        largest_gini=1 - 1 / len(found.partition),
        seconds=time.perf_counter() - began,
        cpu_seconds=time.process_time() - began_cpu,
    )


def first_settings(seed: int) -> TrainConfig:
    """Settings of one start: many short escapes at a high rate, few keys."""
    return TrainConfig(
        unit_size=_SETTINGS.subspace,
        keys=_SETTINGS.keys,
        heldout_keys=_SETTINGS.keys,
        pool_rows=_SETTINGS.rows // 2,
        heldout_queries=min(2048, _SETTINGS.rows // 8),
        search_every=4,
        lr=_SETTINGS.rate,
        escape_tries=_SETTINGS.tries,
        escape_steps=_SETTINGS.escape_steps,
        max_steps=_SETTINGS.first_steps + _SETTINGS.tries * _SETTINGS.escape_steps,
        seed=seed,
    )


def refine(start: Trained, activations: Tensor, seed: int) -> Trained:
    """More escapes, then a last stretch at a low rate."""
    settings = first_settings(seed + 1)  # other escapes than before
    steps = _SETTINGS.first_steps + _SETTINGS.more_tries * _SETTINGS.escape_steps
    more = dataclasses.replace(settings, escape_tries=_SETTINGS.more_tries, max_steps=steps)
    better = train_on(start.partition, activations, more, settings=RARELY)
    last = dataclasses.replace(
        settings, escape_tries=0, max_steps=_SETTINGS.last_steps, lr=_SETTINGS.last_rate
    )
    return train_on(better.partition, activations, last, settings=RARELY)


def merge_units(activations: Tensor, seed: int) -> Trained:
    """From 4-wide units, merged by the automatic threshold; then trained on at a low rate."""
    few = _SETTINGS.unit_keys
    settings = dataclasses.replace(first_settings(seed), unit_size=_SETTINGS.unit, keys=few, heldout_keys=few)
    units = best(random_starts(activations, settings, _SETTINGS.unit_starts, RARELY))
    steps = len(units.partition) * _SETTINGS.merge_interval
    merging = dataclasses.replace(settings, escape_tries=0, max_steps=steps, lr=_SETTINGS.merge_rate)
    merge = MergeConfig(
        "auto",
        merge_start=_SETTINGS.merge_interval,
        merge_interval=_SETTINGS.merge_interval,
        mi_queries=512,
        mi_keys=_SETTINGS.mi_keys,
    )
    return train_on(units.partition, activations, merging, merge, RARELY)


def planted_rows(result: PlantedResult) -> list[dict[str, Any]]:
    """One table row per method, from :func:`run_planted`."""
    return [
        {
            "method": kind,
            "subspaces": len(method.widths),
            "mean_gini": method.scores.gini,
            "top_share": method.scores.top_share,
            "distinct_tops": len(set(method.scores.top_subspace)),
        }
        for kind, method in result.methods.items()
    ]
