"""Shadows of rows: a few columns and the length of the rest, which are no farther apart than the rows.

Turning a subspace in itself moves no distance in it. So it is turned to about its principal axes, where the
first columns say most, and a search compares by a part of them first (``csrc/cpu/search_shadow.h``), where
they say enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ndm_fast.geometry.columns import equal_width_runs
from ndm_fast.geometry.precision import full_fp32

_SAMPLE = 512
"""Rows that give the axes, or twice the width: any axes are right, good ones rule out more keys."""

_TURNS = 2
"""Steps of orthogonal iteration. Which axis is which matters little, only what comes first."""

_NARROWEST = 32
"""Mean width, weighted by width, from which shadows pay."""

_QR_COST, _AXES_COST = 25.0, 5.0
"""Products of p^3 that a QR takes as long as, and the search's rate over that of finding axes."""

_TURN_COST = 7.0
"""Operations of the search that turning an element of a copy takes as long as, for every column: its products
are thin, and the copy goes through memory."""

_LOOKING = 0.028
"""Share of a search that may be spent to learn whether shadows save something."""

_COPIED = 3 << 22
"""Elements of a turned copy of keys at most: 48 MB."""

_MOST_SAVED, _LEAST_SAVED = 0.5, -0.04
"""Shares of a full sweep's time that shadows save; the least is what they cost on noise."""


class Axes(NamedTuple):
    turned: Tensor
    """[d, d] fp32 the rotation, each subspace turned to about its principal axes, the largest first."""
    rest: list[float]
    """S shares of a subspace's variance that the second half of its columns has."""


def axes_of(rotation: Tensor, keys: Tensor, origin: Tensor | None, widths: Sequence[int]) -> Axes:
    """About the principal axes of the keys in each subspace.

    Args:
        rotation: [d, d] fp32 orthogonal.
        keys: [K, d] raw; some of them are looked at.
        origin: [d] fp32 subtracted from them; None for the directions from 0, which the cosine compares.
        widths: S widths that sum to d.
    """
    some = keys[:: max(1, len(keys) // _sample(widths))].float()
    if origin is not None:
        some = some - origin
    some = torch.where(some.isfinite().all(1, keepdim=True), some, 0)
    turned, rest = torch.empty_like(rotation), []
    with full_fp32():
        some = some @ rotation
        for subspaces, columns in equal_width_runs(widths):
            width = widths[subspaces.start]
            parts = some[:, columns].unflatten(1, (-1, width)).transpose(0, 1)  # [s, n, p]
            if origin is None:
                parts = torch.nn.functional.normalize(parts, dim=2)
            basis = rotation[:, columns].unflatten(1, (-1, width)).transpose(0, 1)
            moments = (parts.transpose(1, 2) @ parts).double()
            axes = _axes(moments)
            turned[:, columns] = (basis @ axes.float()).transpose(0, 1).flatten(1)
            variances = (moments @ axes * axes).sum(1)
            rest += (variances[:, width // 2 :].sum(1) / variances.sum(1)).nan_to_num(1.0).tolist()
    return Axes(turned, rest)


def _axes(moments: Tensor) -> Tensor:
    """[s, p, p] fp64 orthogonal, about the eigenvectors of [s, p, p] moments, those of the largest first."""
    size = moments.diagonal(dim1=1, dim2=2)
    scaled = moments / size.sum(1).clamp_min(torch.finfo(torch.float64).tiny)[:, None, None]
    order = size.argsort(1, descending=True)
    axes = torch.eye(moments.shape[1], dtype=torch.float64).expand_as(moments)
    axes = axes.gather(2, order[:, None, :].expand_as(moments))
    for _ in range(_TURNS):
        axes = torch.linalg.qr(scaled @ axes).Q
    return axes


def shadow(rows: Tensor, columns: int) -> Tensor:
    """[N, h + 1] the first h columns of [N, p] rows, and the length of the others."""
    rest = torch.linalg.vector_norm(rows[:, columns:], dim=1, keepdim=True)
    return torch.cat([rows[:, :columns], rest], 1)


def pays(queries: int, keys: int, widths: Sequence[int]) -> bool:
    """Whether a search in fp32 may look for axes: what that costs is known, what they save only then."""
    d = sum(widths)
    squares = sum(p**2 for p in widths)
    if squares / d < _NARROWEST:
        return False
    return _axes_cost(widths) < _LOOKING * 2.0 * queries * keys * d


def saved(rest: Sequence[float], widths: Sequence[int]) -> float:
    """Share of a full sweep's time that shadows are expected to save; negative where they cost more.

    Fitted to measured searches of two language models and of noise (docs/kernels-cpu.md): what counts is how
    little of the variance the second half of the columns has. Comparisons weigh more in narrow subspaces.

    Args:
        rest: S shares, as in :class:`Axes`.
    """
    shares = [max(_LEAST_SAVED, 0.54 - 3 * r - 8 / p) for r, p in zip(rest, widths, strict=True)]
    return sum(share * p for share, p in zip(shares, widths, strict=True)) / sum(widths)


def turning_pays(queries: int, keys: int, width: int, share: float | None = None) -> bool:
    """As :func:`pays`, of one subspace whose keys come rotated: all of them are turned anew, into a copy.

    Args:
        share: as :func:`saved` has it. None before axes are known: whether to look.
    """
    if width < _NARROWEST or keys * width > _COPIED:
        return False
    search, axes = 2.0 * queries * keys * width, _axes_cost([width])
    if share is None and axes > _LOOKING * search:
        return False
    turning = _TURN_COST * (queries + keys) * width**2
    return (_MOST_SAVED if share is None else share) * search > axes + turning


def _axes_cost(widths: Sequence[int]) -> float:
    d, squares = sum(widths), sum(p**2 for p in widths)
    cubes = sum(p**3 for p in widths)
    products = 2.0 * _sample(widths) * (d**2 + squares) + 2.0 * d * squares + _TURNS * _QR_COST * cubes
    return _AXES_COST * products


def _sample(widths: Sequence[int]) -> int:
    return max(_SAMPLE, 2 * max(widths))
