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


def _tool(folder: Path, name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for one of NVIDIA's tools, under CUDA_HOME."""
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(folder))


RACE = """
echo "========= COMPUTE-SANITIZER"
echo "========= Error: Race reported at project_kernel"
echo "========= RACECHECK SUMMARY: 1 hazard displayed"
exit 9
"""


@pytest.mark.parametrize(
    ("text", "failed"),
    [
        ('echo "========= ERROR SUMMARY: 0 errors"', None),
        (
            RACE,
            "racecheck found: RACECHECK SUMMARY: 1 hazard displayed | Error: Race reported at project_kernel",
        ),
        ("echo Segmentation fault; exit 139", "racecheck ended with 139: Segmentation fault"),
    ],
)
def test_what_compute_sanitizer_says(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, failed: str | None
) -> None:
    tools = gpu("tools")
    _tool(tmp_path, "compute-sanitizer", text, monkeypatch)
    found = [run() for _, run in tools.sanitized("racecheck", small=True)]
    assert len(found) == len(tools.CASES)
    for (row,), case in zip(found, tools.CASES, strict=True):
        assert row["name"] == f"racecheck of {case}"
        assert (row.get("failed") or "").strip() == (failed or "")
        assert row.get("right", False) is (failed is None)


@pytest.mark.parametrize("job", ["sanitizer memcheck", "counters gpt2"])
def test_tools_that_are_not_there_are_named(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    for _, run in gpu("check").items(job, "cpu", small=True):
        with pytest.raises(RuntimeError, match=r"not run: .* is neither on PATH nor under CUDA_HOME"):
            run()


def test_a_tool_that_hangs_costs_its_own_row(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tool is ended with the job's process, and so the next case is begun."""
    jobs = gpu("jobs")
    monkeypatch.setattr(jobs, "START", 20.0)
    once = f"if [ -e {tmp_path}/hung ]; then exit 0; fi; touch {tmp_path}/hung; exec sleep 1000"
    _tool(tmp_path, "compute-sanitizer", once, monkeypatch)
    script = (
        f"import json, sys; sys.path.insert(0, {str(GPU)!r}); import jobs, tools\n"
        "done = set(json.loads(sys.stdin.read()))\n"
        "jobs.work(tools.sanitized('memcheck', True), done, lambda: None)"
    )
    found: dict[str, Any] = {}
    jobs.run(
        jobs.Job("sanitizer memcheck", 2.0),
        [sys.executable, "-c", script],
        lambda _, row: found.update({row["name"]: row.get("failed", "right")}),
        time.monotonic() + 100,
    )
    first, *others = (f"memcheck of {case}" for case in gpu("tools").CASES)
    assert found == {first: "killed: it hung", **dict.fromkeys(others, "right")}


METRICS = '"sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active"'
RAW = f"""==PROF== Connected
"ID","Kernel Name",{METRICS},"smsp__issue_active.avg.pct_of_peak_sustained_active"
"","","%","%"
"0","sweep_kernel","60","1,050.5"
"1","sweep_kernel","62","(n/a)"
"2","look_kernel","n/a","3"
"""
DETAILS = f"""
"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","sweep_kernel(int)",{METRICS},"%","60"
"1","sweep_kernel(int)",{METRICS},"%","62"
"""


def test_counters_of_ncu(gpu: Any) -> None:
    parsed = gpu("tools").parsed
    sweep = {"kernel": "sweep_kernel", "launches": 2, "tensor_active_pct": 61.0}
    assert parsed(RAW.splitlines()) == [
        {**sweep, "issue_active_pct": 1050.5},
        {"kernel": "look_kernel", "launches": 1, "issue_active_pct": 3.0},
    ]
    assert parsed(DETAILS.splitlines()) == [sweep]
    assert parsed(["==ERROR== no permission"]) == []


def test_counters_are_a_row_a_kernel(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = gpu("tools")
    _tool(tmp_path, "ncu", f"cat <<'END'\n{RAW}END", monkeypatch)
    rows = [row for _, run in tools.counted("gpt2", small=True) for row in run()]
    names = ("sweep_kernel", "look_kernel")
    wanted = [f"counters {what} {name}" for what in ("Q4096", "Q128", "gradient") for name in names]
    assert [row["name"] for row in rows] == wanted
    assert rows[0]["said"] == "tensor_active_pct 61.0, issue_active_pct 1050.5"
    _tool(tmp_path, "ncu", "echo ERR_NVGPUCTRPERM; exit 1", monkeypatch)
    for _, run in tools.counted("gpt2", small=True):
        with pytest.raises(RuntimeError, match="ncu ended with 1: ERR_NVGPUCTRPERM"):
            run()


def test_what_matters_comes_first(gpu: Any) -> None:
    check = gpu("check")
    _, alone = check.quick_plan(small=False)
    names = [job.name for job in alone]
    assert names[:4] == ["ceilings", *(f"quick {model}" for model in check.MODELS)]
    assert all("gemma" not in name for name in names[4:])  # whose tiles are known
    checks, alone = check.plan(small=False)
    names = [job.name for job in (*checks, *alone)]
    assert len(names) == len(set(names))
    assert names.index("time gemma-2-2b steps") < names.index("tune gpt2 Q4096")
    first = [name for name, _ in zip(check.items("quick gpt2", "cpu", small=True), range(2), strict=False)]
    assert first[0][0].startswith("step with reuse, package")
    assert first[1][0].startswith("step searching every time")


def test_tiles_that_queries_look_at(gpu: Any) -> None:
    """Counted from the kernels' bounds: one tile at least, and all where every key is as near."""
    pytest.importorskip("triton")
    torch = pytest.importorskip("torch")
    real = gpu("real")
    rows = real.noise(real.real(small=True))
    looked = real.visited(rows)
    assert looked.shape == (len(rows.widths), len(rows.queries))
    assert int(looked.min()) >= 1
    same = rows._replace(keys=rows.keys[:1].repeat(300, 1))
    assert torch.equal(real.visited(same), torch.full_like(looked, 3))


def test_measured_stands_beside_predicted(
    gpu: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = gpu("record").Record(tmp_path / "gpu.json", {"machine": {"capability": None}})
    shape = {"model": "gpt2", "Q": 128, "K": 409600, "d": 768, "width": 32}
    job = "time gpt2 steps"
    name = "step searching every time, in one graph"
    times = {"ms": 2.0, "tflops": 1.0, "gbs": 1.0, "scores_per_s": 6.3e11}
    record.add(job, {"name": name, **times, **shape})
    kernel = {"name": "kernel stream_kernel", "registers": 168, "spills": 0, "blocks_per_sm": 3}
    record.add(job, {**kernel, **shape})
    record.add("other", {**kernel, "registers": 99})
    assert "0.630 T scores/s (predicted 1.77)" in capsys.readouterr().out
    assert json.loads((tmp_path / "gpu.json").read_text())["rows"][0]["predicted_ms"] == 1.77
    (line,) = record.table()
    assert line.endswith("2.000 ms, predicted 1.77, floor - | stream 168/3")
