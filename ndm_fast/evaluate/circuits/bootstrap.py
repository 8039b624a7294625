"""How sure is a Gini coefficient? Draw prompts again with replacement, and compute it anew."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ndm_fast.evaluate.gini import NORMALISATIONS
from ndm_fast.seeds import seeded

DRAWS = 1000
"""Bootstrap samples of an interval."""

_LOW, _HIGH = 0.025, 0.975


def gini_intervals(
    effects: Tensor, widths: Sequence[int], variances: Tensor, *, draws: int = DRAWS, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """2.5 and 97.5 % quantiles of the Gini of mean effects over resampled prompts, by normalisation.

    Args:
        effects: [S, N] signed effects of every subspace and prompt.
        widths: [S]. variances: [S] variance in each subspace, above 0.
    """
    means = resampled_means(effects, draws, seed).abs()
    shares = {
        "unnormed": torch.ones(len(widths), dtype=torch.float64),
        "dimension": torch.tensor(widths, dtype=torch.float64),
        "variance": variances.double().cpu(),
    }
    return {name: interval(_ginis(means / shares[name])) for name in NORMALISATIONS}


def resampled_means(effects: Tensor, draws: int, seed: int) -> Tensor:
    """[B, S] fp64 means over prompts drawn with replacement, of [S, N] effects; the same draws for all S."""
    count = effects.shape[1]
    drawn = torch.randint(count, (draws, count), generator=seeded(seed, 31))
    times = torch.zeros(draws, count, dtype=torch.float64)
    times.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    return times @ effects.double().cpu().T / count


def _ginis(values: Tensor) -> Tensor:
    """[B] Gini coefficients of the rows of [B, S] values from 0 up; the same as ``gini`` of each."""
    count = values.shape[1]
    ordered = values.sort(1).values
    # sum_ij |x_i - x_j| = 2 sum_i (2 i - S + 1) x_(i) for ascending x and i from 0.
    weights = 2 * torch.arange(count, dtype=torch.float64) - count + 1
    return (ordered @ weights) / (count * values.sum(1))


def interval(values: Tensor) -> tuple[float, float]:
    """2.5 and 97.5 % quantiles of [B] values; those that are NaN do not count."""
    bounds = torch.tensor([_LOW, _HIGH], dtype=torch.float64)
    low, high = values.nanquantile(bounds).tolist()
    return low, high
