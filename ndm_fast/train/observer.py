"""What a trainer tells while it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ndm_fast.train.trainer import Trainer


class Observer:
    """What a trainer tells while it runs; override what is of interest."""

    def event(self, record: dict[str, Any]) -> None:
        """A line for the log: plain JSON values, ``record["event"]`` says of what kind."""

    def progress(self, trainer: Trainer) -> None:
        """Some steps were taken."""

    def checkpoint(self, trainer: Trainer) -> None:
        """A good moment to save ``trainer.state_dict()``."""

    def stop_requested(self) -> bool:
        """Whether to stop now; the trainer calls :meth:`checkpoint` first."""
        return False
