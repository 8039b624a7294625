"""Searches over rows that are dealt out to several ranks; with one rank they are the ops themselves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ndm_fast import ops
from ndm_fast.geometry.reference import Neighbors, distance_to
from ndm_fast.ranks import Ranks

_ROUNDING = 1e-12
"""Relative difference of fp64 distances up to which they count as equal."""


def nearest_neighbors(
    ranks: Ranks,
    queries: Tensor,
    keys: Tensor,
    rotation: Tensor,
    widths: Sequence[int],
    metric: str,
    precision: str,
) -> Neighbors:
    """As ``ops.nearest_neighbors`` among the keys of all ranks, of which ``keys`` are those held here.

    Indices are numbers over all ranks. Each rank's nearest are compared in fp64: of equal keys, of which
    text is full, the lowest number must win, and fp32 distances to equal rows may differ by rounding.
    """
    found = ops.nearest_neighbors(
        queries, keys, rotation, widths, metric=metric, precision=precision, check_finite=False
    )
    if ranks.size == 1:
        return found
    distance = distance_to(queries, keys, rotation, widths, found.index, metric=metric)
    least = ranks.least(distance.clone())
    farther = distance > least + least.abs() * _ROUNDING + _ROUNDING**2
    number = (found.index * ranks.size + ranks.rank).masked_fill_(farther, torch.iinfo(torch.int64).max)
    return Neighbors(least.float(), ranks.least(number))


def ksg_radius_and_counts(
    ranks: Ranks,
    queries: Tensor,
    keys: Tensor,
    rotation: Tensor,
    widths: Sequence[int],
    variances: Tensor,
    pairs: Tensor,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """As ``ops.ksg_radius_and_counts`` over the keys of all ranks; all rows are rotated."""
    rows = (queries, keys, rotation, widths, variances, pairs)
    if ranks.size == 1:
        return ops.ksg_radius_and_counts(*rows, rotated=True, backend=backend)
    radius = ranks.least(ops.ksg_radius(*rows, rotated=True, backend=backend))
    return radius, ranks.sum(ops.ksg_counts(*rows, radius, rotated=True, backend=backend))
