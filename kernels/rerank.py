"""The exact pass over the few keys that ``resolve.py`` kept for each query, or for some of the queries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..geometry.columns import equal_width_runs
from .keys import rounding_of, underflow_errors
from .launch import NO_KEY, aligned, capability, power_of_two
from .queries import Frame, Search
from .tiles import NO_ROW, inverse_norm


@triton.jit
def _operands(
    raw_queries,
    raw_query_stride,
    raw_keys,
    raw_key_stride,
    q,  # [N]
    row,  # [N]
    real,  # [N]
    rotation,
    rotation_stride,
    columns,  # [P]
    inside,  # [P]
    deep,  # [D] coordinates of raw rows
    depth,
    DOUBLE: tl.constexpr,
    COSINE: tl.constexpr,
):
    """[N, D] differences of raw rows (cosine: keys) and [D, P] of the rotation, fp64 or fp32."""
    mask = real[:, None] & (deep < depth)[None, :]
    part = tl.load(raw_keys + row[:, None] * raw_key_stride + deep[None, :], mask=mask, other=0.0)
    part = part.to(tl.float64 if DOUBLE else tl.float32)
    if not COSINE:
        query = tl.load(raw_queries + q[:, None] * raw_query_stride + deep[None, :], mask=mask, other=0.0)
        part = query.to(part.dtype) - part
    basis = tl.load(
        rotation + deep[:, None] * rotation_stride + columns[None, :],
        mask=(deep < depth)[:, None] & inside[None, :],
        other=0.0,
    )
    return part, basis.to(part.dtype)


@triton.jit
def _query(listed, place, count, LISTED: tl.constexpr):
    """[N] int64 numbers of the queries at these places."""
    if LISTED:
        return tl.load(listed + place, mask=place < count, other=0).to(tl.int64)
    return place


@triton.jit(do_not_specialize=["width"], do_not_specialize_on_alignment=["listed_counts"])
def rerank_kernel(
    raw_queries,  # [Q, d]
    raw_query_stride,
    query_count,
    raw_keys,  # [K, d]
    raw_key_stride,
    rotation,  # [d, d] fp32, from the first column of these subspaces on
    rotation_stride,
    depth,
    queries,  # [Q, d] fp64 rotated, COSINE only
    query_stride,
    candidates,  # [S, Q, SLOT_COUNT] int64, -1 for none
    listed,  # [S, Q] int32 the queries to look at, LISTED only
    listed_counts,  # [S] int32 how many of them count
    best,  # [S, Q] fp64: squared distance, or 1 - cos
    index,  # [S, Q] int64
    width,  # in ALIGNED columns
    ALIGNED: tl.constexpr,
    P: tl.constexpr,
    ONE: tl.constexpr,  # the width is at most P
    QUERY_BLOCK: tl.constexpr,
    SLOT_COUNT: tl.constexpr,
    DEPTH_BLOCK: tl.constexpr,
    LISTED: tl.constexpr,
    DOUBLE: tl.constexpr,
    COSINE: tl.constexpr,
):
    """Grid (query blocks, S). The nearest of each query's candidates, from the raw rows.

    Projects ``q - k``, so that what query and key share cancels before it is rounded. Sums over blocks of the
    depth are in fp64; with DOUBLE the products are too.
    """
    width *= ALIGNED  # so triton knows how wide loads may be
    s = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * QUERY_BLOCK
    count = query_count
    if LISTED:
        count = tl.load(listed_counts + s)
        if first >= count:
            return
    entries = tl.arange(0, QUERY_BLOCK * SLOT_COUNT)
    place = first + entries // SLOT_COUNT
    q = _query(listed + s * query_count, place, count, LISTED)
    row = tl.load(
        candidates + (s * query_count + q) * SLOT_COUNT + entries % SLOT_COUNT, mask=place < count, other=-1
    )
    real = row >= 0
    found = tl.zeros([QUERY_BLOCK * SLOT_COUNT], tl.float64)
    query_norm = tl.zeros([QUERY_BLOCK * SLOT_COUNT], tl.float64)
    key_norm = tl.zeros([QUERY_BLOCK * SLOT_COUNT], tl.float64)
    for piece in range(0, P if ONE else width, P):
        columns = piece + tl.arange(0, P)
        inside = columns < width
        total = tl.zeros([QUERY_BLOCK * SLOT_COUNT, P], tl.float64)
        # Carried from one turn to the next: triton 3.6 fails to compile an fp64 product of what it sees was
        # narrower when it was loaded.
        part, basis = _operands(
            raw_queries, raw_query_stride, raw_keys, raw_key_stride, q, row, real, rotation, rotation_stride,
            s * width + columns, inside, tl.arange(0, DEPTH_BLOCK), depth, DOUBLE, COSINE,
        )  # fmt: skip
        for start in range(0, depth, DEPTH_BLOCK):
            if DOUBLE:
                total = tl.dot(part, basis, total, out_dtype=tl.float64)
            else:
                total += tl.dot(part, basis, input_precision="ieee").to(tl.float64)
            part, basis = _operands(
                raw_queries, raw_query_stride, raw_keys, raw_key_stride, q, row, real, rotation,
                rotation_stride, s * width + columns, inside, start + DEPTH_BLOCK + tl.arange(0, DEPTH_BLOCK),
                depth, DOUBLE, COSINE,
            )  # fmt: skip
        if COSINE:
            query = tl.load(
                queries + q[:, None] * query_stride + (s * width + columns)[None, :],
                mask=real[:, None] & inside[None, :],
                other=0.0,
            )
            found += tl.sum(total * query, 1)
            key_norm += tl.sum(total * total, 1)
            query_norm += tl.sum(query * query, 1)
        else:
            found += tl.sum(total * total, 1)
    if COSINE:
        found = 1 - found * inverse_norm(key_norm * query_norm)
    found = tl.where(real & (found == found), found, float("inf"))
    found = tl.reshape(found, [QUERY_BLOCK, SLOT_COUNT])
    row = tl.reshape(row, [QUERY_BLOCK, SLOT_COUNT])
    nearest = tl.min(found, 1)
    chosen = tl.min(tl.where(found == nearest[:, None], row, NO_ROW), 1)
    place = first + tl.arange(0, QUERY_BLOCK)
    q = _query(listed + s * query_count, place, count, LISTED)
    tl.store(best + s * query_count + q, nearest, mask=place < count)
    tl.store(index + s * query_count + q, chosen, mask=place < count)


_TOLERANCE = 1e-2
"""How much farther than the nearest a neighbor may be (docs/method.md)."""


class Listed(NamedTuple):
    """Queries of each subspace that a launch looks at."""

    numbers: Tensor
    """[S, Q] int32, of which the first few count."""
    counts: Tensor
    """[S] int32, how many."""


def rerank(
    frame: Frame,
    keys: Tensor,
    candidates: Tensor,
    widths: Sequence[int],
    search: Search,
    only: Listed | None = None,
) -> tuple[Tensor, Tensor]:
    """Nearest of the candidates [S, Q, slots] by their raw rows: [S, Q] fp64 and its index.

    Args:
        only: leave all other queries unwritten.
    """
    from . import tuning

    best = torch.empty(candidates.shape[:2], dtype=torch.float64, device=keys.device)
    index = torch.empty(candidates.shape[:2], dtype=torch.int64, device=keys.device)
    slots = candidates.shape[2]
    double = search.cosine or capability(keys.device) in tuning.FP64_IS_FAST
    # A depth of 1 is compiled in, leaves no loop, and then triton 3.6 fails (see kernels/rerank.py).
    double &= len(frame.rotation) > 1
    block = tuning.RERANK_ROWS // slots
    for subspaces, columns in equal_width_runs(widths):
        count = subspaces.stop - subspaces.start
        width = (columns.stop - columns.start) // count
        turn, exact = frame.rotation[:, columns], frame.exact[:, columns]
        listed = (index, index) if only is None else (only.numbers[subspaces], only.counts[subspaces])
        rerank_kernel[(-(-len(frame.raw) // block), count)](
            *(frame.raw, frame.raw.stride(0), len(frame.raw), keys, keys.stride(0)),
            *(turn, turn.stride(0), len(turn), exact, exact.stride(0)),
            *(candidates[subspaces], *listed, best[subspaces], index[subspaces], width // aligned(width)),
            ALIGNED=aligned(width), P=power_of_two(min(32, max(16, width))), ONE=width <= 32,
            QUERY_BLOCK=block, SLOT_COUNT=slots, DEPTH_BLOCK=tuning.RERANK_DEPTH,
            LISTED=only is not None, DOUBLE=double, COSINE=search.cosine, num_warps=4, **tuning.OPTIONS,
        )  # fmt: skip
    return best, index


def settle(
    frame: Frame,
    keys: Tensor,
    near: Tensor,
    candidates: Tensor,
    widths: Sequence[int],
    search: Search,
) -> Tensor:
    """[S, Q] the candidate to take, -1 where there is none; raw rows decide only where the copy cannot.

    Rounding moves a key by ``u |x|``, and one at distance r has ``|x| <= |q| + r``; rounding the rotation
    moves a difference of norm D over all columns by about ``u D sqrt(p / d)`` in p of them (errors of random
    signs; twice their size). So the distance by the copy is off from the true one by no more than ``e``, the
    sum of ``u (2 |q| + r)`` and that. Where no other candidate's can be below ``(r + e) / 1.01`` of the
    nearest, that is near enough.

    Args:
        near: [S, Q, slots] fp64 scaled distances by the copy, inf for none; candidates: [S, Q, slots].
    """
    unit, sizes = rounding_of(keys.dtype), _sizes(frame, widths)
    shares = [math.sqrt(width / sum(widths)) for width in widths]
    whole = torch.linalg.vector_norm(sizes, dim=0)
    if search.cosine:  # of unit vectors, both of which the rotation's rounding turns
        turned = torch.stack([2 * share * whole for share in shares]) / sizes
        sizes = torch.ones_like(sizes)
    else:
        apart = whole + torch.maximum(whole, frame.keys.typical_norm)
        scales = frame.keys.scales[:, None]
        turned = torch.stack([share * apart for share in shares]) * scales
        sizes = sizes * scales
    underflow = underflow_errors(frame.keys.scales, widths)[:, None, None]
    error = unit * (2 * sizes[..., None] + near + turned[..., None]) + underflow
    least = near.amin(2, keepdim=True)
    first = torch.where(near == least, candidates, NO_KEY).amin(2)
    farther = 1 + _TOLERANCE
    if search.cosine:  # where ``near`` is the distance of unit vectors, the root of twice 1 - cos
        farther = math.sqrt(farther)
    reach = (near + error).amin(2, keepdim=True) / farther
    rivals = ((near - error < reach) & near.isfinite()).sum(2)
    found = least[..., 0].isfinite()
    unsure = found & (rivals > 1)
    only = _listed(unsure)
    _, decided = rerank(frame, keys, candidates, widths, search, only)
    return torch.where(unsure, decided, torch.where(found, first, -1))


def _sizes(frame: Frame, widths: Sequence[int]) -> Tensor:
    """[S, Q] norms of the centred queries."""
    parts = []
    for subspaces, columns in equal_width_runs(widths):
        run = frame.rotated[:, columns].unflatten(1, (-1, widths[subspaces.start]))
        parts.append(torch.linalg.vector_norm(run, dim=2).T)
    return torch.cat(parts)


def _listed(chosen: Tensor) -> Listed:
    """The chosen of each row, in order; all of it on the device."""
    places = chosen.cumsum(1) - 1
    beyond = chosen.shape[1]
    numbers = torch.zeros(len(chosen), beyond + 1, dtype=torch.int32, device=chosen.device)
    every = torch.arange(beyond, dtype=torch.int32, device=chosen.device).expand_as(chosen)
    numbers.scatter_(1, torch.where(chosen, places, beyond), every)
    return Listed(numbers[:, :-1].contiguous(), chosen.sum(1, dtype=torch.int32))
