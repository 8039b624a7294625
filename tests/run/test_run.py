"""Runs on disk: what a killed, stopped or starved run leaves behind, and how it goes on."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import wait_for

from ndm_fast.config import from_flat
from ndm_fast.errors import InputError
from ndm_fast.files import write_json
from ndm_fast.partition import SubspacePartition
from ndm_fast.run.checkpoint import load_checkpoint, save_checkpoint
from ndm_fast.run.folder import RunFolder

pytestmark = pytest.mark.usefixtures("one_thread")

ROTATIONS = {"lie": {"rotation": "lie"}, "exp": {"rotation": "exp", "search_every": 1, "max_steps": 52}}


def events(folder: Path) -> list[dict[str, Any]]:
    """The log without times."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name != "time"} for record in records]


def assert_same_run(found: Path, expected: Path) -> None:
    """Same partition bit for bit, same figures, same log, nothing left over."""
    weights = "partition/partition.safetensors"
    assert (found / weights).read_bytes() == (expected / weights).read_bytes()
    assert json.loads((found / "result.json").read_text()) == json.loads(
        (expected / "result.json").read_text()
    )
    assert events(found) == events(expected)
    assert sorted(p.name for p in found.iterdir()) == sorted(p.name for p in expected.iterdir())


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, train_flags: Callable[..., list[str]], one_thread: None
) -> dict[str, Path]:
    """Folders of runs that nothing happened to."""
    from ndm_fast.cli.main import main

    folders = {}
    for name, changes in ROTATIONS.items():
        folders[name] = tmp_path_factory.mktemp("finished") / name
        assert main(train_flags(folders[name], merging=True, **changes)) == 0
    return folders


def test_the_run_holds_what_these_tests_are_about(finished):
    """Escapes, merges, and more than one filling of the pool."""
    for folder in finished.values():
        log = events(folder)
        assert [e["step"] for e in log if e["event"] == "escape"] == [24, 32]
        assert [e["step"] for e in log if e["event"] == "merge"] == [32, 48]
        assert load_checkpoint(folder / "checkpoint.safetensors")[1]["pool"]["generation"] >= 2


def test_a_run_can_be_read_back(finished, tiny_model, corpus):
    folder = RunFolder(finished["lie"])
    config = folder.config()
    assert config.train.max_steps == 64
    assert config.harvest.site == ("x0.post",)
    made_with = json.loads(folder.config_file.read_text())["made_with"]
    assert made_with["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?|None", str(made_with["commit"]))
    partition, result = folder.partition(), folder.result()
    assert partition.source == {
        "model": str(tiny_model),
        "site": "blocks.0.hook_resid_post",
        "data": str(corpus),
        "harvest": {"context_length": 32},
    }
    assert list(partition.widths) == result["widths"]
    assert (len(partition), partition.width) == (2, 32)
    assert sum(result["variance_share"]) == pytest.approx(1)
    assert result["steps"] == 64
    assert result["orthogonality_error"] < 1e-5
    assert sum(result["heldout_distance"]) / 2 == pytest.approx(result["heldout_loss"], rel=1e-5)
    assert {e["event"] for e in folder.events()} == {"train", "evaluate", "escape", "merge"}
    assert len(folder.events("merge")) == 2


@pytest.mark.parametrize(
    ("rotation", "threads"), [("lie", 1), ("exp", 1), pytest.param("lie", 2, marks=pytest.mark.slow)]
)
def test_killed_runs_end_as_if_nothing_had_happened(driver, train_flags, tmp_path, rotation, threads):
    chance = random.Random(time.time_ns())
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    driver.start(train_flags(whole, merging=True, **ROTATIONS[rotation]), threads)
    assert driver.wait()[0] == 0
    # The first kill hits before any checkpoint, the others some time after a new one.
    watched = ["config.json", *["checkpoint.safetensors"] * 4]
    steps = []
    for number, name in enumerate(watched):
        again = ["train", "--quiet", "--out", str(killed), "--resume"]
        first = train_flags(killed, merging=True, **ROTATIONS[rotation])
        process = driver.start(again if number else first, threads)
        driver.kill_after(process, killed / name, chance.uniform(0, 0.05))
        code, output = driver.wait()
        assert code in (-signal.SIGKILL, 0), output
        if code == 0:
            break
        state = RunFolder(killed).checkpoint()
        steps.append(state[1]["step"] if state else 0)
    assert steps == sorted(steps)
    assert any(0 < step < 52 for step in steps), steps
    driver.start(["train", "--quiet", "--out", str(killed), "--resume"], threads)
    assert driver.wait()[0] == 0
    assert_same_run(killed, whole)


