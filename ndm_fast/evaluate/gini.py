"""How concentrated effects are: the Gini coefficient, in the paper's three normalisations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ndm_fast.errors import InputError

NORMALISATIONS = ("unnormed", "dimension", "variance")
"""Effects as they are, over the subspace's share of the width, over its share of the variance."""


def gini(values: Tensor | Sequence[float]) -> float:
    """``sum_ij |x_i - x_j| / (2 S sum_i x_i)`` of [S] values from 0 up (docs/method.md).

    0 where all are equal, ``1 - 1/S`` where one holds everything; NaN where all are 0, as nothing is shared.

    Raises:
        InputError: no values, or one that is negative or not finite.
    """
    x = torch.as_tensor(values, dtype=torch.float64).cpu()
    if x.ndim != 1 or not len(x) or not bool(((x >= 0) & x.isfinite()).all()):
        raise InputError("a Gini coefficient needs at least one value, all finite and not negative")
    return float((x[:, None] - x).abs().sum() / (2 * len(x) * x.sum()))


def effect_ginis(
    effects: Tensor | Sequence[float], widths: Sequence[int], variances: Tensor | Sequence[float]
) -> dict[str, float]:
    """Gini of ``|effect_s| / share_s`` for each of ``NORMALISATIONS``.

    Args:
        effects: [S] signed effects. widths: [S]. variances: [S] variance in each subspace, above 0.

    Raises:
        InputError: lengths differ, or a share is not above 0.
    """
    size = torch.as_tensor(effects, dtype=torch.float64).cpu().abs()
    shares = {
        "unnormed": torch.ones_like(size),
        "dimension": torch.as_tensor(widths, dtype=torch.float64),
        "variance": torch.as_tensor(variances, dtype=torch.float64).cpu(),
    }
    for name, share in shares.items():
        if share.shape != size.shape:
            raise InputError(f"{len(size)} effects need as many values of {name}, got {len(share)}")
        if not bool((share > 0).all()):
            raise InputError(f"{name} of a subspace is not above 0: leave that subspace out")
    return {name: gini(size / share) for name, share in shares.items()}


def top_share(effects: Tensor | Sequence[float]) -> float:
    """Share of the largest of [S] absolute effects in their sum; NaN where all are 0."""
    size = torch.as_tensor(effects, dtype=torch.float64).abs()
    return float(size.max() / size.sum())
