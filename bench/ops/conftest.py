"""Benchmarks of single ops, by pytest-benchmark: shapes, rounds, the record and the tables.

    pytest bench/ops --benchmark-json=FILE     # everything
    pytest bench/ops -k nearest --rounds 2     # a trial
    pytest bench/ops --benchmark-disable       # the checks alone

Each benchmark first checks its op against the fp64 oracle and fails, untimed, where it is wrong. FILE is
pytest-benchmark's, with our ``rows`` and ``made_with`` beside its own keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from contest import Contender, compete
from measuring import made_with, verdict
from pytest_benchmark.fixture import BenchmarkFixture
from registry import PLANS, TINY, Plan

from ndm_fast.table import text_table

Contest = Callable[..., None]
CEILINGS = {"GFLOP/s": "a matrix product", "GB/s": "a copy"}
ROWS = pytest.StashKey[list[dict[str, Any]]]()
"""What was timed so far, for the tables."""


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rounds", type=int, help="rounds of every case; default: those of registry.py")
    parser.addoption("--tiny", action="store_true", help="one tiny shape an op: tests the benchmarks")
    parser.addoption("--memory-gb", type=float, default=4.0, help="for the tensors of eager torch")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The shapes of the op that a benchmark is named for: ``bench_OP``."""
    shapes = _plan(metafunc.config, metafunc.function.__name__.removeprefix("bench_")).shapes
    metafunc.parametrize("shape", shapes, ids=str)


def _plan(config: pytest.Config, op: str) -> Plan:
    return TINY if config.getoption("--tiny") else PLANS[op]


@pytest.fixture
def contest(benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> Contest:
    """Times ours among others, and keeps the row of the record."""
    op = request.function.__name__.removeprefix("bench_")
    rounds = request.config.getoption("--rounds") or _plan(request.config, op).rounds
    benchmark.group = op

    def run(
        case: dict[str, Any],
        ours: Contender,
        *,
        ceiling: Contender,
        peers: dict[str, Contender],
        unit: str = "GFLOP/s",
        goal: tuple[str, float] | None = None,
    ) -> None:
        """``case`` begins the row; ``goal`` names a figure of it, and the least that it should be."""
        row = compete(benchmark, ours, ceiling=ceiling, peers=peers, rounds=rounds)
        if row and goal:
            row["goal"] = {"of": goal[0], "least": goal[1], "verdict": verdict(row[goal[0]], goal[1])}
        benchmark.extra_info.update({"op": op, **case, "unit": unit, **row})
        if row:
            request.config.stash[ROWS].append(benchmark.extra_info)

    return run


def pytest_benchmark_update_json(benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    del output_json["machine_info"]["node"]  # the name of somebody's machine
    for bench in output_json["benchmarks"]:
        del bench["extra_info"]  # it is the rows
    output_json["rows"] = [bench.extra_info for bench in benchmarks]
    output_json["made_with"] = made_with()


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """A table for each op: rates, share of the ceiling, times the best peer, all inside the same rounds."""
    for op in dict.fromkeys(row["op"] for row in config.stash[ROWS]):
        rows = [row for row in config.stash[ROWS] if row["op"] == op]
        terminalreporter.write_line(f"\n{op}, {rows[0]['unit']}; the ceiling is {CEILINGS[rows[0]['unit']]}")
        terminalreporter.write_line(text_table([_line(row) for row in rows]))


def _line(row: dict[str, Any]) -> dict[str, str]:
    goal = row.get("goal")
    names = list(row)
    return {
        **{name: str(row[name]) for name in names[1 : names.index("unit")]},
        "ms": f"{row['ms']['ours']['median']:.2f}",
        "ceiling": f"{row['rates']['ceiling']:.1f}",
        "ours": f"{row['rates']['ours']:.1f}",
        "of ceiling": f"{row['of_ceiling']:.2f}",
        "times the best peer": f"{row['times_best_peer']:.2f} ({row['best_peer']})",
        "goal": f"{goal['of']} {goal['least']:g} {goal['verdict']}" if goal else "-",
    }
