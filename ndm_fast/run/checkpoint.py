"""Checkpoints of a run: one file with a checksum, written atomically."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ndm_fast.errors import InputError
from ndm_fast.files import write_atomic
from ndm_fast.train.state import State

_FORMAT = 2


class Checkpoint(NamedTuple):
    """A run at one moment."""

    tensors: dict[str, Tensor]
    """Of the trainer's state."""
    values: dict[str, Any]
    """Of the trainer's state, plain JSON values."""
    log_bytes: int
    """Length of the log at that moment; what was written later is cut off when the run is resumed."""

    @property
    def state(self) -> State:
        """The trainer's state."""
        return self.tensors, self.values


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint as one safetensors file, atomically."""
    copies = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
    record = {"trainer": checkpoint.values, "log_bytes": checkpoint.log_bytes}
    header = {"format": str(_FORMAT), "record": json.dumps(record), "sha256": _digest(copies, record)}
    write_atomic(path, save(copies, metadata=header))


def load_checkpoint(path: Path) -> Checkpoint:
    """What :func:`save_checkpoint` wrote.

    Raises:
        InputError: the file cannot be read, or does not match its checksum.
    """
    remedy = "delete it to start over, or put back a copy"
    try:
        content = path.read_bytes()
        tensors = load(content)
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])["__metadata__"]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"the checkpoint {path} is damaged ({error}): {remedy}") from None
    if header.get("format") != str(_FORMAT):
        raise InputError(f"the checkpoint {path} has format {header.get('format')}, not {_FORMAT}: {remedy}")
    try:
        record = json.loads(header["record"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"the checkpoint {path} is damaged ({error}): {remedy}") from None
    if header.get("sha256") != _digest(tensors, record):
        raise InputError(f"the checkpoint {path} is damaged (its checksum does not match): {remedy}")
    return Checkpoint(tensors, record["trainer"], record["log_bytes"])


def _digest(tensors: dict[str, Tensor], record: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()
