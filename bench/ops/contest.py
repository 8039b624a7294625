"""Contenders timed in the same rounds: the others just before ours, which pytest-benchmark times."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from measuring import seconds, spread, times_faster
from pytest_benchmark.fixture import BenchmarkFixture


class Contender(NamedTuple):
    """Something to run, and the work that one run does: FLOP, or bytes moved."""

    run: Callable[[], object]
    work: float


class Interleaved:
    """Runs and times every other contender once, before each round of ours.

    A busy machine is then busy for all of them, and ratios are taken inside a round.
    """

    def __init__(self, others: Mapping[str, Contender]) -> None:
        self._others = others
        self.times: dict[str, list[float]] = {name: [] for name in others}

    def run_once(self) -> None:
        for name, other in self._others.items():
            self.times[name].append(seconds(other.run))


def product(side: int) -> Contender:
    """This machine's matrix product in fp32: the ceiling of an op that is bound by arithmetic."""
    left, right, out = (torch.randn(side, side) for _ in range(3))
    return Contender(lambda: torch.mm(left, right, out=out), 2 * side**3)


def copy(elements: int = 1 << 25) -> Contender:
    """A copy in memory: the ceiling of an op that is bound by bandwidth."""
    source, target = torch.randn(elements), torch.empty(elements)
    return Contender(lambda: target.copy_(source), 8 * elements)


def compete(
    benchmark: BenchmarkFixture,
    ours: Contender,
    *,
    ceiling: Contender,
    peers: Mapping[str, Contender],
    rounds: int,
) -> dict[str, Any]:
    """Time all; what the record says of ours, the ceiling and the peers. Nothing with --benchmark-disable.

    Rates are in 1e9 units of work a second. ``of_ceiling`` and ``times`` are medians over rounds of ratios of
    seconds per unit of work, so that a peer may be given a part of the work.
    """
    others = Interleaved({"ceiling": ceiling, **peers})
    benchmark.pedantic(ours.run, setup=others.run_once, rounds=rounds, warmup_rounds=1)
    if benchmark.stats is None:
        return {}
    times = {"ours": benchmark.stats.stats.data}
    times |= {name: values[-rounds:] for name, values in others.times.items()}  # the first warmed up
    work = {"ours": ours.work, "ceiling": ceiling.work} | {name: peer.work for name, peer in peers.items()}
    paces = {name: [took / work[name] for took in values] for name, values in times.items()}
    rates = {name: 1e-9 / statistics.median(values) for name, values in paces.items()}
    best = max(peers, key=lambda name: rates[name])
    return {
        "ms": {name: spread([1e3 * took for took in values]) for name, values in times.items()},
        "rates": {name: float(f"{rate:.4g}") for name, rate in rates.items()},
        "of_ceiling": round(times_faster(paces, "ours", "ceiling"), 3),
        "times": {name: round(times_faster(paces, "ours", name), 2) for name in peers},
        "best_peer": best,
        "times_best_peer": round(times_faster(paces, "ours", best), 2),
    }
