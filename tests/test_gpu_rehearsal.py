"""``bench/gpu/check.py`` with its own plan and faked work: every path breaks in every way, and time runs out.

Jobs and items are the plan's, so a new path is in here by itself. What an item does is replaced by what costs
nothing; processes, the pool of them, limits, restarts and the record are real.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from ndm_fast.ops import backends

GPU = Path(__file__).resolve().parents[1] / "bench" / "gpu"
WAYS = {
    "raise": "RuntimeError: injected",
    "hang": "killed: it hung",
    "exit": "the process ended with 1: last words",
    "kill": "the process ended with -9: last words",
    "poison": "RuntimeError: an illegal memory access",
}
"""How an item breaks, and what the record says of it then."""
CHILD = """
import json, os, signal, sys, time
sys.path.insert(0, {folder!r})
import jobs
job = sys.argv[sys.argv.index("--job") + 1]
broken, way = json.loads({broken!r})[job], {way!r}
poisoned = []
def run(name):
    if name != broken:
        return [dict(name=name, right=True)]
    print("last words", flush=True)
    if way == "hang":
        time.sleep(1e6)
    elif way == "exit":
        os._exit(1)
    elif way == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif way == "poison":
        poisoned.append(name)
        raise RuntimeError("an illegal memory access")
    raise RuntimeError("injected")
def still_works():
    if poisoned:
        raise RuntimeError("the context is lost")
items = [(name, lambda name=name: run(name)) for name in json.loads({items!r})[job]]
jobs.work(items, set(json.loads(sys.stdin.read())), still_works)
"""

pytestmark = [
    pytest.mark.skipif(not backends.has_triton_installed(), reason="triton is not installed"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="triton's compiler runs on Linux"),
]


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plans and their items, as with every contender installed."""
    path = tmp_path_factory.mktemp("rehearsal") / "items.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(GPU / "rehearse.py"), "--others", "--items", str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return path


def test_every_path_has_items(gpu: Any, names: Path) -> None:
    found = gpu("rehearse").read(names)
    assert [job for job, items in found["items"].items() if len(items) != len(set(items)) or not items] == []
    jobs = {job.name for part in found["plans"]["full"] for job in part}
    check = gpu("check")
    for each in check.SEARCHES:
        assert f"check {each}" in jobs
        assert each in found["items"]["time gemma-2-2b Q128"]
    assert "check flash-kmeans" in jobs
    for each in gpu("contenders").OTHERS:
        assert f"{each}, one subspace" in found["items"]["time gpt2 Q128"]


def _broken(items: dict[str, list[str]], way: str) -> dict[str, str]:
    """An item of every job: each way another one, where there are as many."""
    place = list(WAYS).index(way)
    return {job: found[place % len(found)] for job, found in items.items()}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("plan", ["full", "quick"])
@pytest.mark.parametrize("way", WAYS)
def test_what_breaks_in_a_path_costs_its_own_row(
    gpu: Any, names: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: str, way: str
) -> None:
    found = gpu("rehearse").read(names)
    check = gpu("check")
    broken = _broken(found["items"], way)
    # Where nothing hangs, a machine that stalls for a while has not to matter.
    limit = 1.0 if way == "hang" else 60.0
    short = [[job._replace(limit=limit) for job in part] for part in found["plans"][plan]]
    monkeypatch.setattr(check, "plan" if plan == "full" else "quick_plan", lambda small: short)
    monkeypatch.setattr(check, "build", lambda limit: {"name": "build", "failed": "not built: no compiler"})
    child = tmp_path / "child.py"
    items, chosen = json.dumps(found["items"]), json.dumps(broken)
    child.write_text(CHILD.format(folder=str(GPU), broken=chosen, way=way, items=items))
    monkeypatch.setattr(check, "__file__", str(child))
    path = tmp_path / "gpu.json"
    record = gpu("record").Record(path, {"machine": {"capability": None}})
    arguments = Namespace(budget=1e4, seed=0, quick=plan == "quick", only=None, no_checks=False, beside=8)
    monkeypatch.setattr(check, "SANITIZER_BUDGET", 1e4)
    check.run_all(arguments, record, small=False)
    rows: dict[str, dict[str, str]] = {}
    for row in json.loads(path.read_text())["rows"]:
        job = rows.setdefault(row["job"], {})
        assert row["name"] not in job, "no row twice"
        job[row["name"]] = "right" if row.get("right") else row["failed"].strip()
    assert rows.pop("build", None) == ({"build": "not built: no compiler"} if plan == "full" else None)
    expected = {
        job.name: dict.fromkeys(found["items"][job.name], "right") | {broken[job.name]: WAYS[way]}
        for part in short
        for job in part
    }
    assert rows == expected
    assert len(record.failures()) == len(expected) + (plan == "full")


