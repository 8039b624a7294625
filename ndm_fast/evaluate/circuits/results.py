"""What circuit tests give: effects and Ginis of every method, as they are saved in ``circuits.json``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class MethodResult:
    """One partition of the activations in one test; of several seeds, their mean."""

    clean: float
    """Mean of the metric."""
    whole: float
    """Its mean drop where the whole activation is patched."""
    widths: list[int]
    variance: list[float]
    """[S] variance of ordinary text in each subspace."""
    effect: list[float]
    """[S] mean drop where the subspace is patched."""
    share_of_whole: list[float]
    """[S] the same over the whole activation's."""
    complement: list[float] | None
    """[S] mean drop where all but the subspace is patched; what is missing of ``whole`` needs it."""
    gini: dict[str, float]
    """By normalisation."""
    gini_interval: dict[str, tuple[float, float]]
    """2.5 and 97.5 % over resampled prompts."""
    top_share: float
    """Largest effect over the sum of all."""
    seeds: int = 1
    gini_spread: dict[str, float] = field(default_factory=dict)
    """Standard deviation over seeds, by normalisation."""

    @property
    def mean_gini(self) -> float:
        """Over the normalisations."""
        return sum(self.gini.values()) / len(self.gini)

    @property
    def best(self) -> int:
        """The subspace of the largest effect."""
        return max(range(len(self.effect)), key=lambda s: abs(self.effect[s]))

    def reversed(self) -> MethodResult:
        """Of the same subspaces, the last one first."""
        backwards = {
            name: getattr(self, name)[::-1] for name in ("widths", "variance", "effect", "share_of_whole")
        }
        complement = None if self.complement is None else self.complement[::-1]
        return replace(self, **backwards, complement=complement)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Yardsticks:
    """Subspaces made with the labels, on template set a; measured on set b beside NDM's."""

    width: int
    """Of NDM's subspace with the largest effect; DAS and SVD get as many directions."""
    prompts: int
    methods: dict[str, MethodResult]
    """``ndm``, ``das``, ``svd``, ``mean_difference``; the labelled subspace is the first of its partition."""
    what: str = "saw the labels: made from template set a, measured on set b"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True)
class TestResult:
    """One circuit test of one partition, beside its baselines."""

    __test__ = False  # not one of pytest's

    what: str
    site: str
    prompts: int
    templates: str
    right: float
    """Share of the prompts that the model does right."""
    example: str
    methods: dict[str, MethodResult]
    """``ndm`` first."""
    yardsticks: Yardsticks | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


CircuitResults = dict[str, dict[str, TestResult]]
"""By partition and test."""


def results_to_json(results: CircuitResults) -> dict[str, Any]:
    """Plain values, as in ``circuits.json``."""
    return {name: {test: r.to_json() for test, r in tests.items()} for name, tests in results.items()}


def mean_of_seeds(results: Sequence[MethodResult]) -> MethodResult:
    """Mean of one method over its seeds: number by number, with the spread of the Ginis."""
    first, count = results[0], len(results)

    def mean(values: Sequence[Any]) -> Any:
        if values[0] is None:
            return None
        if isinstance(values[0], dict):
            return {key: mean([value[key] for value in values]) for key in values[0]}
        if isinstance(values[0], list | tuple):
            return type(values[0])(mean(column) for column in zip(*values, strict=True))
        return sum(values) / count

    names = ("clean", "whole", "variance", "effect", "share_of_whole", "complement", "gini", "gini_interval")
    spread = {
        key: float(torch.tensor([r.gini[key] for r in results], dtype=torch.float64).std())
        for key in first.gini
    }
    return MethodResult(
        widths=first.widths,
        top_share=mean([r.top_share for r in results]),
        seeds=count,
        gini_spread=spread,
        **{name: mean([getattr(r, name) for r in results]) for name in names},
    )


def circuit_rows(results: CircuitResults) -> list[dict[str, Any]]:
    """One table row per partition, test and method; yardsticks after the rest, marked as such."""
    rows = []
    for partition, tests in results.items():
        for test, found in tests.items():
            methods = dict(found.methods)
            if found.yardsticks:
                methods |= {f"{kind} (set b)": m for kind, m in found.yardsticks.methods.items()}
            rows += [_row(Path(partition).name, test, kind, method) for kind, method in methods.items()]
    return rows


def _row(partition: str, test: str, kind: str, method: MethodResult) -> dict[str, Any]:
    low, high = method.gini_interval["dimension"]
    return {
        "partition": partition,
        "test": test,
        "method": kind,
        "clean": method.clean,
        "whole_effect": method.whole,
        "largest_effect": method.effect[method.best],
        "of_whole": method.share_of_whole[method.best],
        "all_but_it": "" if method.complement is None else method.complement[method.best],
        **{f"gini_{name}": value for name, value in method.gini.items()},
        "dimension_95_%": f"{low:.3f}-{high:.3f}",
    }


def mean_ginis(results: CircuitResults) -> dict[str, float]:
    """Mean Gini of each method over tests and normalisations, the paper's headline figure."""
    by_method: dict[str, list[float]] = {}
    for tests in results.values():
        for found in tests.values():
            for kind, method in found.methods.items():
                by_method.setdefault(kind, []).extend(method.gini.values())
    return {kind: float(torch.tensor(values).mean()) for kind, values in by_method.items()}
