"""``check.py`` rehearsed without a card: its own plan, made-up times, a clock that runs fast.

    python bench/gpu/rehearse.py                      # what falls off where a machine is slower; a minute
    python bench/gpu/rehearse.py --items items.json   # the plans, and the names of each job's items

Times are those of the two runs on an H200 where an item was in them, and estimates else. What the checks,
which run beside each other, take from each other on the one card is not in them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import threading
import time
from argparse import Namespace
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import check
from jobs import Job, Row

RESULTS = Path(__file__).resolve().parents[1] / "results"
RECORDS = ("gpu-h200-second.json", "gpu-h200-first-contact.json")
OTHERS = ("flash_kmeans", "faiss", "cuvs", "pykeops")

START = 6.2
"""Seconds to import torch and to make a job's rows, alone. The two records do not say when a job began: 16
and 10 such starts fit into their sums at 7.2 and 5.2."""
START_BESIDE = 10.0
SPECIALISATION = 0.8
"""Seconds to compile a kernel: of the first record's gradients, which had ended when nvcc had, at 68."""
COMPILED = {"two products": 3, "check triton": 27, "check gradient": 82, "check others": 23, "activations": 6,
            "steps": 14, "gradient": 36, "tune": 40, "time": 18}  # fmt: skip
"""Specialisations of a job, by what is in its name: as launches.py counts them, the most of each kind."""
ESTIMATED = {
    "kernels": 0.2,
    "profile": 2.0,
    "published scheme, torch.compile": 5.0,
    "counters": 15.0,
    "resolve": 0.3,
    "tiles": 0.5,
    "memcheck": 25.0,
    "racecheck": 25.0,
    "initcheck": 25.0,
}
"""Seconds of items that no record has, by how the name begins."""
BUILD = 68.0


class Card(str):
    """A device without numbers that says it is a card."""

    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return other == "cuda"

    def __ne__(self, other: object) -> bool:
        return other != "cuda"


def named(others: bool = False) -> dict[str, Any]:
    """Both plans, and the items of their jobs as a card would find them; none is run.

    Args:
        others: as if every contender were installed.
    """
    import torch

    check.import_package()
    from ndm_fast.kernels import replay

    really = importlib.util.find_spec
    with ExitStack() as stack:
        stack.enter_context(replay.recorded(90))
        for place, name, value in (
            (check, "search_of", lambda name: name),
            (torch.Tensor, "is_cuda", True),
            (torch, "allclose", lambda *_, **__: True),
            (torch.linalg, "qr", lambda square: (square, square)),  # which takes long
            (importlib.util, "find_spec", lambda name: (others and name in OTHERS) or really(name)),
        ):
            stack.enter_context(mock.patch.object(place, name, value))
        plans = {"full": check.plan(small=False), "quick": check.quick_plan(small=False)}
        wanted = {job.name for plan in plans.values() for part in plan for job in part}
        found = {job: [name for name, _ in check.items(job, Card("meta"), small=False)] for job in wanted}
    return {"plans": plans, "items": found}


@cache
def recorded() -> dict[tuple[str, str], float]:
    """(Job, item) -> seconds on the H200, with what it ran to warm up."""
    found: dict[tuple[str, str], float] = {}
    for name in RECORDS:
        for row in json.loads((RESULTS / name).read_text())["rows"]:
            if "runs" in row:
                turns = row["runs"] + (
                    12 if "every time" in row["name"] else 5 if "reuse" in row["name"] else 2
                )
                found.setdefault((row["job"], row["name"]), row["ms"] * _parts(row) * turns / 1e3)
    return found


def _parts(row: Row) -> int:
    """Of what one run has done, a row has the time of one part."""
    job, name = str(row["job"]), str(row["name"])
    if "step with reuse" in name:
        return 32
    if job.startswith("tune"):
        return 20 if "gradient" in job else 4
    return 20 if name.startswith(("gradient", "update")) and name.endswith("in a graph") else 1


def seconds(job: str, item: str, beside: bool) -> float:
    """What an item takes: beside others it is compiled and run once, or checked."""
    for begin, estimate in ESTIMATED.items():
        if item.startswith(begin):
            return estimate
    if not beside:
        known = recorded().get((job, item))
        return known if known is not None else _typical(job)
    if job.startswith("check cuda"):
        return 0.6
    return 0.5


@cache
def _typical(job: str) -> float:
    """The mean of what the records have of such jobs: of this model, if any."""
    kind, model, *what = [*job.split(" "), ""]
    same = [(name, took) for (name, _), took in recorded().items() if name.split(" ")[0] == kind]
    same = [each for each in same if ("gradient" in each[0]) == ("gradient" in job)] or same
    same = [each for each in same if ("steps" in each[0]) == ("steps" in what)] or same
    same = [each for each in same if model in each[0]] or same
    return statistics.mean(took for _, took in same) if same else 0.3


