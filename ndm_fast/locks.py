"""One process at a time writes into a folder; the system releases the lock when the process dies."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ndm_fast.errors import InputError
from ndm_fast.files import is_leftover, unwritable

logger = logging.getLogger("ndm_fast")

LOCK_FILE = ".lock"
"""Inside the folder that is locked."""

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What file systems without locks say, some shared ones among them."""

_TRIES = 100
"""How often to open a lock file anew; some disks name no file the same twice."""

_PATIENCE = 0.5
"""Seconds until the holder has written who it is."""


class Lock:
    """Holds a folder until :meth:`release`, or until the process ends in whatever way.

    Args:
        folder: which must exist, unless ``file`` is given.
        file: the lock file, where the folder itself is replaced.

    Raises:
        InputError: another process holds it, which is named; or the file cannot be written or recognized.
    """

    def __init__(self, folder: Path, file: Path | None = None) -> None:
        self._file = file or folder / LOCK_FILE
        try:
            descriptor = self._held(folder)
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()} {platform.node()}".encode())
        except OSError as error:
            raise unwritable(self._file, error) from None
        self._descriptor: int | None = descriptor

    def release(self) -> None:
        """Let others in; a second call does nothing."""
        if self._descriptor is not None:
            if self._is_there(self._descriptor):
                self._file.unlink(missing_ok=True)  # before it is let go, or another's file might go
            os.close(self._descriptor)
            self._descriptor = None

    def _held(self, folder: Path) -> int:
        for _ in range(_TRIES):
            descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _holder(descriptor)
                os.close(descriptor)
                raise InputError(
                    f"process {holder} is writing into {folder}: wait until it has ended, or choose another "
                    "folder"
                ) from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                logger.warning("%s is on a disk without locks: let no other process write there", folder)
            # The one before may have removed the file between our two calls.
            if self._is_there(descriptor):
                return descriptor
            os.close(descriptor)
        raise InputError(f"{self._file} is another file whenever it is looked at: choose another folder")

    def _is_there(self, descriptor: int) -> bool:
        with suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(descriptor), os.stat(self._file))
        return False


def is_trace(path: Path) -> bool:
    """Whether a file is what a process leaves that was killed at once: its lock, or a write in the middle."""
    return path.name == LOCK_FILE or is_leftover(path)


def sweep_lock(folder: Path) -> None:
    """Remove the lock of a process that died before it could."""
    if (folder / LOCK_FILE).exists():
        with suppress(InputError):  # it lives, and will
            Lock(folder).release()


@contextmanager
def locked(folder: Path, file: Path | None = None) -> Iterator[None]:
    """A :class:`Lock` for the time of a block."""
    lock = Lock(folder, file)
    try:
        yield
    finally:
        lock.release()


def _holder(descriptor: int) -> str:
    """The process id in a lock file."""
    deadline = time.monotonic() + _PATIENCE
    while not (found := os.pread(descriptor, 300, 0)) and time.monotonic() < deadline:
        time.sleep(0.01)
    process, _, machine = found.decode(errors="replace").partition(" ")
    return (process or "(unknown)") + (f" on {machine}" if machine not in ("", platform.node()) else "")
