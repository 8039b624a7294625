"""Prompts of uneven length as one padded tensor, and positions counted in each prompt's own tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ndm_fast.errors import InputError

SIDES = ("left", "right")


class Prompts(NamedTuple):
    """N padded prompts of T columns. Rows may be indexed: ``prompts.rows(slice(0, 8))``."""

    tokens: Tensor
    """[N, T] int64."""
    mask: Tensor
    """[N, T] int64, 1 on tokens, 0 on padding."""

    @property
    def lengths(self) -> Tensor:
        """[N] tokens of each prompt."""
        return self.mask.sum(1)

    @property
    def starts(self) -> Tensor:
        """[N] column of each prompt's first token."""
        return self.mask.argmax(1)

    def rows(self, which: slice | Tensor) -> Prompts:
        """Some of the prompts."""
        return Prompts(self.tokens[which], self.mask[which])

    def model_inputs(self) -> dict[str, Tensor]:
        """Arguments of a Hugging Face model; positions count from each prompt's first token."""
        places = (self.mask.cumsum(1) - 1).clamp_min(0)
        return {"input_ids": self.tokens, "attention_mask": self.mask, "position_ids": places}


def pad_prompts(
    prompts: Sequence[Sequence[int]], *, pad: int = 0, side: str = "left", device: torch.device | str = "cpu"
) -> Prompts:
    """Prompts given as token ids, padded to the longest.

    Args:
        pad: id that fills the gaps; it is masked. side: ``"left"`` or ``"right"``.

    Raises:
        InputError: no prompt, an empty one, or an unknown side.
    """
    if side not in SIDES:
        raise InputError(f"padding side {side!r} is unknown: take {' or '.join(SIDES)}")
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise InputError("a prompt is empty, or there is none: give at least one token each")
    longest = max(map(len, prompts))
    tokens = torch.full((len(prompts), longest), pad, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        first = longest - len(prompt) if side == "left" else 0
        tokens[row, first : first + len(prompt)] = torch.as_tensor(prompt)
        mask[row, first : first + len(prompt)] = 1
    return Prompts(tokens.to(device), mask.to(device))


Positions = Sequence[Sequence[int]] | Tensor | None
"""Per prompt some token positions, negative ones from its end; None stands for all tokens."""


def columns_of(prompts: Prompts, positions: Positions) -> tuple[Tensor, Tensor]:
    """Columns of per-prompt positions.

    Args:
        positions: N lists, which may differ in length, or a tensor [N, P].

    Returns:
        columns [N, P] int64, and used [N, P] bool: False where a prompt has fewer positions than another.

    Raises:
        InputError: a number of lists other than N, or a position outside its prompt.
    """
    lengths = prompts.lengths
    if positions is None:
        positions = [range(int(length)) for length in lengths]
    if len(positions) != len(lengths):
        raise InputError(f"{len(positions)} lists of positions for {len(lengths)} prompts: give one for each")
    most = max((len(p) for p in positions), default=0)
    columns = torch.zeros(len(lengths), most, dtype=torch.int64)
    used = torch.zeros(len(lengths), most, dtype=torch.bool)
    for row, (chosen, length) in enumerate(zip(positions, lengths.tolist(), strict=True)):
        places = torch.as_tensor(chosen if isinstance(chosen, Tensor) else list(chosen), dtype=torch.int64)
        wrong = (places < -length) | (places >= length)
        if wrong.any():
            raise InputError(
                f"position {int(places[wrong][0])} is outside prompt {row}, which has {length} tokens: "
                f"give {-length} to {length - 1}"
            )
        columns[row, : len(places)] = places % length
        used[row, : len(places)] = True
    columns = columns.to(prompts.tokens.device) + prompts.starts[:, None]
    return columns, used.to(columns.device)