def compiling(job: str) -> float:
    """Seconds to compile all of a job."""
    return SPECIALISATION * next((count for name, count in COMPILED.items() if name in job), 0)


class Simulated(NamedTuple):
    """How a run would go."""

    seconds: float
    timings_from: float
    """When the checks and all that is compiled beside them were over."""
    lost: dict[str, tuple[int, int]]
    """Of a job that did not end: items without a result, and all; in the order of giving up."""


class Clock:
    """Seconds that pass faster than the real ones."""

    def __init__(self, speed: float) -> None:
        self._speed, self._began = speed, time.monotonic()

    def monotonic(self) -> float:
        """As ``time.monotonic``."""
        return self._speed * (time.monotonic() - self._began)

    def wait_until(self, moment: float) -> None:
        """Sleep."""
        time.sleep(max(0.0, moment - self.monotonic()) / self._speed)


class Run:
    """A run of ``check.py`` whose jobs only wait."""

    def __init__(self, names: dict[str, Any], slower: float, speed: float) -> None:
        self.names, self.slower, self.clock = names, slower, Clock(speed)
        self.checks = {job.name for job in names["plans"]["full"][0]}
        self.compiled: set[tuple[str, str]] = set()
        self.lost: dict[str, tuple[int, int]] = {}
        self.timings_from = 0.0
        self.running, self.card = 0, threading.Lock()

    def job(self, job: Job, command: list[str], report: object, deadline: float, *_: object) -> None:
        """In the place of ``jobs.run``."""
        beside = "--once" in command or job.name in self.checks
        with self.card:
            assert beside or not self.running, "what is timed has the card for itself"
            self.running += 1
        if not beside:
            self.timings_from = self.timings_from or self.clock.monotonic()
        items, moment = self.names["items"][job.name], self.clock.monotonic()
        ended = -1
        for item in (None, *items):
            moment += self.slower * self._seconds(job.name, item, beside)
            self.clock.wait_until(min(moment, deadline))
            if moment > deadline:
                if "--once" not in command:
                    self.lost[job.name] = (len(items) - max(0, ended), len(items))
                break
            ended += 1
            self.compiled.add((job.name, str(item)))
        with self.card:
            self.running -= 1

    def _seconds(self, job: str, item: str | None, beside: bool) -> float:
        if item is None:
            return START_BESIDE if beside else START
        took = seconds(job, item, beside)
        if (job, item) not in self.compiled:
            took += compiling(job) / len(self.names["items"][job])
        return took

    def build(self, limit: float) -> Row:
        """In the place of ``building.build``."""
        self.clock.wait_until(self.clock.monotonic() + min(limit, self.slower * BUILD))
        return {"name": "build"}


def simulate(
    names: dict[str, Any], slower: float = 1.0, *, speed: float = 60.0, workers: int = 16
) -> Simulated:
    """The whole plan, as ``check.run_all`` runs it on so many processes and one card.

    Args:
        names: of :func:`named`.
        slower: what everything takes, in units of what is assumed.
        speed: simulated seconds in a real one.
    """
    run = Run(names, slower, speed)
    arguments = Namespace(
        budget=check.BUDGET, seed=0, quick=False, only=None, no_checks=False, beside=workers
    )
    record = SimpleNamespace(began=run.clock.monotonic(), add=lambda *_: None)
    with ExitStack() as stack:
        for place, name, value in (
            (check, "time", run.clock),
            (check, "build", run.build),
            (check, "plan", lambda small: names["plans"]["full"]),
            (check.jobs, "run", run.job),
        ):
            stack.enter_context(mock.patch.object(place, name, value))
        check.run_all(arguments, record, small=False)
    return Simulated(run.clock.monotonic() - record.began, run.timings_from - record.began, run.lost)


def read(path: Path) -> dict[str, Any]:
    """What ``--items`` has written."""
    found = json.loads(path.read_text())
    plans = {name: [[Job(*job) for job in part] for part in plan] for name, plan in found["plans"].items()}
    return {**found, "plans": plans}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=Path, help="write the names here, as JSON, and stop")
    parser.add_argument("--others", action="store_true", help="as if every contender were installed")
    parser.add_argument("--workers", type=int, default=16, help="processes at once")
    arguments = parser.parse_args()
    names = named(arguments.others)
    if arguments.items:
        arguments.items.write_text(json.dumps(names, indent=1) + "\n")
        return
    for slower in (1.0, 1.1, 1.25, 1.5, 2.0):
        found = simulate(names, slower, workers=arguments.workers)
        falls = ", ".join(f"{job} ({lost} of {count})" for job, (lost, count) in found.lost.items())
        print(
            f"| {slower:g} | {found.timings_from:.0f} | {found.seconds:.0f} | {falls or 'nothing'} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
