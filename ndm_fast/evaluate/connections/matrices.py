"""Linear modules as matrices, and norms as gains: what a model's parts do to a direction of the stream."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ndm_fast.errors import InputError

_LARGE = 1e4
"""Beside which a norm's epsilon is nothing."""


class Gain(NamedTuple):
    """What a norm does to a row, up to the row's own scale: rows times ``centre`` times ``diag(values)``."""

    values: Tensor
    """[d] fp32."""
    centred: bool
    """Whether the mean over coordinates is taken off first, as LayerNorm does."""

    def into(self, weight: Tensor) -> Tensor:
        """[d, c] a matrix that reads the norm's output, as it reads the norm's input."""
        scaled = self.values[:, None] * weight
        return scaled - scaled.mean(0) if self.centred else scaled

    def out_of(self, weight: Tensor) -> Tensor:
        """[c, d] a matrix that writes the norm's input, as it writes the norm's output."""
        centred = weight - weight.mean(1, keepdim=True) if self.centred else weight
        return centred * self.values


def matrix(module: nn.Module) -> Tensor:
    """[in, out] fp32 matrix of a linear module: rows times it, plus the bias, are its output.

    Raises:
        InputError: another kind of module.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise InputError(
            f"{type(module).__name__} is no linear module with a plain weight: load the model without "
            "quantisation or adapters"
        )
    weight = weight.detach().float()
    return weight if isinstance(module, Conv1D) else weight.T


@torch.no_grad()
def gain_of(norm: nn.Module | None, width: int) -> Gain:
    """The gain of a norm, measured on rows; of none, ones.

    Gemma's gain is 1 + weight, others' is the weight: a row of equal entries tells, whatever the family. Root
    mean square norms give it back times the gain, LayerNorm gives its bias.

    Raises:
        InputError: it is neither a LayerNorm nor a root mean square norm.
    """
    if norm is None:
        return Gain(torch.ones(width), centred=False)
    some = next(norm.parameters(), torch.empty(0))
    dtype = some.dtype if some.is_floating_point() else torch.float32
    level = norm.forward(torch.full((1, width), _LARGE, device=some.device, dtype=dtype))[0].float().cpu()
    row = (torch.randn(1, width, generator=torch.Generator().manual_seed(0)) * _LARGE).to(some.device, dtype)
    seen, row = norm.forward(row)[0].float().cpu(), row[0].float().cpu()
    middle = row - row.mean()
    weight = getattr(norm, "weight", None)
    own = torch.ones(width) if weight is None else weight.detach().float().cpu()
    for values, expected, centred in (
        (level, row / row.square().mean().sqrt() * level, False),
        (own, middle / middle.square().mean().sqrt() * own + level, True),
    ):
        if own.shape == level.shape and _same(seen, expected):
            return Gain(values, centred)
    raise InputError(
        f"{type(norm).__name__} is neither a LayerNorm nor a root mean square norm, so what a head reads "
        "through it is not known: take a model of another family"
    )


def _same(seen: Tensor, expected: Tensor) -> bool:
    return bool((seen - expected).abs().max() <= 1e-3 * seen.abs().max().clamp_min(1e-30))
