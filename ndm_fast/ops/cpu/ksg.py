"""Radius and counts of the KSG estimator in C++."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ndm_fast.geometry.centring import inverse_variances, sample_mean
from ndm_fast.ops.cpu.extension import extension, isa, offsets_of
from ndm_fast.ops.cpu.product import rotate_centred


def ksg_radius(
    queries: Tensor,
    keys: Tensor,
    rotation: Tensor,
    widths: Sequence[int],
    variances: Tensor,
    pairs: Tensor,
    *,
    rotated: bool = False,
) -> Tensor:
    """[P, Q] fp32 ``min_k max(D_a, D_b)`` for every pair of subspaces and query.

    Args:
        queries, keys, rotation, widths: as for :func:`nearest_neighbors`.
        rotated: queries and keys are rotated already.
        variances: [S] total variance of each subspace; where it is 0, so are the distances.
        pairs: [P, 2] int64 numbers of subspaces.
    """
    arguments = _ksg_arguments(queries, keys, rotation, widths, variances, pairs, rotated)
    radius = torch.empty(len(pairs), len(queries))
    extension().ksg_radius(*arguments.values, radius.data_ptr())
    return radius


def ksg_counts(
    queries: Tensor,
    keys: Tensor,
    rotation: Tensor,
    widths: Sequence[int],
    variances: Tensor,
    pairs: Tensor,
    radius: Tensor,
    *,
    rotated: bool = False,
) -> Tensor:
    """[P, 2, Q] int64: keys strictly closer than ``radius`` [P, Q], in each subspace of each pair.

    Arguments as for :func:`ksg_radius`, whose result is the radius: both compute the same distances bit for
    bit, so the key that sets a radius is never below it.
    """
    arguments = _ksg_arguments(queries, keys, rotation, widths, variances, pairs, rotated)
    radius = radius.detach().float().contiguous()
    counts = torch.empty(len(pairs), 2, len(queries), dtype=torch.int64)
    extension().ksg_counts(*arguments.values, radius.data_ptr(), counts.data_ptr())
    return counts


def ksg_radius_and_counts(
    queries: Tensor,
    keys: Tensor,
    rotation: Tensor,
    widths: Sequence[int],
    variances: Tensor,
    pairs: Tensor,
    *,
    rotated: bool = False,
) -> tuple[Tensor, Tensor]:
    """The results of :func:`ksg_radius` and :func:`ksg_counts`, bit for bit, from one look at the keys."""
    arguments = _ksg_arguments(queries, keys, rotation, widths, variances, pairs, rotated)
    radius = torch.empty(len(pairs), len(queries))
    counts = torch.empty(len(pairs), 2, len(queries), dtype=torch.int64)
    extension().ksg_radius_and_counts(*arguments.values, radius.data_ptr(), counts.data_ptr())
    return radius, counts


class _KsgArguments(NamedTuple):
    values: tuple[object, ...]
    """What both extension calls begin with."""
    kept: tuple[Tensor, ...]
    """Tensors whose addresses are among the values."""


def _ksg_arguments(
    queries: Tensor,
    keys: Tensor,
    rotation: Tensor,
    widths: Sequence[int],
    variances: Tensor,
    pairs: Tensor,
    rotated: bool,
) -> _KsgArguments:
    rotation, pairs = rotation.detach().contiguous(), pairs.contiguous()
    inverse = inverse_variances(variances)
    if rotated:
        rotated_queries, rotated_keys = (rows.detach().float().contiguous() for rows in (queries, keys))
    else:
        origin = sample_mean(keys.detach())
        rotated_queries = rotate_centred(queries.detach(), rotation, origin)
        rotated_keys = rotate_centred(keys.detach(), rotation, origin)
    values = (
        *(isa(), torch.get_num_threads(), len(queries), len(keys), offsets_of(widths), inverse.data_ptr()),
        *(rotated_queries.data_ptr(), rotated_keys.data_ptr(), len(pairs), pairs.data_ptr()),
    )
    return _KsgArguments(values, (inverse, rotated_queries, rotated_keys, pairs))