def test_the_command_itself_stops_on_sigterm(train_flags, tmp_path):
    """In a process of its own, from ``python -m ndm_fast`` to its exit code."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "ndm_fast"]
    process = subprocess.Popen(
        [*command, *train_flags(out, merging=True, max_steps=5000)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        wait_for((out / "checkpoint.safetensors").exists)
        process.send_signal(signal.SIGTERM)
        error = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 130
    assert re.fullmatch(
        rf"ndm-fast: stopped at step \d+, state saved: go on with `ndm-fast train --out {out} --resume`\n",
        error,
    )


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_stopping_at_every_checkpoint_changes_nothing(
    ndm, train_flags, tmp_path, finished, monkeypatch, rotation
):
    """Ctrl-C and SIGTERM in turn; each time the message says how to go on, and that is done."""
    out = tmp_path / "run"
    signals = [signal.SIGINT, signal.SIGTERM]
    asked: list[int] = []

    def save_and_signal(*arguments: Any) -> None:
        save_checkpoint(*arguments)
        os.kill(os.getpid(), signals[len(asked) % 2])
        asked.append(1)

    monkeypatch.setattr("ndm_fast.run.recorder.save_checkpoint", save_and_signal)
    command = train_flags(out, merging=True, **ROTATIONS[rotation])
    stops = 0
    handlers = [signal.getsignal(number) for number in signals]
    while (outcome := ndm(*command)).code:
        assert outcome.code == 130
        assert outcome.err.count("\n") == 1
        said = re.search(r"stopped at step (\d+), state saved: go on with `ndm-fast (.*)`", outcome.err)
        assert said
        command = [*said[2].split(), "--quiet"]
        assert not (out / "result.json").exists()
        stops += 1
    assert stops >= 5
    assert [signal.getsignal(number) for number in signals] == handlers
    assert_same_run(out, finished[rotation])


def test_interrupts_before_training_leave_the_run_resumable(
    ndm, train_flags, tmp_path, finished, monkeypatch
):
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ndm_fast.run.site.Trainer", interrupt)
        outcome = ndm(*train_flags(tmp_path / "run", merging=True))
    assert outcome.code == 130
    assert outcome.err.count("\n") == 1
    assert ndm("train", "--quiet", "--out", tmp_path / "run", "--resume").code == 0
    assert_same_run(tmp_path / "run", finished["lie"])


def test_the_log_is_cut_back_to_the_checkpoint(ndm, train_flags, tmp_path, monkeypatch):
    """Lines after the last checkpoint are written once more, also where no line follows for long."""
    sparse = {"log_every": 500, "eval_every": 500, "max_steps": 40}
    assert ndm(*train_flags(tmp_path / "whole", **sparse)).code == 0
    out = tmp_path / "run"
    saved: list[int] = []

    def crash(*arguments: Any) -> None:
        save_checkpoint(*arguments)
        saved.append(1)
        if len(saved) in (1, 2):
            raise InputError("a stand-in for the power going out")

    monkeypatch.setattr("ndm_fast.run.recorder.save_checkpoint", crash)
    assert ndm(*train_flags(out, **sparse)).code == 2
    for _ in range(2):
        with (out / "log.jsonl").open("ab") as log:
            log.write(b'{"event": "train", "step": 99, "loss": 1.0}\n{"event": "tra')
        outcome = ndm("train", "--quiet", "--out", out, "--resume")
    assert outcome.code == 0
    assert len(saved) > 3
    assert b"\0" not in (out / "log.jsonl").read_bytes()
    assert_same_run(out, tmp_path / "whole")


def test_a_lost_log_does_not_stop_a_run(ndm, train_flags, tmp_path, finished):
    out = shutil.copytree(finished["lie"], tmp_path / "run")
    shutil.rmtree(out / "partition")
    (out / "result.json").unlink()
    (out / "log.jsonl").unlink()
    assert ndm("train", "--quiet", "--out", out, "--resume").code == 0
    weights = "partition/partition.safetensors"
    assert (out / weights).read_bytes() == (finished["lie"] / weights).read_bytes()
    assert b"\0" not in (out / "log.jsonl").read_bytes()


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Lets the disk be full from the n-th atomic write on."""

    def begin(writes: int) -> None:
        replace, done = os.replace, []

        def fail(*arguments: Any) -> None:
            done.append(1)
            if len(done) >= writes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            replace(*arguments)

        monkeypatch.setattr(os, "replace", fail)

    return begin


