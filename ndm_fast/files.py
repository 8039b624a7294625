"""Files that are whole or not there: atomic writes, and what to say of a disk that refuses."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

from ndm_fast.errors import InputError


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
