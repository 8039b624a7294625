"""Files: checksums and shapes of JSON, leftovers of killed writes, and places that cannot be written to."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from ndm_fast.errors import InputError
from ndm_fast.files import (
    check_writable,
    digest,
    is_leftover,
    new_folder,
    read_json,
    remove_folder,
    sealed,
    sweep,
    write_atomic,
    write_json,
)

SHAPE = {"steps": int, "loss": float, "widths": [int], "by_name": {str: {"x": float}}, "text": str}
CONTENT = {"steps": 3, "loss": 0.25, "widths": (4, 2), "by_name": {"a": {"x": 1, "y": None}}, "text": "ü"}


def read(path: Path) -> object:
    return read_json(path, SHAPE, remedy="make it anew")


@pytest.fixture
def path(tmp_path):
    write_json(tmp_path / "a.json", CONTENT, seal=True)
    return tmp_path / "a.json"


def test_sealed_json_comes_back_as_it_was(path):
    assert read(path) == {**CONTENT, "widths": [4, 2]}
    write_json(path, json.loads(path.read_text()), seal=True)
    assert read(path) == {**CONTENT, "widths": [4, 2]}


def test_every_flipped_bit_of_sealed_json_is_noticed(path):
    """Or changes nothing that it says."""
    content, before = path.read_bytes(), read(path)
    for place in range(len(content)):
        for bit in range(8):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
            try:
                assert read(path) == before
            except InputError as error:
                said = str(error)
                if not (said.startswith(f"{path} is damaged (") and said.endswith("): make it anew")):
                    raise


WRONG = [
    (b"", "Expecting value"),
    (b"\xff\xfe", "decode"),
    (b"[" * 100_000, "nested too deep"),
    (b"[]", "no object"),
    (b"\0" * 300, "Expecting value"),
    ({**CONTENT, "steps": "3"}, "'steps' is no int"),
    ({**CONTENT, "steps": True}, "'steps' is no int"),
    ({**CONTENT, "loss": float("nan")}, "'loss' is no finite number"),
    ({**CONTENT, "loss": False}, "'loss' is no finite number"),
    ({**CONTENT, "widths": [4, None]}, "a part of 'widths' is no int"),
    ({**CONTENT, "widths": 4}, "'widths' is no list"),
    ({**CONTENT, "by_name": {"a": {}}}, "'a' has no 'x'"),
    ({**CONTENT, "by_name": {"a": 5}}, "'a' is no object"),
    ({n: v for n, v in CONTENT.items() if n != "text"}, "it has no 'text'"),
]


@pytest.mark.parametrize(("content", "says"), WRONG, ids=range(len(WRONG)))
def test_json_of_another_shape_is_refused_in_one_line(tmp_path, content, says):
    path = tmp_path / "a.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(sealed(content)).encode())
    with pytest.raises(InputError, match=says) as refusal:
        read(path)
    assert "\n" not in str(refusal.value)


def test_a_json_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"cannot read .*folder \(Is a directory\)"):
        read(tmp_path / "folder")
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none")


def test_a_digest_is_of_bytes_or_of_a_file(tmp_path):
    content = random.Random(0).randbytes(3 << 20)
    (tmp_path / "a").write_bytes(content)
    assert digest(tmp_path / "a") == digest(content) != digest(content[:-1])


def ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_leftovers_are_swept_but_not_those_of_a_process_at_work(tmp_path):
    (tmp_path / "below").mkdir()
    dead, alive = ended_process(), os.getppid()
    gone = [tmp_path / f".a.json.{dead}.tmp", tmp_path / "below" / f".b.{os.getpid()}.tmp"]
    kept = [tmp_path / f".a.json.{alive}.tmp", tmp_path / ".notes.tmp", tmp_path / "a.json.5.tmp"]
    for path in gone + kept:
        path.write_text("")
    assert [is_leftover(path) for path in gone + kept] == [True, True, True, False, False]
    sweep(tmp_path)
    assert [path.exists() for path in gone + kept] == [False, False, True, True, True]


def test_a_write_sweeps_what_was_left_of_the_same_file(tmp_path):
    dead = ended_process()
    for name in ("a.json", "b.json"):
        (tmp_path / f".{name}.{dead}.tmp").write_text("")
    write_atomic(tmp_path / "a.json", b"{}")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".b.json.{dead}.tmp", "a.json"]


def test_places_that_cannot_be_written_to(tmp_path, monkeypatch):
    check_writable(tmp_path / "new" / "deeper")
    check_writable(Path("new"))
    (tmp_path / "file").write_text("")
    for place, says in (
        (tmp_path / ("x" * 256), "longer than 255 bytes"),
        (tmp_path / ("ü" * 128), "longer than 255 bytes"),
        (tmp_path / os.fsdecode(b"caf\xe9"), "is no UTF-8"),
        (tmp_path / "file" / "run", "Not a directory"),
        (Path("/" + "x/" * 3000), "cannot write"),
    ):
        with pytest.raises(InputError, match=says) as refusal:
            check_writable(place)
        assert len(str(refusal.value)) < 7000
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(InputError, match="which is read-only"):
        check_writable(tmp_path / "new")


def test_an_error_of_the_disk_is_one_line(tmp_path, monkeypatch):
    def full(*given: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="no space left"):
        write_atomic(tmp_path / "a", b"")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_removed_is_gone_at_once(tmp_path, monkeypatch):
    folder = tmp_path / "activations"
    folder.mkdir()
    (folder / "shard").write_bytes(b"x")
    with monkeypatch.context() as stopped:
        stopped.setattr("ndm_fast.files.shutil.rmtree", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            remove_folder(folder)
    assert not folder.exists()
    remove_folder(folder)
    assert list(tmp_path.iterdir()) == []


def test_a_new_folder_is_there_whole_or_not_at_all(tmp_path):
    def half(folder: Path) -> None:
        (folder / "a").write_text("half")
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), new_folder(out) as filling:
        half(filling)
    assert list(tmp_path.iterdir()) == []
    killed, at_work = (tmp_path / f".out.{process}.tmp" for process in (ended_process(), os.getppid()))
    for folder in (killed, at_work, out):
        folder.mkdir()
    with new_folder(out) as filling:
        (filling / "a").write_text("whole")
        assert list(out.iterdir()) == []
    assert (out / "a").read_text() == "whole"
    with new_folder(out) as filling:
        (filling / "a").write_text("whole")
    with pytest.raises(InputError, match="holds something else"), new_folder(out) as filling:
        (filling / "a").write_text("other")
    assert (out / "a").read_text() == "whole"
    assert sorted(tmp_path.iterdir()) == sorted([at_work, out])
