"""Do two ways of measuring edges agree? Areas under the curve, and correlations of ranks."""

from __future__ import annotations

from math import isnan

import torch
from torch import Tensor

from ndm_fast.errors import InputError
from ndm_fast.evaluate.connections.composition import Scored
from ndm_fast.evaluate.connections.results import Agreement

STRONG = 0.1
"""An edge counts as there where its effect is this share of the largest."""


def area_under_curve(scores: Tensor, true: Tensor) -> float:
    """Chance that a true edge has a higher score than one that is not; ties count half. NaN without either.

    Args:
        scores: [n]. true: [n] bool.

    Raises:
        InputError: they differ in length.
    """
    if scores.shape != true.shape:
        raise InputError(f"{len(scores)} scores for {len(true)} edges: give one each")
    yes, no = scores[true].double(), scores[~true].double()
    if not len(yes) or not len(no):
        return float("nan")
    below = (yes[:, None] > no).double() + 0.5 * (yes[:, None] == no).double()
    return float(below.mean())


def strong(effects: Tensor, share: float = STRONG) -> Tensor:
    """Which effects are at least a share of the largest; both signs count."""
    size = effects.abs()
    return size >= share * size.max()


def rank_correlation(one: Tensor, other: Tensor) -> float:
    """Spearman's; ties get the mean of their ranks."""
    ranks = torch.stack([_ranks(one), _ranks(other)])
    return float(torch.corrcoef(ranks)[0, 1])


def _ranks(values: Tensor) -> Tensor:
    _, place, count = values.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    return (last - (count.double() - 1) / 2)[place]


def rank_of(scores: Tensor, edge: tuple[int, ...]) -> int:
    """Rank of one edge among all, 1 the highest; edges of the same score rank before it."""
    return int((scores >= scores[edge]).sum())


def agreement(reads: Scored, patched: Tensor, attributed: Tensor) -> Agreement:
    """How far weights and attribution agree with path patching, over all edges of a pair of sites.

    Args:
        reads: [...]. patched, attributed: [..., N] drops of N prompts.
    """
    effect = patched.double().mean(-1).flatten().cpu()
    first_order = attributed.double().mean(-1).flatten().cpu()
    there = strong(effect)
    return Agreement(
        weights=_known(area_under_curve(reads.times.flatten(), there)),
        deviations=_known(area_under_curve(reads.deviations.flatten(), there)),
        attribution=_known(area_under_curve(first_order.abs(), there)),
        weights_ranks=_known(rank_correlation(reads.times.flatten(), effect.abs())),
        attribution_ranks=_known(rank_correlation(first_order, effect)),
        edges=len(there),
        found=int(there.sum()),
    )


def _known(value: float) -> float | None:
    return None if isnan(value) else value
