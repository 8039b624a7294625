"""Curves of a run in other tools: what they are told, that a run outlives them, that a curve goes on as one.

The tools themselves are tried where they are installed: `make test-adapters`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ndm_fast.errors import InputError, StoppedError
from ndm_fast.run.folder import RunFolder
from ndm_fast.run.reporters import TOOLS, Reporter, metrics_of, reporters
from ndm_fast.run.train import train_run

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = {"max_steps": 32, "checkpoint_every": 16, "log_every": 8, "eval_every": 16}


class Told:
    """A reporter that keeps what it is told, and fails where it shall."""

    def __init__(self, fails: str = "") -> None:
        self.fails = fails
        self.calls: list[tuple[Any, ...]] = []

    def _call(self, *call: Any) -> None:
        self.calls.append(call)
        if call[0] == self.fails:
            raise ConnectionError("no route to the dashboard\nand more")

    def begin(self, folder: str, hyperparameters: Mapping[str, Any], step: int) -> None:
        self._call("begin", folder, dict(hyperparameters), step)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self._call("metrics", dict(values), step)

    def finish(self) -> None:
        self._call("finish")

    def points(self) -> list[tuple[int, str, float]]:
        return [(c[2], name, value) for c in self.calls if c[0] == "metrics" for name, value in c[1].items()]


class Stops(Told):
    """Sends SIGTERM once it is told of a step, as a scheduler does."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        super().metrics(values, step)
        if step == 8:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def config(train_flags: Callable[..., list[str]], tmp_path: Path) -> Any:
    from ndm_fast.cli.main import _parser
    from ndm_fast.cli.options import run_settings

    return run_settings(_parser().parse_args(train_flags(tmp_path / "unused", **SHORT)))


def logged(folder: Path) -> list[tuple[int, str, float]]:
    """The points of a run's log."""
    events = RunFolder(folder).events()
    return [(e["step"], name, value) for e in events for name, value in metrics_of(e).items()]


def test_every_point_of_the_log_is_told_once(config: Any, tmp_path: Path) -> None:
    told = Told()
    train_run(config, tmp_path / "run", show_progress=False, report_to=[told])
    assert told.calls[0] == ("begin", str(tmp_path / "run"), config.flat(), 0)
    assert told.calls[-1] == ("finish",)
    assert told.points() == logged(tmp_path / "run")
    names = {name for _, name, _ in told.points()}
    assert {"train/loss", "train/lr", "heldout/loss", "subspaces"} <= names


def test_a_run_that_goes_on_tells_no_step_twice(config: Any, tmp_path: Path) -> None:
    first, second = Stops(), Told()
    with pytest.raises(StoppedError):
        train_run(config, tmp_path / "run", show_progress=False, report_to=[first])
    assert first.calls[-1] == ("finish",)
    train_run(config, tmp_path / "run", resume=True, show_progress=False, report_to=[second])
    begun = second.calls[0][3]
    assert 0 < begun < 32
    assert all(step <= begun for step, _, _ in first.points())
    assert first.points() + second.points() == logged(tmp_path / "run")


@pytest.mark.parametrize("fails", ["begin", "metrics", "finish"])
def test_a_run_outlives_a_reporter_that_fails(
    config: Any, tmp_path: Path, fails: str, capfd: pytest.CaptureFixture[str]
) -> None:
    broken, sound = Told(fails), Told()
    (folder,) = train_run(config, tmp_path / "run", show_progress=False, report_to=[broken, sound])
    assert folder.result()["steps"] == 32
    assert sound.points() == logged(tmp_path / "run")
    assert [call[0] for call in broken.calls].count(fails) == 1  # and is told no more
    assert broken.calls[-1][0] == fails
    said = [line for line in capfd.readouterr().err.splitlines() if "ndm-fast: " in line]
    assert said == [
        "ndm-fast: told takes no more of this run (no route to the dashboard): it goes on without; "
        "log.jsonl has everything"
    ]


