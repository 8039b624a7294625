"""Files that are whole or not there: atomic writes, checksums, and what to say of a disk that refuses."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ndm_fast.errors import InputError

_SEAL = "sha256"
"""Key of a JSON object's checksum."""

_LONGEST_NAME = 255
"""Bytes of a file's name; file systems take no more."""

_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<process>\d+)\.tmp")


def write_atomic(path: Path, content: bytes) -> None:
    """Replace a file in one step: write beside it, fsync, rename. The old file survives any failure.

    What an earlier process left beside it, when it was killed in the middle, is swept away.

    Raises:
        InputError: the disk is full, or the folder cannot be written to.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        _sweep(path.parent, path.name)
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
        with suppress(OSError):  # the first error says more
            temporary.unlink(missing_ok=True)
        raise unwritable(path, error) from None


def is_leftover(path: Path) -> bool:
    """Whether a file is what :func:`write_atomic` leaves when it is killed in the middle."""
    return _LEFTOVER.fullmatch(path.name) is not None and not path.is_dir()


def sweep(folder: Path) -> None:
    """Delete what killed writes left in a folder and below it."""
    for below, _, _ in os.walk(folder):
        _sweep(Path(below))


def _sweep(folder: Path, name: str | None = None) -> None:
    for leftover in folder.glob(".*.tmp"):
        found = _LEFTOVER.fullmatch(leftover.name)
        if not found or name not in (None, found["name"]):
            continue
        process = int(found["process"])
        if process == os.getpid() or not is_alive(process):  # an earlier one may have had our number
            leftover.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Delete a folder; where a kill comes between, it counts as gone, and a second call deletes the rest.

    Raises:
        OSError: it cannot be deleted.
    """
    gone = folder.with_name(f".{folder.name}.removed")
    if gone.exists():
        shutil.rmtree(gone)
    if folder.exists():
        folder.rename(gone)
        shutil.rmtree(gone)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which becomes ``out`` if all goes well. Killed in the middle, ``out`` is not there.

    What an earlier process left, when it was killed in the middle, is swept away.

    Args:
        out: is not there yet, is empty, or holds the very same files, which then stay.

    Raises:
        InputError: ``out`` holds something else, which stays.
        OSError: the disk is full, or the folder cannot be written to.
    """
    out = out.resolve()
    for leftover in out.parent.glob(f".{glob.escape(out.name)}.*.tmp"):
        found = _LEFTOVER.fullmatch(leftover.name)
        if found and leftover.is_dir() and not is_alive(int(found["process"])):
            shutil.rmtree(leftover)
    filling = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    filling.mkdir(parents=True)
    try:
        yield filling
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            filling.rename(out)
        elif not out.is_dir() or _content(out) != _content(filling):
            raise InputError(f"{out} holds something else: choose another folder, or delete it")
    finally:
        shutil.rmtree(filling, ignore_errors=True)


def _content(folder: Path) -> dict[Path, bytes | None]:
    """Every file by its place, and folders."""
    return {
        path.relative_to(folder): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")
    }


def is_alive(process: int) -> bool:
    """Whether there is a process of this number."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def digest(content: bytes | Path) -> str:
    """SHA-256 of bytes or of a file."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    found = hashlib.sha256()
    with content.open("rb") as file:
        while part := file.read(1 << 20):
            found.update(part)
    return found.hexdigest()


def write_json(path: Path, content: Any, *, seal: bool = False) -> None:
    """Replace a JSON file in one step, see :func:`write_atomic`.

    Args:
        seal: add a checksum to an object, for :func:`read_json`.
    """
    written = sealed(content) if seal else content
    write_atomic(path, (json.dumps(written, indent=2) + "\n").encode())


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with a checksum of what it will be when it is read back."""
    plain = json.loads(json.dumps(content))
    plain.pop(_SEAL, None)
    return {**plain, _SEAL: _checksum(plain)}


def _checksum(content: Any) -> str:
    return digest(json.dumps(content, sort_keys=True).encode())


def read_json(path: Path, shape: Any, *, remedy: str, seal: bool = True) -> Any:
    """What a JSON file holds.

    Args:
        shape: what it has to look like, see :func:`parse_json`.
        remedy: what to do about a damaged file, for the error.
        seal: it was written with a checksum, which is compared and left out.

    Raises:
        FileNotFoundError, NotADirectoryError: there is none.
        InputError: it cannot be read, or is damaged.
    """
    try:
        return parse_json(path.read_bytes(), shape, seal=seal)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}): check that it is a file of yours") from None
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}): {remedy}") from None


def parse_json(content: bytes, shape: Any, *, seal: bool = True) -> Any:
    """JSON of a given shape.

    Args:
        shape: a type (``float`` takes finite numbers alone, ``object`` anything); ``[shape]`` for a list;
            ``{name: shape}`` for an object with at least these names; ``{str: shape}`` for one of any names.
        seal: see :func:`read_json`.

    Raises:
        ValueError: it is no JSON, of another shape, or its checksum does not match.
    """
    try:
        found = json.loads(content.decode("utf-8"))
        if seal:
            _take_seal(found)
        _check_shape(found, shape, "it")
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    return found


def _take_seal(found: Any) -> None:
    if not isinstance(found, dict):
        raise ValueError("it is no object")
    if found.pop(_SEAL, None) != _checksum(found):
        raise ValueError("its checksum does not match")


def _check_shape(found: Any, shape: Any, where: str) -> None:
    if isinstance(shape, list):
        if not isinstance(found, list):
            raise ValueError(f"{where} is no list")
        for item in found:
            _check_shape(item, shape[0], f"a part of {where}")
    elif isinstance(shape, dict):
        if not isinstance(found, dict):
            raise ValueError(f"{where} is no object")
        for name in found if str in shape else shape:
            if name not in found:
                raise ValueError(f"{where} has no {name!r}")
            _check_shape(found[name], shape[str] if str in shape else shape[name], repr(name))
    elif shape is float:
        if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
            raise ValueError(f"{where} is no finite number")
    elif not isinstance(found, shape) or (shape is int and isinstance(found, bool)):
        raise ValueError(f"{where} is no {shape.__name__}")


def check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be made, or written to, before any work is done for it.

    Raises:
        InputError: a name is too long or no UTF-8; the folder, or the one it would be made in, is not ours.
    """
    for name in folder.parts:
        if len(os.fsencode(name)) > _LONGEST_NAME:
            raise InputError(f"{name[:40]}... is longer than {_LONGEST_NAME} bytes: choose a shorter name")
        try:
            name.encode()
        except UnicodeEncodeError:
            raise InputError(f"the name {os.fsencode(name)!r} is no UTF-8: choose another") from None
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    except OSError as error:  # the whole path is too long, or a part of it is not to be entered
        raise unwritable(folder, error) from None
    if not there.is_dir():
        if there != folder:
            raise unwritable(folder, NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)))
        return  # the command says what it expected there
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(
            f"cannot write to {there}, which is read-only: choose another place, or make it yours"
        )


def unwritable(path: Path, error: OSError) -> InputError:
    """The error for a file that could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return InputError(
            f"no space left for {path}: free some and go on with --resume; what was saved before is whole"
        )
    return InputError(f"cannot write {path} ({error.strerror}): check that the folder exists and is yours")