@pytest.mark.parametrize(
    ("writes", "spared"),
    [
        (1, []),
        (2, ["config.json"]),
        (5, ["config.json", "checkpoint.safetensors"]),
        (11, ["checkpoint.safetensors"]),
    ],
)
def test_a_full_disk_loses_nothing(
    ndm, train_flags, tmp_path, finished, full_disk, monkeypatch, writes, spared
):
    """At the settings, the first checkpoint, a later one, and the result."""
    out = tmp_path / "run"
    full_disk(writes)
    said = ndm(*train_flags(out, merging=True)).refusal()
    monkeypatch.undo()
    assert re.search(r"no space left for .*: free some and go on with --resume", said)
    assert all((out / name).exists() for name in spared)
    assert not (out / "result.json").exists()
    assert not list(out.glob("**/.*.tmp"))
    if "checkpoint.safetensors" in spared:
        assert load_checkpoint(out / "checkpoint.safetensors")[1]["step"] >= 16
    assert ndm(*train_flags(out, merging=True), "--resume").code == 0
    assert_same_run(out, finished["lie"])


def test_a_really_full_disk_loses_nothing(ndm, train_flags, tmp_path, finished):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        checkpoint = (finished["lie"] / "checkpoint.safetensors").stat().st_size
        (disk / "filler").write_bytes(bytes(256 * 1024 - 16 * 1024 - int(1.4 * checkpoint)))
        said = ndm(*train_flags(disk / "run", merging=True)).refusal()
        assert re.search(r"no space left for .*: free some and go on with --resume", said)
        assert load_checkpoint(disk / "run" / "checkpoint.safetensors")[1]["step"] >= 8
        (disk / "filler").unlink()
        assert ndm("train", "--quiet", "--out", disk / "run", "--resume").code == 0
        assert_same_run(disk / "run", finished["lie"])
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_resuming_a_finished_run_prints_its_result_again(ndm, finished, files, monkeypatch):
    before = files(finished["lie"])
    monkeypatch.setattr("ndm_fast.run.train.train_one", None)  # nothing is trained
    outcome = ndm("train", "--out", finished["lie"], "--resume")
    assert outcome.code == 0
    assert outcome.err == ""
    assert "blocks.0.hook_resid_post, 64 steps" in outcome.out
    assert "held-out distance" in outcome.out
    assert files(finished["lie"]) == before


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["--keys", "255"], "keys is 256, asked for 255"),
        (["--seed", "1"], "seed is 0, asked for 1"),
        (["--site", "x1.post"], "site is ['x0.post'], asked for ['x1.post']"),
        (["--preset", "gpt2"], "other settings"),
    ],
)
def test_resuming_with_other_settings_is_refused(ndm, finished, files, changes, says):
    before = files(finished["lie"])
    said = ndm("train", "--out", finished["lie"], "--resume", *changes).refusal()
    unloaded = "cannot load model" in said or "JeanKaddour/minipile" in said
    assert says in said or unloaded
    assert "choose another --out" in said or unloaded
    assert files(finished["lie"]) == before