def test_reports_change_nothing_of_a_run(config: Any, tmp_path: Path) -> None:
    for name, told in (("with", [Told()]), ("without", [])):
        train_run(config, tmp_path / name, show_progress=False, report_to=told)
    weights = [tmp_path / name / "partition" / "partition.safetensors" for name in ("with", "without")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_each_site_is_a_run_of_its_own(train_flags: Callable[..., list[str]], tmp_path: Path) -> None:
    from ndm_fast.cli.main import _parser
    from ndm_fast.cli.options import run_settings

    flags = train_flags(tmp_path, **SHORT, site=["x0.post", "m1"])
    told = Told()
    train_run(run_settings(_parser().parse_args(flags)), tmp_path / "runs", report_to=[told])
    ends = [call[:2] for call in told.calls if call[0] != "metrics"]
    sites = sorted(path.parent for path in (tmp_path / "runs").rglob("result.json"))
    assert len(sites) == 2
    assert [end[0] for end in ends] == ["begin", "finish"] * 2
    assert sorted(end[1] for end in ends if end[0] == "begin") == [str(site) for site in sites]


@pytest.mark.parametrize("tool", TOOLS)
def test_a_missing_tool_is_one_line_before_the_work(
    tool: str,
    train_flags: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: Any,
    ndm: Callable[..., Any],
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if tool == "tensorboard" else tool, None)
    refused = ndm(*train_flags(tmp_path / "run"), "--report-to", tool).refusal()
    assert refused.startswith(f"--report-to {tool} needs the package {tool}")
    assert refused.endswith(f"pip install 'ndm-fast[{tool}]'")
    assert not (tmp_path / "run").exists()


def test_what_is_no_reporter_is_refused() -> None:
    assert isinstance(Told(), Reporter)
    with pytest.raises(InputError, match="unknown --report-to 'mlflow': take one or more of tensorboard"):
        reporters(["mlflow"])
    with pytest.raises(InputError, match="cannot be reported to: give it begin, metrics and finish"):
        reporters([object()])  # type: ignore[list-item]


def test_what_is_not_finite_is_no_point() -> None:
    assert metrics_of({"event": "train", "step": 8, "loss": float("nan"), "lr": 0.5}) == {"train/lr": 0.5}
    assert metrics_of({"event": "merge_tree", "step": 8}) == {}


class StandIn:
    """A run of W&B or trackio that keeps what it is given."""

    def __init__(self) -> None:
        self.begun: list[dict[str, Any]] = []
        self.points: list[tuple[int, str, float]] = []

    def init(self, **arguments: Any) -> StandIn:
        self.begun.append(arguments)
        return self

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.points += [(step, name, value) for name, value in values.items()]

    def finish(self) -> None:
        pass


@pytest.mark.parametrize("tool", ["trackio", "wandb"])
def test_a_killed_run_goes_on_under_its_name_without_steps_twice(
    tool: str, config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kill: all after the first checkpoint is forgotten by the run, but not by the tool."""
    stand_in, module = StandIn(), ModuleType(tool)
    module.init = stand_in.init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, tool, module)
    run = killed_after_a_checkpoint(config, tmp_path / "run", tool)
    train_run(config, run, resume=True, show_progress=False, report_to=[tool])
    assert stand_in.points == logged(run)
    first, second = stand_in.begun
    assert first == second
    assert first["resume"] == "allow"
    assert first["config"] == config.flat()


def killed_after_a_checkpoint(config: Any, run: Path, tool: str) -> Path:
    """A run that was killed after its step 24, of which step 16 is saved."""
    from ndm_fast.run.recorder import Recorder

    class KilledError(BaseException):
        pass

    def event(self: Recorder, record: dict[str, Any]) -> None:
        original(self, record)
        if record["step"] == 24:
            shutil.copy(run / "checkpoint.safetensors", run.parent / "kept")
            raise KilledError

    original, patch = Recorder.event, pytest.MonkeyPatch()
    patch.setattr(Recorder, "event", event)
    with pytest.raises(KilledError):
        train_run(config, run, show_progress=False, report_to=[tool])
    patch.undo()
    assert (run / "checkpoint.safetensors").read_bytes() == (run.parent / "kept").read_bytes()
    return run


def is_wanted(tool: str) -> bool:
    return tool in os.environ.get("NDM_FAST_ADAPTERS", "") or importlib.util.find_spec(tool) is not None


@pytest.mark.skipif(not is_wanted("tensorboard"), reason="needs tensorboard")
def test_tensorboard_shows_one_curve_of_a_killed_run(config: Any, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = killed_after_a_checkpoint(config, tmp_path / "run", "tensorboard")
    train_run(config, run, resume=True, show_progress=False, report_to=["tensorboard"])
    assert len(list((run / "tensorboard").iterdir())) == 2
    shown = EventAccumulator(str(run / "tensorboard"))
    shown.Reload()
    points = [(p.step, name, p.value) for name in shown.Tags()["scalars"] for p in shown.Scalars(name)]
    expected = sorted(logged(run))
    assert [point[:2] for point in sorted(points)] == [point[:2] for point in expected]
    assert [p[2] for p in sorted(points)] == pytest.approx([p[2] for p in expected], rel=1e-6)
    assert shown.Tags()["tensors"] == ["settings/text_summary"]


@pytest.mark.skipif(not is_wanted("trackio"), reason="needs trackio")
def test_trackio_shows_one_curve_of_a_killed_run(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import trackio
    from trackio import sqlite_storage, utils

    for module in (utils, sqlite_storage, trackio):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio", raising=False)
    run = killed_after_a_checkpoint(config, tmp_path / "run", "trackio")
    train_run(config, run, resume=True, show_progress=False, report_to=["trackio"])
    (base,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(base) as connection:
        found = connection.execute("select run_name, step, metrics from metrics order by id").fetchall()
    points = [(step, name, value) for _, step, row in found for name, value in json.loads(row).items()]
    assert len({name for name, _, _ in found}) == 1
    assert sorted(points) == sorted(logged(run))


@pytest.mark.skipif(not is_wanted("wandb"), reason="needs wandb")
def test_wandb_keeps_one_curve_of_a_killed_run_offline(config: Any, tmp_path: Path) -> None:
    """In processes of their own, as wandb leaves threads behind."""
    program = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from ndm_fast.run.reporters import reporters, Reports
(one,) = reporters(["wandb"])
reports = Reports([one]); reports.begin(sys.argv[1], {{"lr": 0.5}}, int(sys.argv[2]))
for step in range(int(sys.argv[2]) + 8, int(sys.argv[3]) + 1, 8):
    reports.event({{"event": "train", "step": step, "loss": 1.0 / step, "lr": 0.5}})
reports.close()
"""
    for first, last in ((0, 24), (16, 32)):  # killed at 24, the checkpoint at 16
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path), str(first), str(last)],
            env={**os.environ, "WANDB_MODE": "offline"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert "takes no more" not in done.stderr
    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2
    assert len({file.name for file in files}) == 1  # one id
    assert [steps_of(file) for file in files] == [[8, 16, 24], [32]]


def steps_of(file: Path) -> list[int]:
    """Steps in an offline file of W&B, of one block: 7 bytes, then records after sum, size, kind."""
    from wandb.proto import wandb_internal_pb2

    content, at, steps = file.read_bytes(), 7, []
    assert content.startswith(b":W&B")
    assert len(content) < 1 << 15
    while at < len(content):
        _, size, _ = struct.unpack_from("<IHB", content, at)
        record = wandb_internal_pb2.Record()
        record.ParseFromString(content[at + 7 : at + 7 + size])
        at += 7 + size
        if record.WhichOneof("record_type") == "history":
            steps.append(record.history.step.num)
    return steps
