"""``bench/gpu/check.py`` rehearsed: what raises, hangs, dies or poisons its device costs its own rows."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

GPU = Path(__file__).resolve().parents[1] / "bench" / "gpu"
ITEMS = ("one", "two", "three")
CHILD = """
import json, sys
sys.path.insert(0, {folder!r})
import jobs
poisoned = []
def item(name):
    if name == {poisons!r}:
        poisoned.append(name)
        raise RuntimeError("an illegal memory access")
    print("noise that is no word of the protocol")
    return [{{"name": name, "ms": 1.0}}]
def still_works():
    if poisoned:
        raise RuntimeError("the context is lost")
done = set(json.loads(sys.stdin.read()))
jobs.work([(name, lambda name=name: item(name)) for name in {items!r}], done, still_works)
"""


@pytest.fixture(scope="module")
def jobs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("jobs", GPU / "jobs.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["jobs"] = module
    spec.loader.exec_module(module)
    return module


def _rows(
    jobs: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    inject: str = "",
    poisons: str = "",
    seconds: float = 30,
) -> dict[str, Any]:
    """What came of each item: ``right``, or why it failed."""
    monkeypatch.setenv(jobs.INJECT, inject)
    monkeypatch.setattr(jobs, "START", 5.0)
    script = CHILD.format(folder=str(GPU), items=ITEMS, poisons=poisons)
    found: dict[str, Any] = {}

    def report(job: str, row: dict[str, Any]) -> None:
        assert job == "rehearsal"
        assert row["name"] not in found
        found[row["name"]] = row.get("failed", "right")

    jobs.run(jobs.Job("rehearsal", 1.0), [sys.executable, "-c", script], report, time.monotonic() + seconds)
    return found


def test_rows_of_a_job_that_works(jobs: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _rows(jobs, monkeypatch) == dict.fromkeys(ITEMS, "right")


@pytest.mark.parametrize("broken", ITEMS)
@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("raise", "RuntimeError: injected"),
        ("hang", "killed: it hung"),
        ("exit", "the process ended with 1"),
        ("kill", "the process ended with -9"),
    ],
)
def test_what_breaks_costs_its_own_row(
    jobs: ModuleType, monkeypatch: pytest.MonkeyPatch, broken: str, how: str, why: str
) -> None:
    found = _rows(jobs, monkeypatch, f"{broken}={how}")
    assert found.pop(broken).startswith(why)
    assert found == {name: "right" for name in ITEMS if name != broken}


def test_a_poisoned_device_is_left(jobs: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    found = _rows(jobs, monkeypatch, poisons="one")
    assert found == {"one": "RuntimeError: an illegal memory access", "two": "right", "three": "right"}


def test_a_job_that_cannot_start_says_so(jobs: ModuleType) -> None:
    found: list[dict[str, Any]] = []
    command = [sys.executable, "-c", "raise SystemExit('no card here')"]
    jobs.run(jobs.Job("none", 1.0), command, lambda _, row: found.append(row), time.monotonic() + 30)
    assert found == [{"name": "start", "failed": "the process ended with 1: no card here"}]


def test_nothing_begins_after_the_deadline(jobs: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _rows(jobs, monkeypatch, seconds=-1) == {"the rest": "not run: out of time"}


@pytest.mark.timeout(240)
def test_the_record_is_written_row_by_row(tmp_path: Path) -> None:
    """A real job in Triton's interpreter, of which one item is broken on purpose."""
    pytest.importorskip("triton")
    path = tmp_path / "gpu.json"
    command = [sys.executable, str(GPU / "check.py"), "--interpret", "--only", "others", "--out", str(path)]
    environment = {**os.environ, "NDM_FAST_CHECK_INJECT": "ksg=raise"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    rows = json.loads(path.read_text())["rows"]
    found = {row["name"]: row.get("failed", "right") for row in rows if row["job"] == "check others"}
    assert found == {"fp32 products": "right", "ksg": "RuntimeError: injected", "lie update": "right"}
    assert "FAILED check others / ksg: RuntimeError: injected" in done.stdout