@pytest.mark.timeout(120)
def test_the_plan_ends_in_time(gpu: Any, names: Path) -> None:
    """With times of the two records and estimates, on 16 processes and one card."""
    rehearse = gpu("rehearse")
    found = rehearse.read(names)
    run = rehearse.simulate(found, speed=40.0)
    assert run.seconds < gpu("check").BUDGET
    lost = [name for name in run.lost if not name.startswith("sanitizer")]
    assert lost == []
    for name, (count, of) in run.lost.items():
        assert count < of, name


@pytest.mark.timeout(120)
@pytest.mark.parametrize("slower", [1.5, 2.0])
def test_what_falls_off_is_wanted_least(gpu: Any, names: Path, slower: float) -> None:
    rehearse = gpu("rehearse")
    found = rehearse.read(names)
    run = rehearse.simulate(found, slower, speed=60.0)
    assert run.seconds < gpu("check").BUDGET + 5
    alone = [job.name for job in found["plans"]["full"][1]]
    assert alone[1] == "time gemma-2-2b steps"
    assert found["items"][alone[1]][0].startswith("step with reuse, package")
    lost = [name for name in run.lost if name in alone]
    assert lost == alone[-len(lost) :], "the last ones, and no other"


def test_half_a_line_is_no_word(gpu: Any) -> None:
    """A process that is killed while it writes: the item has no row yet, and the check goes on."""
    jobs = gpu("jobs")
    script = (
        "import os\n"
        """print('@@ {"begin": "one"}')\n"""
        """print('@@ {"item": "on', end="", flush=True)\n"""
        "os._exit(4)"
    )
    rows: list[dict[str, Any]] = []
    jobs.run(
        jobs.Job("torn", 30.0),
        [sys.executable, "-c", script],
        lambda _, row: rows.append(row),
        time.monotonic() + 60,
    )
    assert rows[0] == {"name": "one", "failed": "the process ended with 4: "}


PACKAGES = {
    "faiss/__init__.py": "raise OSError('libcudart.so.11: cannot open shared object file')",
    "cuvs/__init__.py": "",
    "cuvs/neighbors/__init__.py": "",
    "cuvs/neighbors/brute_force.py": "build = lambda keys: keys\nsearch = lambda index, queries, k: index",
    "pykeops/__init__.py": "",
    "pykeops/torch.py": "import numpy_of_another_year",
    "flash_kmeans/__init__.py": "raise ImportError('undefined symbol')",
}
"""Of others, as they may lie on a machine: one is whole, and one fails only where it is looked into."""


def test_a_contender_that_cannot_be_imported_costs_its_own_row(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    for name, text in PACKAGES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
        monkeypatch.delitem(sys.modules, name.split("/")[0], raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    contenders = gpu("contenders")
    data = gpu("timing").Data("gpt2", 128, "cpu", small=True)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "is_cuda", True)
        found = contenders.contenders(data)
    said = {}
    for name, contender in found.items():
        if "torch.compile" in name:
            continue
        try:
            contender.run()
            said[name] = "right"
        except (ImportError, OSError) as error:
            said[name] = str(error)
    assert said == {
        "cuBLAS products alone": "right",
        "published scheme, eager": "right",
        "flash-kmeans assign": "undefined symbol",
        "flash-kmeans assign, rotated": "undefined symbol",
        "faiss-gpu, one subspace": "libcudart.so.11: cannot open shared object file",
        "cuVS, one subspace": "right",
        "KeOps, one subspace": "No module named 'numpy_of_another_year'",
    }


def test_a_build_that_hangs_is_ended(gpu: Any) -> None:
    """With what it started, which holds its output open."""
    began = time.monotonic()
    status, said = gpu("building").ended(["sh", "-c", "echo compiling; sleep 1000 & sleep 1000"], 1.0)
    assert (status, said) == (-9, "compiling\n")
    assert time.monotonic() - began < 100


@pytest.mark.parametrize(
    ("status", "failed"),
    [
        (0, None),
        (1, "not built: it ended with 1: no such header"),
        (-9, "not built: killed: it hung: no such header"),
    ],
)
def test_what_a_build_says(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, status: int, failed: str | None
) -> None:
    building = gpu("building")
    monkeypatch.setattr(building, "_build", lambda limit: (status, "no such\nheader\n"))
    assert building.build(1.0).get("failed") == failed


@pytest.mark.parametrize("words", [["--tune"], ["--only", "tune"]])
def test_tune_is_a_flag(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    check = gpu("check")
    ran: list[str] = []
    monkeypatch.setattr(check.jobs, "run", lambda job, *_: ran.append(job.name))
    monkeypatch.setattr(check, "machine", lambda device: {"card": "none", "capability": None})
    arguments = ["check.py", "--interpret", *words, "--out", str(tmp_path / "tiles.json")]
    monkeypatch.setattr(sys, "argv", arguments)
    assert check.main() == 0
    assert ran == ["ceilings", "tune gpt2 Q128", "tune gpt2 gradient"]
