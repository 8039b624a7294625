"""Files that are whole or not there, and checkpoints that know when they are damaged."""

from __future__ import annotations

import errno
import math
import os
import random

import pytest
import torch

from ndm_fast.errors import InputError
from ndm_fast.files import write_atomic
from ndm_fast.run.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

TENSORS = {"matrix": torch.randn(6, 6), "steps": torch.tensor(7), "columns": torch.arange(6)[::2]}
STATE = {
    "step": 7,
    "loss": float("nan"),
    "widths": (4, 2),
    "pool": {"scale": 0.125, "first_batch": 3},
    "pair": None,
}


@pytest.fixture
def path(tmp_path):
    """A good checkpoint."""
    save_checkpoint(tmp_path / "checkpoint.safetensors", Checkpoint(TENSORS, STATE, 5))
    return tmp_path / "checkpoint.safetensors"


def test_a_checkpoint_comes_back_as_it_was(path):
    tensors, state, log_bytes = load_checkpoint(path)
    assert log_bytes == 5
    assert set(tensors) == set(TENSORS)
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert math.isnan(state.pop("loss"))
    assert state == {name: value for name, value in {**STATE, "widths": [4, 2]}.items() if name != "loss"}
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_every_flipped_bit_is_noticed(path):
    content = path.read_bytes()
    unharmed = []
    places = (
        range(len(content))
        if len(content) < 2000
        else sorted(random.Random(0).sample(range(len(content)), 1000))
    )
    for place in places:
        flipped = bytearray(content)
        flipped[place] ^= 1 << (place % 8)
        path.write_bytes(flipped)
        try:
            tensors, state, log_bytes = load_checkpoint(path)
        except InputError:
            continue
        # A change between the JSON words of the header may mean the same: then nothing was lost.
        unharmed.append(place)
        assert log_bytes == 5
        assert str(state) == str({**STATE, "widths": [4, 2]})
        assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert len(unharmed) < len(places) / 20


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.9, 0.999])
def test_truncated_checkpoints_are_refused(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match=r"is damaged .*delete it to start over, or put back a copy"):
        load_checkpoint(path)


@pytest.mark.parametrize("content", [b"hello", b"\xff" * 300, b"{}" * 50, bytes(100)])
def test_other_files_are_refused(path, content):
    path.write_bytes(content)
    with pytest.raises(InputError, match="is damaged"):
        load_checkpoint(path)


def test_other_formats_are_refused(path, monkeypatch):
    monkeypatch.setattr("ndm_fast.run.checkpoint._FORMAT", 3)
    with pytest.raises(InputError, match="has format 2, not 3"):
        load_checkpoint(path)


def test_writing_replaces_the_file_and_nothing_else(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    write_atomic(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("call", "number", "says"),
    [
        ("fsync", errno.ENOSPC, "no space left for .*go on with --resume"),
        ("fsync", errno.EDQUOT, "no space left"),
        ("replace", errno.ENOSPC, "no space left"),
        ("replace", errno.EACCES, "check that the folder exists and is yours"),
    ],
)
def test_the_old_file_survives_a_failure(tmp_path, monkeypatch, call, number, says):
    target = tmp_path / "a"
    target.write_bytes(b"old")

    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(InputError, match=says):
        write_atomic(target, b"new")
    monkeypatch.undo()
    assert target.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match=r"cannot write .*nowhere.*check that the folder exists"):
        write_atomic(tmp_path / "nowhere" / "a", b"x")