def test_resuming_with_the_same_settings_is_fine(ndm, finished, train_flags):
    assert ndm(*train_flags(finished["lie"], merging=True), "--resume").code == 0


def test_resume_starts_where_there_is_nothing(ndm, train_flags, tmp_path, finished):
    assert ndm(*train_flags(tmp_path / "run", merging=True), "--resume").code == 0
    assert_same_run(tmp_path / "run", finished["lie"])


def test_another_run_is_not_overwritten(ndm, train_flags, finished, files):
    before = files(finished["lie"])
    said = ndm(*train_flags(finished["lie"], merging=True)).refusal()
    assert "holds a run already: pass --resume to go on with it, or another --out" in said
    assert files(finished["lie"]) == before


def occupied(out: Path) -> None:
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (occupied, "exists and is no run of ndm-fast: choose another --out"),
        (lambda out: out.write_text("a file"), "exists and is no run"),
    ],
)
@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_other_things_are_not_overwritten(ndm, train_flags, tmp_path, files, prepare, says, resume):
    prepare(tmp_path / "out")
    before = files(tmp_path)
    assert says in ndm(*train_flags(tmp_path / "out"), *resume).refusal()
    assert files(tmp_path) == before


def test_a_folder_that_cannot_be_made_is_named(ndm, train_flags, tmp_path):
    (tmp_path / "file").write_text("")
    said = ndm(*train_flags(tmp_path / "file" / "run")).refusal()
    assert "cannot write" in said
    assert "check that the folder exists and is yours" in said


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: list[tuple[str, Callable[[Path], object], str]] = [
    ("checkpoint.safetensors", flip, "is damaged .*delete it to start over, or put back a copy"),
    ("checkpoint.safetensors", cut, "is damaged .*delete it to start over"),
    ("checkpoint.safetensors", lambda p: p.write_bytes(b""), "is damaged"),
    ("config.json", cut, "config.json is damaged .*start the run anew in another folder"),
    ("config.json", lambda p: p.write_text("[1]"), "config.json is damaged"),
    ("config.json", lambda p: write_json(p, {"settings": 5}, seal=True), "config.json is damaged"),
    ("config.json", lambda p: p.write_bytes(b"\xff\xfe"), "config.json is damaged"),
    ("config.json", lambda p: write_json(p, {"settings": {"kees": 5}}, seal=True), "unknown setting 'kees'"),
    ("log.jsonl", directory, "cannot write .*log.jsonl"),
]


@pytest.mark.parametrize(("name", "damage", "says"), DAMAGES)
def test_damaged_runs_are_refused_and_left_alone(ndm, tmp_path, finished, files, name, damage, says):
    out = shutil.copytree(finished["lie"], tmp_path / "run")
    shutil.rmtree(out / "partition")
    (out / "result.json").unlink()
    damage(out / name)
    before = files(out)
    assert re.search(says, ndm("train", "--quiet", "--out", out, "--resume").refusal())
    assert files(out) == before


def test_what_a_kill_in_the_middle_of_a_write_leaves_is_removed(ndm, tmp_path, finished):
    out = shutil.copytree(finished["lie"], tmp_path / "run")
    (out / ".checkpoint.safetensors.999999999.tmp").write_bytes(b"half")
    (out / "notes.tmp").write_text("mine")
    assert ndm("train", "--quiet", "--out", out, "--resume").code == 0
    assert {p.name for p in out.glob("*.tmp")} | {p.name for p in out.glob(".*")} == {"notes.tmp"}


def test_a_deleted_checkpoint_starts_the_run_over(ndm, tmp_path, finished):
    out = shutil.copytree(finished["lie"], tmp_path / "run")
    shutil.rmtree(out / "partition")
    (out / "result.json").unlink()
    (out / "checkpoint.safetensors").unlink()
    assert ndm("train", "--quiet", "--out", out, "--resume").code == 0
    assert_same_run(out, finished["lie"])


