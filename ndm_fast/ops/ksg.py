"""Radius and counts of the KSG estimator: check, choose a backend, run it as a ``torch.library`` op."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ndm_fast.errors import InputError
from ndm_fast.geometry import reference
from ndm_fast.ops import backends
from ndm_fast.ops.checks import check_pairs, check_rows

_MODULES = {"cpu": "ops.cpu.ksg", "triton": "kernels.ksg", "cuda": "ops.cuda"}
"""Where each compiled backend has them."""

_QUERIES_AT_ONCE = 16
"""Queries for which the reference backend materialises all distances to the keys."""


def ksg_radius(
    queries: Tensor,
    keys: Tensor,
    rotation: Tensor,
    widths: Sequence[int],
    variances: Tensor,
    pairs: Tensor,
    *,
    rotated: bool = False,
    backend: str | None = None,
) -> Tensor:
    """[P, Q] fp32 ``min_k max(D_a, D_b)`` for every pair of subspaces and query.

    ``D_s`` is the distance in subspace s over the square root of that subspace's total variance.

    Args:
        queries, keys, rotation, widths: as for :func:`nearest_neighbors`.
        variances: [S] total variance of each subspace.
        pairs: [P, 2] int64, two different subspaces each.
        rotated: queries and keys are rotated already.
    """
    check_rows(queries, keys, rotation, widths, True)
    check_pairs(variances, pairs, widths)
    chosen = backends.choose(queries.device, backend).name
    return _ksg_radius(queries, keys, rotation, list(widths), variances, pairs, rotated, chosen)


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
    backend: str | None = None,
) -> Tensor:
    """[P, 2, Q] int64: keys strictly closer than ``radius`` [P, Q], in each subspace of each pair.

    Arguments as for :func:`ksg_radius`; use the same backend for both.
    """
    check_rows(queries, keys, rotation, widths, False)
    check_pairs(variances, pairs, widths)
    if radius.shape != (len(pairs), len(queries)):
        raise InputError(f"radius has shape {list(radius.shape)}: give [P, Q] = {[len(pairs), len(queries)]}")
    chosen = backends.choose(queries.device, backend).name
    return _ksg_counts(queries, keys, rotation, list(widths), variances, pairs, radius, rotated, chosen)


def ksg_radius_and_counts(
    queries: Tensor,
    keys: Tensor,
    rotation: Tensor,
    widths: Sequence[int],
    variances: Tensor,
    pairs: Tensor,
    *,
    rotated: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``radius`` [P, Q] of :func:`ksg_radius` and, for it, ``counts`` [P, 2, Q] of :func:`ksg_counts`.

    Arguments as there; faster than both one after the other where a backend has it in one op.
    """
    check_rows(queries, keys, rotation, widths, True)
    check_pairs(variances, pairs, widths)
    chosen = backends.choose(queries.device, backend).name
    return _ksg_radius_and_counts(queries, keys, rotation, list(widths), variances, pairs, rotated, chosen)


@torch.library.custom_op("ndm_fast::ksg_radius", mutates_args=())
def _ksg_radius(
    queries: Tensor,
    keys: Tensor,
    rotation: Tensor,
    widths: list[int],
    variances: Tensor,
    pairs: Tensor,
    rotated: bool,
    backend: str,
) -> Tensor:
    if backend != "reference":
        return backends.load(_MODULES[backend]).ksg_radius(
            queries, keys, rotation, widths, variances, pairs, rotated=rotated
        )
    parts = queries.split(_QUERIES_AT_ONCE)
    return torch.cat(
        [
            reference.ksg_radius(part, keys, rotation, widths, variances, pairs, rotated=rotated)
            for part in parts
        ],
        dim=1,
    ).float()


@_ksg_radius.register_fake
def _(
    queries: Tensor,
    keys: Tensor,
    rotation: Tensor,
    widths: list[int],
    variances: Tensor,
    pairs: Tensor,
    rotated: bool,
    backend: str,
) -> Tensor:
    return queries.new_empty((pairs.shape[0], queries.shape[0]), dtype=torch.float32)


@torch.library.custom_op("ndm_fast::ksg_counts", mutates_args=())
def _ksg_counts(
    queries: Tensor,
    keys: Tensor,
    rotation: Tensor,
    widths: list[int],
    variances: Tensor,
    pairs: Tensor,
    radius: Tensor,
    rotated: bool,
    backend: str,
) -> Tensor:
    if backend != "reference":
        return backends.load(_MODULES[backend]).ksg_counts(
            queries, keys, rotation, widths, variances, pairs, radius, rotated=rotated
        )
    parts = zip(queries.split(_QUERIES_AT_ONCE), radius.split(_QUERIES_AT_ONCE, dim=1), strict=True)
    return torch.cat(
        [
            reference.ksg_counts(part, keys, rotation, widths, variances, pairs, limit, rotated=rotated)
            for part, limit in parts
        ],
        dim=2,
    )


@_ksg_counts.register_fake
def _(
    queries: Tensor,
    keys: Tensor,
    rotation: Tensor,
    widths: list[int],
    variances: Tensor,
    pairs: Tensor,
    radius: Tensor,
    rotated: bool,
    backend: str,
) -> Tensor:
    return queries.new_empty((pairs.shape[0], 2, queries.shape[0]), dtype=torch.int64)


@torch.library.custom_op("ndm_fast::ksg_radius_and_counts", mutates_args=())
def _ksg_radius_and_counts(
    queries: Tensor,
    keys: Tensor,
    rotation: Tensor,
    widths: list[int],
    variances: Tensor,
    pairs: Tensor,
    rotated: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if backend == "cpu":
        cpu = backends.load(_MODULES["cpu"])
        return cpu.ksg_radius_and_counts(queries, keys, rotation, widths, variances, pairs, rotated=rotated)
    arguments = (queries, keys, rotation, widths, variances, pairs)
    radius = _ksg_radius(*arguments, rotated, backend)
    return radius, _ksg_counts(*arguments, radius, rotated, backend)


@_ksg_radius_and_counts.register_fake
def _(
    queries: Tensor,
    keys: Tensor,
    rotation: Tensor,
    widths: list[int],
    variances: Tensor,
    pairs: Tensor,
    rotated: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    shape = (pairs.shape[0], queries.shape[0])
    radius = queries.new_empty(shape, dtype=torch.float32)
    return radius, queries.new_empty((shape[0], 2, shape[1]), dtype=torch.int64)
