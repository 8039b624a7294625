"""What a run shows while it goes on: one bar for harvesting or reading, one for training."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from tqdm import tqdm

from ndm_fast.activations.rows import Stream
from ndm_fast.train.trainer import Trainer


class Progress:
    """One bar for all sites of a run, in steps."""

    def __init__(self, sites: int, steps: int, show: bool) -> None:
        self.show = show
        self._sites, self._steps = sites, steps
        self._bar: Any = None
        self._before = 0

    def begin(self, number: int, site: str, step: int) -> None:
        """Site ``number``, from 0, goes on at a step; those before it count as done."""
        self._before = number * self._steps
        if self._bar is None:
            total, done = self._sites * self._steps, self._before + step
            self._bar = tqdm(total=total, initial=done, unit="step", disable=not self.show)
        self._bar.set_description(
            "train" if self._sites == 1 else f"site {number + 1} of {self._sites}, {site}", refresh=False
        )
        self._move(step)

    def update(self, trainer: Trainer) -> None:
        """The site that was begun last has come to the trainer's step."""
        losses = {"loss": trainer.train_loss, "heldout": trainer.heldout_loss}
        shown = {name: f"{loss:.4f}" for name, loss in losses.items() if not math.isnan(loss)}
        self._bar.set_postfix({**shown, "subspaces": len(trainer.widths)}, refresh=False)
        self._move(trainer.step)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()

    def _move(self, step: int) -> None:
        self._bar.update(self._before + step - self._bar.n)


class Counted:
    """A stream that shows how many activations have come through it."""

    def __init__(self, stream: Stream, total: int, doing: str, show: bool) -> None:
        self._stream = stream
        self._bar = tqdm(total=total, desc=doing, unit="activation", unit_scale=True, disable=not show)

    def batches(self, start: int = 0) -> Iterator[Tensor]:
        """Those of the stream."""
        for rows in self._stream.batches(start):
            self._bar.update(len(rows))
            yield rows

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()
