"""Distances and reductions of the KSG estimator (Kraskov, Stögbauer & Grassberger 2004, algorithm 1, k = 1).

The distances of a block of queries are written once, [S, Q, K], and both passes read what this one kernel
wrote: so a key that sets a radius is never below it, and a pair costs a maximum and a minimum, not a product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..geometry.centring import inverse_variances, sample_mean
from ..geometry.columns import equal_width_runs
from ..geometry.precision import full_fp32
from .launch import device_of


@triton.jit(do_not_specialize=["width"], do_not_specialize_on_alignment=["inverse_variances"])
def distances_kernel(
    queries,  # [d, Q] fp32 rotated and centred, from the first row of these subspaces on
    query_stride,
    query_count,
    keys,  # [d, K] likewise
    key_stride,
    key_count,
    inverse_variances,  # [S] fp32, 0 for a subspace without variance
    distances,  # [S, Q, K] fp32
    width,
    QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
):
    """Grid (key blocks, query blocks, S). From differences, which do not cancel; scaled after the sum."""
    s = tl.program_id(2).to(tl.int64)
    q = tl.program_id(1).to(tl.int64) * QUERY_BLOCK + tl.arange(0, QUERY_BLOCK)
    k = tl.program_id(0).to(tl.int64) * KEY_BLOCK + tl.arange(0, KEY_BLOCK)
    total = tl.zeros([QUERY_BLOCK, KEY_BLOCK], tl.float32)
    queries += s * width * query_stride
    keys += s * width * key_stride
    for _ in range(width):
        query = tl.load(queries + q, mask=q < query_count, other=0.0)
        key = tl.load(keys + k, mask=k < key_count, other=0.0)
        delta = query[:, None] - key[None, :]
        total += delta * delta
        queries += query_stride
        keys += key_stride
    tl.store(
        distances + (s * query_count + q[:, None]) * key_count + k[None, :],
        tl.sqrt_rn(total * tl.load(inverse_variances + s)),
        mask=(q < query_count)[:, None] & (k < key_count)[None, :],
    )


@triton.jit(do_not_specialize=["query_count"])
def radius_kernel(
    distances,  # [S, Q, K] fp32
    query_count,
    key_count,
    pairs,  # [P, 2] int64
    radius,  # [P, Q] fp32
    KEY_BLOCK: tl.constexpr,
):
    """Grid (P, Q): neighboring blocks share a query, whose distances stay in the caches. NaN stays NaN."""
    pair, q = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    a = distances + (tl.load(pairs + 2 * pair) * query_count + q) * key_count
    b = distances + (tl.load(pairs + 2 * pair + 1) * query_count + q) * key_count
    least = tl.full([KEY_BLOCK], float("inf"), tl.float32)
    for start in range(0, key_count, KEY_BLOCK):
        k = start + tl.arange(0, KEY_BLOCK)
        one = tl.load(a + k, mask=k < key_count, other=float("inf"))
        two = tl.load(b + k, mask=k < key_count, other=float("inf"))
        farther = tl.maximum(one, two, propagate_nan=tl.PropagateNan.ALL)
        least = tl.minimum(least, farther, propagate_nan=tl.PropagateNan.ALL)
    has_nan = tl.sum((least != least).to(tl.int32), 0) > 0
    tl.store(radius + pair * query_count + q, tl.where(has_nan, float("nan"), tl.min(least, 0)))


@triton.jit(do_not_specialize=["query_count"])
def counts_kernel(
    distances,  # [S, Q, K] fp32
    query_count,
    key_count,
    pairs,  # [P, 2] int64
    limits,  # [P, Q] fp32
    counts,  # [P, 2, Q] int64
    KEY_BLOCK: tl.constexpr,
):
    """Grid (P, Q). Keys strictly below the limit, in each subspace of the pair."""
    pair, q = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    a = distances + (tl.load(pairs + 2 * pair) * query_count + q) * key_count
    b = distances + (tl.load(pairs + 2 * pair + 1) * query_count + q) * key_count
    limit = tl.load(limits + pair * query_count + q)
    below_a = tl.zeros([KEY_BLOCK], tl.int32)
    below_b = tl.zeros([KEY_BLOCK], tl.int32)
    for start in range(0, key_count, KEY_BLOCK):
        k = start + tl.arange(0, KEY_BLOCK)
        below_a += (tl.load(a + k, mask=k < key_count, other=float("inf")) < limit).to(tl.int32)
        below_b += (tl.load(b + k, mask=k < key_count, other=float("inf")) < limit).to(tl.int32)
    tl.store(counts + (2 * pair) * query_count + q, tl.sum(below_a, 0).to(tl.int64))
    tl.store(counts + (2 * pair + 1) * query_count + q, tl.sum(below_b, 0).to(tl.int64))


_DISTANCE_BYTES = 1 << 25
"""Distances of the KSG estimate held at once: what a large card's second-level cache holds."""


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
    radius = torch.empty(len(pairs), len(queries), device=queries.device)
    for group, distances in _scaled_distances(queries, keys, rotation, widths, variances, rotated):
        radius[:, group] = _radius(distances, pairs)
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

    Arguments as for :func:`ksg_radius`, whose result is the radius: both read distances made by one kernel,
    so the key that sets a radius is never below it.
    """
    counts = torch.empty(len(pairs), 2, len(queries), dtype=torch.int64, device=queries.device)
    for group, distances in _scaled_distances(queries, keys, rotation, widths, variances, rotated):
        counts[:, :, group] = _counts(distances, pairs, radius[:, group])
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
    """The results of :func:`ksg_radius` and :func:`ksg_counts`, bit for bit, from distances made once."""
    radius = torch.empty(len(pairs), len(queries), device=queries.device)
    counts = torch.empty(len(pairs), 2, len(queries), dtype=torch.int64, device=queries.device)
    for group, distances in _scaled_distances(queries, keys, rotation, widths, variances, rotated):
        part = radius[:, group] = _radius(distances, pairs)
        counts[:, :, group] = _counts(distances, pairs, part)
    return radius, counts


def _radius(distances: Tensor, pairs: Tensor) -> Tensor:
    """[P, q] fp32 of a group of queries."""
    from . import tuning

    radius = torch.empty(len(pairs), distances.shape[1], device=distances.device)
    with device_of(distances):
        radius_kernel[radius.shape](
            *(distances, distances.shape[1], distances.shape[2], pairs.contiguous(), radius),
            **tuning.KSG_REDUCTIONS, **tuning.OPTIONS,
        )  # fmt: skip
    return radius


def _counts(distances: Tensor, pairs: Tensor, radius: Tensor) -> Tensor:
    """[P, 2, q] int64 of a group of queries."""
    from . import tuning

    limits = radius.float().contiguous()
    counts = torch.empty(len(pairs), 2, distances.shape[1], dtype=torch.int64, device=distances.device)
    with device_of(distances):
        counts_kernel[limits.shape](
            *(distances, distances.shape[1], distances.shape[2], pairs.contiguous(), limits, counts),
            **tuning.KSG_REDUCTIONS, **tuning.OPTIONS,
        )  # fmt: skip
    return counts


def _scaled_distances(
    queries: Tensor, keys: Tensor, rotation: Tensor, widths: Sequence[int], variances: Tensor, rotated: bool
) -> Iterator[tuple[slice, Tensor]]:
    """Groups of queries and their [S, q, K] fp32 distances over the root of each subspace's variance."""
    from . import tuning

    origin, turn = sample_mean(keys), rotation.detach().float()
    centred = (rows.detach().float() - origin for rows in (queries, keys))
    with full_fp32():
        query_columns, key_columns = ((rows if rotated else rows @ turn).T.contiguous() for rows in centred)
    inverse = inverse_variances(variances)
    shape = tuning.KSG_DISTANCES
    size = max(1, _DISTANCE_BYTES // (4 * len(widths) * len(keys)))
    for start in range(0, len(queries), size):
        group = slice(start, min(start + size, len(queries)))
        count = group.stop - start
        distances = torch.empty(len(widths), count, len(keys), device=keys.device)
        for subspaces, columns in equal_width_runs(widths):
            run = subspaces.stop - subspaces.start
            part, other = query_columns[columns, group], key_columns[columns]
            with device_of(queries):
                blocks = (-(-len(keys) // shape["KEY_BLOCK"]), -(-count // shape["QUERY_BLOCK"]), run)
                distances_kernel[blocks](
                    *(part, part.stride(0), count, other, other.stride(0), len(keys)),
                    *(inverse[subspaces], distances[subspaces], (columns.stop - columns.start) // run),
                    **shape, **tuning.OPTIONS,
                )  # fmt: skip
        yield group, distances
