"""What the benchmarks share: rounds of contenders, ratios inside a round, result files."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ndm_fast.ops.cpu import extension
from ndm_fast.provenance import provenance

RESULTS = Path(__file__).parent / "results"
PEERS = {"faiss-cpu": "faiss", "scikit-learn": "sklearn"}
"""Distributions whose versions belong to a record, and the modules they install."""


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def rounds(contenders: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every contender in every round.

    Every round times each contender once, in turn, so that a busy machine is busy for all of them.
    """
    for run in contenders.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, run in contenders.items():
            times[name].append(seconds(run))
    return times


def times_faster(times: Mapping[str, list[float]], ours: str, other: str) -> float:
    """Median over rounds of ``other``'s seconds over ``ours``."""
    return statistics.median(o / u for u, o in zip(times[ours], times[other], strict=True))


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def result_file(name: str) -> Path:
    """Where a benchmark's results go: one file per instruction set."""
    return RESULTS / f"{name}-{extension.isa()}.json"


def made_with() -> dict[str, Any]:
    """Hardware, versions, also of those we are compared with, commit, instruction set and date."""
    about = provenance()
    about["versions"] |= {name: version(name) for name in PEERS if find_spec(PEERS[name])}
    return {**about, "isa": extension.isa(), "date": time.strftime("%Y-%m-%d %H:%M")}


def write_results(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows with hardware, versions and commit."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"rows": rows, "made_with": made_with()}, indent=1) + "\n")
    print(f"written to {path}")


def verdict(measured: float, goal: float, *, at_most: bool = False) -> str:
    """``"met"`` or ``"MISSED"``."""
    return "met" if (measured <= goal if at_most else measured >= goal) else "MISSED"
