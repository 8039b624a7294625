"""Leaving local minima: re-initialise a pair of subspaces, keep the result only if it is better."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ndm_fast.geometry.orthogonal import random_rotation
from ndm_fast.seeds import Draw, seeded
from ndm_fast.train.observer import Observer

if TYPE_CHECKING:
    from ndm_fast.train.trainer import Trainer


class Escape:
    """Proposals and verdicts (docs/method.md); the trainer does the steps in between.

    Args:
        seed: which pairs and which rotations are tried.
    """

    def __init__(self, seed: int) -> None:
        self.tried = 0
        self._seed = seed
        self._before: Tensor | None = None
        self._loss = float("nan")
        self._pair: tuple[int, int] | None = None

    @property
    def pending(self) -> bool:
        """Whether a proposal waits for its verdict."""
        return self._pair is not None

    def propose(
        self, matrix: Tensor, widths: Sequence[int], heldout_loss: float, losses: Tensor, information: Tensor
    ) -> Tensor:
        """[d, d] the rotation with the joint space of one pair turned at random.

        Args:
            matrix: [d, d] the rotation to come back to.
            heldout_loss: its loss, to be beaten.
            losses: [S] held-out mean distance; information: [S, S]. A pair is drawn with probability
                proportional to (sum of its losses) x (its mutual information).
        """
        generator = seeded(self._seed, Draw.ESCAPE, self.tried)
        weights = (losses[:, None] + losses).double().cpu() * information.clamp_min(0)
        weights = weights.triu(1).flatten()
        if not weights.sum() > 0:
            weights = torch.ones_like(information).triu(1).flatten()
        drawn = int(torch.multinomial(weights, 1, generator=generator))
        self._pair = divmod(drawn, len(widths))
        self._before, self._loss = matrix.clone(), heldout_loss
        self.tried += 1
        starts = [sum(widths[:s]) for s in range(len(widths))]
        columns = torch.cat([torch.arange(starts[s], starts[s] + widths[s]) for s in self._pair]).to(
            matrix.device
        )
        turned = matrix.clone()
        turned[:, columns] = matrix[:, columns] @ random_rotation(len(columns), generator).to(matrix.device)
        return turned

    def judge(self, matrix: Tensor, heldout_loss: float) -> tuple[Tensor, float, dict[str, Any]]:
        """The better of the two rotations, its held-out loss, and what to log."""
        assert self._before is not None
        kept = heldout_loss < self._loss
        verdict = {"pair": self._pair, "kept": kept, "loss_before": self._loss, "loss_after": heldout_loss}
        better = (matrix, heldout_loss) if kept else (self._before, self._loss)
        self._before = self._pair = None
        return *better, verdict

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain values to go on from."""
        tensors = {} if self._before is None else {"before": self._before}
        return tensors, {"tried": self.tried, "pair": self._pair, "loss": self._loss}

    def load_state_dict(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Go on from a ``state_dict``."""
        self.tried, self._loss = values["tried"], values["loss"]
        self._pair = None if values["pair"] is None else (values["pair"][0], values["pair"][1])
        self._before = tensors.get("before")


def try_escape(trainer: Trainer, observer: Observer) -> None:
    """Keep or undo the last re-initialisation of a pair, then begin another one."""
    escape = trainer.escape
    if escape.pending:
        matrix, trainer.heldout_loss, verdict = escape.judge(trainer.rotation.matrix, trainer.heldout_loss)
        observer.event({"event": "escape", "step": trainer.step, **verdict})
        trainer.go_on_from(matrix, trainer.widths)
    if escape.tried < trainer.config.escape_tries and len(trainer.widths) > 1:
        losses = trainer.evaluate(observer)
        proposed = escape.propose(
            trainer.rotation.matrix, trainer.widths, trainer.heldout_loss, losses, trainer.information()
        )
        trainer.go_on_from(proposed, trainer.widths)
