"""``bench/ops`` checks every op before it is timed, and keeps a record of what was right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pytest_benchmark")

ROOT = Path(__file__).parents[1]
BREAK_UPDATE = """
from ndm_fast import ops
right = ops.lie_update
ops.lie_update = lambda *arguments, **options: 1.01 * right(*arguments, **options)
"""


def run_tiny(folder: Path, *options: str, plugin: str = "") -> tuple[int, str, dict]:
    """Exit code, output and record of the benchmarks at their tiny shapes, with a plugin loaded first."""
    record = folder / "record.json"
    (folder / "broken.py").write_text(plugin)
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-P"] if sys.version_info >= (3, 11) else [sys.executable]
    command += ["-m", "pytest", "bench/ops", "-p", "broken", "-p", "no:cacheprovider", "--tiny"]
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [*command, f"--benchmark-json={record}", *options],
        cwd=ROOT,
        env={**outside, "PYTHONPATH": path},  # a worker of xdist times nothing
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr, json.loads(record.read_text() or "{}")


def test_times_no_op_that_is_wrong(tmp_path: Path) -> None:
    options = ("--rounds", "2", "-k", "gradient or lie")
    code, output, record = run_tiny(tmp_path, *options, plugin=BREAK_UPDATE)
    assert code == 1, output
    assert "1 failed, 1 passed" in output
    (row,) = record["rows"]
    assert row["op"] == "gradient"
    assert len(record["benchmarks"][0]["stats"]["data"]) == 2
    assert row["times_best_peer"] == row["times"][row["best_peer"]] > 0
    assert {"cpu", "commit", "versions", "threads", "isa", "date"} <= set(record["made_with"])
    assert "gradient, GFLOP/s; the ceiling is a matrix product" in output


@pytest.mark.slow  # imports faiss and scikit-learn, and starts a process for each search
def test_every_op_has_its_rows(tmp_path: Path) -> None:
    code, output, record = run_tiny(tmp_path)
    assert code == 0, output
    ops = [row["op"] for row in record["rows"]]
    assert ops == ["gradient", *["k_nearest"] * 3, "ksg", "ksg", "lie_update", "nearest", "nearest",
                   *["nearest_index"] * 4, "product", "product"]  # fmt: skip
