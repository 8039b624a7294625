"""The paper's toy model of superposition, and its inputs.

Features of one group exclude each other, groups are independent. The model ``ReLU(x W W' + b)`` squeezes
n features into ``dim < n`` dimensions; it gives each group a subspace of its own, as features that never
meet do not disturb each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ndm_fast.errors import InputError
from ndm_fast.seeds import Draw, seeded

SILENT = 0.25
"""Probability that no feature of a group is on."""

_MODELS = 4
"""Trained side by side, of which the best is kept: see the rate."""
_STEPS = 2000
_BATCH = 512
"""Inputs of a step."""
_RATE = 0.1
"""At a rate of 0.01 some groups of unequal size still overlap after 4,000 steps. At 0.1 one model in three
of 24,16,8 -> 12 does, at a higher loss."""


class ToyModel(NamedTuple):
    """A trained model of superposition."""

    weight: Tensor
    """[n, dim] fp32; row i is the direction of feature i."""
    bias: Tensor
    """[n] fp32."""
    loss: float
    """Squared error summed over features, mean over the last batches."""


def sample_features(groups: Sequence[int], rows: int, generator: torch.Generator) -> Tensor:
    """[rows, n] inputs: each group silent with probability 0.25, else one feature uniform in (0, 1].

    Args:
        groups: sizes of the feature groups, sum n.
    """
    parts = []
    for size in groups:
        part = torch.zeros(rows, size)
        value = 1 - torch.rand(rows, 1, generator=generator)
        value *= torch.rand(rows, 1, generator=generator) >= SILENT
        parts.append(part.scatter_(1, torch.randint(size, (rows, 1), generator=generator), value))
    return torch.cat(parts, 1)


def train_toy_model(groups: Sequence[int], dim: int, *, seed: int = 0, steps: int = _STEPS) -> ToyModel:
    """Train ``ReLU(x W W' + b)`` to give back its input: Adam, rate decaying to 0, the best of four models.

    Args:
        groups: sizes of the feature groups. dim: width of the hidden layer.

    Raises:
        InputError: sizes that make no toy model.
    """
    check_sizes(groups, dim)
    start, data = seeded(seed, Draw.TOY_MODEL), seeded(seed, Draw.TOY_DATA)
    weight = (torch.randn(_MODELS, sum(groups), dim, generator=start) / dim**0.5).requires_grad_()
    bias = torch.zeros(_MODELS, 1, sum(groups), requires_grad=True)
    adam = torch.optim.Adam([weight, bias], lr=_RATE)
    decay = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - step / steps)
    recent = torch.zeros(_MODELS)
    for _ in tqdm(range(steps), "toy model", disable=None, leave=False):
        features = sample_features(groups, _BATCH, data)
        losses = (torch.relu(features @ weight @ weight.mT + bias) - features).square().sum(2).mean(1)
        adam.zero_grad()
        losses.sum().backward()
        adam.step()
        decay.step()
        recent.lerp_(losses.detach(), 0.02)  # of some 50 steps
    best = int(recent.argmin())
    return ToyModel(weight[best].detach(), bias[best, 0].detach(), float(recent[best]))


def check_sizes(groups: Sequence[int], dim: int) -> None:
    """Refuse sizes that make no toy model."""
    if not groups or min(groups) < 2:
        raise InputError(f"groups {list(groups)} hold one below 2 features: write for instance 20,20")
    if not 2 <= dim < sum(groups):
        raise InputError(f"dim is {dim}: give at least 2, and fewer than the {sum(groups)} features")
