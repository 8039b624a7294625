"""Work done ahead of need: in a thread, on a GPU in a stream of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


class Ahead(Generic[T]):
    """Begins ``work`` at once; :meth:`result` waits for it.

    Args:
        work: gets an event that is set when its result is no longer wanted.
        device: on a GPU, what is queued there so far ends before the work begins, and the work goes on beside
            what is queued later.
    """

    def __init__(self, work: Callable[[threading.Event], T], device: torch.device) -> None:
        self._cancelled = threading.Event()
        self._error: BaseException | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True, name="fill-ahead")
        self._thread.start()

    def result(self) -> T:
        """What ``work`` returned; what it raised is raised here."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._value

    def cancel(self) -> None:
        """Ask the work to end, and wait until it has."""
        self._cancelled.set()
        self._thread.join()

    def _run(self, work: Callable[[threading.Event], T]) -> None:
        stream: AbstractContextManager[Any] = (
            nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        )
        try:
            with stream:
                self._value = work(self._cancelled)
            if self._stream is not None:
                self._stream.synchronize()
        except BaseException as error:
            self._error = error
