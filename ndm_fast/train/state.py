"""What a trainer is made of at one moment, so that another one goes on from there bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ndm_fast.train.trainer import Trainer

State = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors and plain JSON values."""


def state_of(trainer: Trainer) -> State:
    """Everything that :func:`restore` needs."""
    escape_tensors, escape_values = trainer.escape.state_dict()
    tensors = {f"rotation.{name}": value for name, value in trainer.rotation.state_dict().items()}
    tensors |= {f"escape.{name}": value for name, value in escape_tensors.items()}
    values = {
        "step": trainer.step,
        "finished": trainer.finished,
        "widths": list(trainer.widths),
        "merge_threshold": trainer.merger.threshold,
        "train_loss": trainer.train_loss,
        "heldout_loss": trainer.heldout_loss,
        "losses": [float(loss) for loss in trainer.losses],
        "pool": trainer.pool.state_dict(),
        "escape": escape_values,
    }
    return tensors, values


def restore(trainer: Trainer, state: State) -> None:
    """Put a new trainer where the one was that the state is of."""
    tensors, values = state

    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    trainer.step, trainer.finished = values["step"], values["finished"]
    trainer.train_loss, trainer.heldout_loss = values["train_loss"], values["heldout_loss"]
    trainer.losses = [torch.tensor(loss, device=trainer.device) for loss in values["losses"]]
    trainer.merger.threshold = values["merge_threshold"]
    trainer.rotation.load_state_dict(part("rotation."))
    trainer.set_widths(tuple(values["widths"]))
    trainer.escape.load_state_dict(part("escape."), values["escape"])
    left = (trainer.config.max_steps - trainer.step) * trainer.config.queries
    trainer.pool.load_state_dict(values["pool"], queries=left)
