"""A trainer and a stream that know what their time went to."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ndm_fast.activations.rows import Stream
from ndm_fast.train.trainer import Observer, Trainer


class TimedStream:
    """A stream with the seconds that making its batches took."""

    def __init__(self, stream: Stream) -> None:
        self.seconds = 0.0
        self._stream = stream

    def batches(self, start: int = 0) -> Iterator[Tensor]:
        """As the stream's own."""
        batches = self._stream.batches(start)
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            self.seconds += time.perf_counter() - began
            if batch is None:
                return
            yield batch


class TimedTrainer(Trainer):
    """A trainer with its seconds by kind of work; ``update`` is a block's time without its search."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        super().__init__(*arguments, **named)

    def train_block(self, steps: int, observer: Observer) -> None:
        self._timed("block", super().train_block, steps, observer)

    def set_widths(self, widths: tuple[int, ...]) -> None:
        super().set_widths(widths)
        neighbors = self.steps.neighbors
        self.steps.neighbors = lambda *rows: self._timed("search", neighbors, *rows)  # type: ignore[method-assign]

    def heldout_distance(self) -> Tensor:
        return self._timed("evaluate", super().heldout_distance)

    def information(self) -> Tensor:
        return self._timed("merge", super().information)

    def _timed(self, name: str, work: Any, *arguments: Any) -> Any:
        began = time.perf_counter()
        result = work(*arguments)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[name] += time.perf_counter() - began
        return result

    def split(self) -> dict[str, float]:
        """Seconds of search, update, evaluate and merge."""
        s = self.seconds
        return {
            "search": s["search"],
            "update": s["block"] - s["search"],
            "evaluate": s["evaluate"],
            "merge": s["merge"],
        }
