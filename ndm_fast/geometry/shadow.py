"""Shadows of rows: a few columns and the length of the rest, which are no farther apart than the rows.

Turning a subspace in itself moves no distance in it. So it is turned to about its principal axes, where the
first columns say most, and a search compares by a part of them first (``csrc/cpu/search_shadow.h``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ndm_fast.geometry.columns import equal_width_runs
from ndm_fast.geometry.precision import full_fp32

_SAMPLE = 512
"""Rows that give the axes, or twice the width: any axes are right, good ones rule out more keys."""

_TURNS = 2
"""Steps of orthogonal iteration. Which axis is which matters little, only what comes first."""

_NARROWEST, _NARROWEST_HALF = 32, 96
"""Mean width, weighted by width, from which shadows pay; below the second, products in half precision, where
a CPU has them and they will do, save more."""

_SAVED, _QR_COST = 0.25, 25.0
"""Share of the search's products that shadows save, and products of p^3 that a QR takes as long as."""


def turned_to_axes(rotation: Tensor, keys: Tensor, origin: Tensor | None, widths: Sequence[int]) -> Tensor:
    """[d, d] fp32 the rotation, each subspace turned to about the principal axes of its keys, largest first.

    Args:
        rotation: [d, d] fp32 orthogonal.
        keys: [K, d] raw; some of them are looked at.
        origin: [d] fp32 subtracted from them; None for directions from 0.
        widths: S widths that sum to d.
    """
    some = keys[:: max(1, len(keys) // _sample(widths))].float()
    if origin is not None:
        some = some - origin
    some = torch.where(some.isfinite().all(1, keepdim=True), some, 0)
    turned = torch.empty_like(rotation)
    with full_fp32():
        some = some @ rotation
        for subspaces, columns in equal_width_runs(widths):
            width = widths[subspaces.start]
            parts = some[:, columns].unflatten(1, (-1, width)).transpose(0, 1)  # [s, n, p]
            basis = rotation[:, columns].unflatten(1, (-1, width)).transpose(0, 1)
            moments = parts.transpose(1, 2) @ parts
            turned[:, columns] = (basis @ _axes(moments.double()).float()).transpose(0, 1).flatten(1)
    return turned


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


def pays(queries: int, keys: int, widths: Sequence[int], half: bool) -> bool:
    """Whether finding axes and turning to them is expected to cost less than a search then saves.

    Args:
        half: the search would propose in half precision otherwise.
    """
    d = sum(widths)
    squares, cubes = sum(p**2 for p in widths), sum(p**3 for p in widths)
    if squares / d < (_NARROWEST_HALF if half else _NARROWEST):
        return False
    axes = 2.0 * _sample(widths) * (d**2 + squares) + 2.0 * d * squares + _TURNS * _QR_COST * cubes
    return _SAVED * 2.0 * queries * keys * d > axes


def _sample(widths: Sequence[int]) -> int:
    return max(_SAMPLE, 2 * max(widths))
