"""One process at a time in a folder: the other is told who has it, and a dead one has nothing."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import wait_for

from ndm_fast.errors import InputError
from ndm_fast.locks import LOCK_FILE, Lock, locked, sweep_lock

_HOLDER = """
import sys
from pathlib import Path
from ndm_fast.locks import Lock
lock = Lock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path):
    """Another process that holds ``tmp_path``."""
    command = [sys.executable, "-c", _HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_the_other_process_is_named(tmp_path, holder):
    says = f"process {holder.pid} is writing into {re.escape(str(tmp_path))}: wait until"
    with pytest.raises(InputError, match=says):
        Lock(tmp_path)


def test_a_killed_process_holds_nothing(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / LOCK_FILE).exists()
    with locked(tmp_path):
        assert (tmp_path / LOCK_FILE).read_text() == f"{os.getpid()} {platform.node()}"
    assert list(tmp_path.iterdir()) == []


def test_only_what_a_dead_process_left_is_swept(tmp_path, holder):
    sweep_lock(tmp_path)
    assert (tmp_path / LOCK_FILE).exists()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    sweep_lock(tmp_path)
    assert not (tmp_path / LOCK_FILE).exists()


def test_a_lock_whose_file_was_replaced_is_taken_again(tmp_path):
    """As when the holder removes the file just after it was opened here."""
    first = Lock(tmp_path)
    (tmp_path / LOCK_FILE).unlink()
    second = Lock(tmp_path)
    assert (tmp_path / LOCK_FILE).exists()
    with pytest.raises(InputError, match="is writing into"):
        Lock(tmp_path)
    second.release()
    second.release()
    first.release()
    Lock(tmp_path).release()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_another_file_replaced_is_not_removed(tmp_path):
    lock = Lock(tmp_path)
    (tmp_path / LOCK_FILE).rename(tmp_path / "moved")
    (tmp_path / LOCK_FILE).write_text("77 elsewhere")
    lock.release()
    with (tmp_path / LOCK_FILE).open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="process 77 on elsewhere is writing"):
            Lock(tmp_path)


def test_a_disk_without_locks_is_used_and_named(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path):
        assert "is on a disk without locks" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_names_no_file_twice_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "samestat", lambda one, other: False)
    with pytest.raises(InputError, match="is another file whenever it is looked at: choose another folder"):
        Lock(tmp_path)


def test_a_folder_that_is_gone_is_named(tmp_path):
    with pytest.raises(InputError, match="cannot write"):
        Lock(tmp_path / "away")


def test_a_run_in_use_is_left_alone(ndm, train_flags, tmp_path, files):
    out = tmp_path / "run"
    out.mkdir()
    with locked(out):
        before = files(out)
        for resume in ([], ["--resume"]):
            said = ndm(*train_flags(out, max_steps=8), *resume).refusal()
            assert f"process {os.getpid()} is writing into {out}" in said
        assert files(out) == before
    assert ndm(*train_flags(out, max_steps=8)).code == 0
    assert not (out / LOCK_FILE).exists()


def test_two_runs_in_one_folder_do_not_both_go_on(driver, ndm, train_flags, tmp_path):
    """The second is refused, the first is killed, and then goes on."""
    out, flags = tmp_path / "run", {"max_steps": 100_000, "checkpoint_every": 4, "repeat_data": True}
    process = driver.start(train_flags(out, **flags), 1)
    wait_for((out / "checkpoint.safetensors").exists)
    said = ndm(*train_flags(out, **flags), "--resume").refusal()
    assert said.startswith(f"process {process} is writing into {out}")
    os.kill(process, signal.SIGKILL)
    assert driver.wait()[0] == -signal.SIGKILL
    for file in out.glob("[!.]*"):
        file.unlink()
    (out / ".config.json.999999999.tmp").write_text("half")
    assert (out / LOCK_FILE).exists()  # both are ours, so the folder is free
    assert ndm(*train_flags(out, max_steps=8)).code == 0
    assert not (out / LOCK_FILE).exists()


def test_a_harvest_or_an_index_in_use_is_left_alone(ndm, harvest_flags, train_flags, tmp_path):
    acts, out = tmp_path / "acts", tmp_path / "run"
    acts.mkdir()
    with locked(acts):
        assert f"is writing into {acts}" in ndm(*harvest_flags(acts)).refusal()
    assert ndm(*harvest_flags(acts, rows=300)).code == 0
    assert not (acts / LOCK_FILE).exists()
    assert ndm(*train_flags(out, max_steps=8)).code == 0
    with locked(out / "preimages", out / ".preimages.lock"):
        said = ndm("index", out, "--rows", "200").refusal()
    assert f"is writing into {out / 'preimages'}" in said
    assert ndm("index", out, "--rows", "200").code == 0
    assert not (out / ".preimages.lock").exists()


def test_a_refused_harvest_leaves_no_folder(ndm, harvest_flags, tmp_path):
    assert "free in" in ndm(*harvest_flags(tmp_path / "acts", rows=10**13)).refusal()
    assert not (tmp_path / "acts").exists()
