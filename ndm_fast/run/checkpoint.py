"""Files that are either whole or not there: atomic writes, and checkpoints with a checksum."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ndm_fast.errors import InputError
from ndm_fast.files import write_atomic

_FORMAT = 1


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
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
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
