"""The backend ``reference``: the fp64 oracle and torch code, with the arguments and outputs of the ops."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ndm_fast.geometry import reference
from ndm_fast.geometry.centring import rotate_centred, sample_mean
from ndm_fast.geometry.objective import loss_and_gradient
from ndm_fast.geometry.reference import Neighbors, lie_update
from ndm_fast.ops.differentiable import distance_type

__all__ = [
    "ksg_counts",
    "ksg_radius",
    "ksg_radius_and_counts",
    "lie_update",
    "loss_and_gradient",
    "nearest_index",
    "nearest_neighbors",
]

_QUERIES_AT_ONCE = 16
"""Queries for which all distances to the keys are materialised."""


def nearest_neighbors(
    queries: Tensor,
    keys: Tensor,
    rotation: Tensor,
    widths: Sequence[int],
    *,
    metric: str,
    precision: str,
    keys_rotated: bool,
    queries_rotated: bool,
) -> Neighbors:
    """In fp64 whatever the ``precision``, which says the least."""
    form = {"keys_rotated": keys_rotated, "queries_rotated": queries_rotated}
    found = reference.nearest_neighbors(queries, keys, rotation, widths, metric=metric, **form)
    return Neighbors(found.distance.to(distance_type(queries, keys, rotation)), found.index)


def nearest_index(
    queries: Tensor, keys: Tensor, rotation: Tensor, widths: Sequence[int], metric: str, precision: str
) -> Tensor:
    rotated = metric == "euclidean"
    if rotated:
        origin = sample_mean(keys)
        queries, keys = (rotate_centred(rows, rotation, origin) for rows in (queries, keys))
    form = {"keys_rotated": rotated, "queries_rotated": rotated}
    return reference.nearest_neighbors(queries, keys, rotation, widths, metric=metric, **form).index


def ksg_radius(
    queries: Tensor,
    keys: Tensor,
    rotation: Tensor,
    widths: Sequence[int],
    variances: Tensor,
    pairs: Tensor,
    rotated: bool,
) -> Tensor:
    rest = (keys, rotation, widths, variances, pairs)
    parts = [reference.ksg_radius(q, *rest, rotated=rotated) for q in queries.split(_QUERIES_AT_ONCE)]
    return torch.cat(parts, 1).float()


def ksg_counts(
    queries: Tensor,
    keys: Tensor,
    rotation: Tensor,
    widths: Sequence[int],
    variances: Tensor,
    pairs: Tensor,
    radius: Tensor,
    rotated: bool,
) -> Tensor:
    rest = (keys, rotation, widths, variances, pairs)
    blocks = zip(queries.split(_QUERIES_AT_ONCE), radius.split(_QUERIES_AT_ONCE, 1), strict=True)
    return torch.cat([reference.ksg_counts(q, *rest, limit, rotated=rotated) for q, limit in blocks], 2)


def ksg_radius_and_counts(
    queries: Tensor,
    keys: Tensor,
    rotation: Tensor,
    widths: Sequence[int],
    variances: Tensor,
    pairs: Tensor,
    rotated: bool,
) -> tuple[Tensor, Tensor]:
    given = (queries, keys, rotation, widths, variances, pairs)
    radius = ksg_radius(*given, rotated)
    return radius, ksg_counts(*given, radius, rotated)
