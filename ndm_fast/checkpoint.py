"""Files that are either whole or not there: atomic writes, and checkpoints with a checksum."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ndm_fast.errors import InputError

_FORMAT = 1


def write_atomic(path: Path, content: bytes) -> None:
    """Replace a file in one step: write beside it, fsync, rename. The old file survives any failure.

    Raises:
        InputError: the disk is full, or the folder cannot be written to.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise unwritable(path, error) from None


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file in one step, see :func:`write_atomic`."""
    write_atomic(path, (json.dumps(content, indent=2) + "\n").encode())


def unwritable(path: Path, error: OSError) -> InputError:
    """The error for a file that could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return InputError(
            f"no space left for {path}: free some and go on with --resume; what was saved before is whole"
        )
    return InputError(f"cannot write {path} ({error.strerror}): check that the folder exists and is yours")


def save_checkpoint(path: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write tensors and plain JSON state as one safetensors file with a checksum, atomically."""
    copies = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {"format": str(_FORMAT), "state": json.dumps(state), "sha256": _digest(copies, state)}
    write_atomic(path, save(copies, metadata=header))


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and state of :func:`save_checkpoint`.

    Raises:
        InputError: the file cannot be read, or does not match its checksum.
    """
    remedy = "delete it to start over, or put back a copy"
    try:
        content = path.read_bytes()
        tensors = load(content)
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])["__metadata__"]
        state = json.loads(header["state"])
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise InputError(f"the checkpoint {path} is damaged ({error}): {remedy}") from None
    if header.get("format") != str(_FORMAT):
        raise InputError(f"the checkpoint {path} has format {header.get('format')}, not {_FORMAT}: {remedy}")
    if header.get("sha256") != _digest(tensors, state):
        raise InputError(f"the checkpoint {path} is damaged (its checksum does not match): {remedy}")
    return tensors, state


def _digest(tensors: dict[str, Tensor], state: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(state, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()