def test_several_sites_make_a_run_each(ndm, train_flags, tmp_path):
    out = tmp_path / "run"
    outcome = ndm(*train_flags(out, site=["x0.mid", "m1"], max_steps=8))
    assert outcome.code == 0
    names = ["blocks.0.hook_resid_mid", "blocks.1.hook_mlp_out"]
    assert sorted(p.name for p in out.iterdir()) == names
    for name in names:
        assert f"{name}, 8 steps" in outcome.out
        assert RunFolder(out / name).partition().source["site"] == name
    assert ndm("train", "--quiet", "--out", out / names[0], "--resume").code == 0


def test_several_sites_go_on_with_the_same_command(ndm, train_flags, tmp_path, monkeypatch):
    def save_and_stop(*arguments: Any) -> None:
        save_checkpoint(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    command = train_flags(tmp_path / "run", site=["x0.mid", "m1"], max_steps=16, checkpoint_every=4)
    with monkeypatch.context() as patch:
        patch.setattr("ndm_fast.run.recorder.save_checkpoint", save_and_stop)
        stopped = ndm(*command)
    assert stopped.code == 130
    assert "state saved: go on with the same command and --resume" in stopped.err
    assert ndm(*command, "--resume").code == 0
    assert [folder.exists() for folder in (tmp_path / "run").glob("*/result.json")] == [True, True]


def test_a_folder_that_was_removed_gets_no_half_result(finished, tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.begin(from_flat({"model": "m"}), resume=False)
    shutil.rmtree(folder.path)
    done = RunFolder(finished["lie"])
    with pytest.raises(InputError, match="was removed while its run was going on"):
        folder.save_result(done.partition(), done.result())
    folder.end()


def test_runs_that_are_none_or_unfinished_say_so(tmp_path, finished):
    with pytest.raises(InputError, match="is no run of ndm-fast"):
        RunFolder(tmp_path).config()
    with pytest.raises(InputError, match="is no run of ndm-fast"):
        RunFolder(tmp_path).partition()
    with pytest.raises(InputError, match=r"is no run, or has not started"):
        RunFolder(tmp_path).events()
    assert RunFolder(tmp_path).checkpoint() is None
    folder = RunFolder(tmp_path / "new")
    folder.begin(from_flat({"model": "m"}), resume=False)
    with pytest.raises(InputError, match=r"finish it with `ndm-fast train --out .*new --resume`"):
        folder.partition()
    done = RunFolder(shutil.copytree(finished["lie"], tmp_path / "done"))
    done.result_file.write_text('{"steps": ')
    with pytest.raises(InputError, match=r"result\.json is damaged"):
        done.result()
    assert isinstance(done.partition(), SubspacePartition)


def test_a_folder_of_our_own_leftovers_is_ours(ndm, train_flags, tmp_path, finished):
    """Killed while ``config.json`` was written."""
    out = tmp_path / "run"
    out.mkdir()
    (out / ".config.json.999999999.tmp").write_text('{"sett')
    assert ndm(*train_flags(out, merging=True), "--resume").code == 0
    assert_same_run(out, finished["lie"])


def test_leftovers_are_swept_wherever_a_run_writes(ndm, tmp_path, finished):
    out = shutil.copytree(finished["lie"], tmp_path / "run")
    (out / "result.json").unlink()
    for name in ("result.json", "checkpoint.safetensors", "partition/partition.safetensors", "deep/x.png"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).with_name(f".{Path(name).name}.999999999.tmp").write_text("")
    assert ndm("train", "--quiet", "--out", out, "--resume").code == 0
    assert not list(out.rglob("*.tmp"))


def test_other_hidden_files_are_not_ours(ndm, train_flags, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / ".notes.tmp").write_text("mine")
    assert "is no run of ndm-fast" in ndm(*train_flags(out), "--resume").refusal()
    assert (out / ".notes.tmp").read_text() == "mine"
