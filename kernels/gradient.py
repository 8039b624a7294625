"""Loss and gradient for given neighbors, euclidean (docs/method.md), in two kernels.

With ``delta = q - n_s(q)`` and ``r = delta R_s``:

    loss_s = 1/Q sum_q |r|        dL/dR_s = 1/(S Q) sum_q delta' r / |r|

or, where ``LOG``, of the logarithm with a floor ``f_s``: ``loss_s = 1/Q sum_q log sqrt(|r|^2 + f_s^2)``,
``dL/dR_s = p_s/(d Q) sum_q delta' r / (|r|^2 + f_s^2)``.

:func:`project_kernel` writes r, [Q, d], and for each piece of a subspace its part of ``|r|^2``;
:func:`gradient_kernel` makes tiles of the gradient, each summed over all queries by one block, in order: no
atomics, so that two runs agree bit for bit. Neighbors are gathered by both, never stored: the second time
they come from the L2 cache (GPT-2 5 MB, Gemma 19 MB in half precision). Differences, sums and products are in
fp32: tf32 keeps 10 bits of a difference, and one coordinate of 1e3 would round off all that the others say.

Both work on pieces: up to ``COLUMNS`` columns of one subspace, numbered through all subspaces. A table says
where each lies, so one launch serves any widths, and wide subspaces fill the card like narrow ones.

Limit: ``4 Q d^2`` operations (GPT-2 0.30, Qwen 1.2, Gemma 2.7 GFLOP, there 4/3 of it, because 72 columns take
96) on the fp32 units, 67 TFLOP/s on an H200, of which staging operands through shared memory should leave a
quarter; bytes from memory, ``S Q d`` halves and two times ``d^2`` floats, would take a tenth of that.
docs/kernels-gpu.md has the predicted times.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..geometry import objective
from ..geometry.columns import unit_columns
from ..geometry.objective import Objective
from .launch import device_of

if TYPE_CHECKING:
    from .tuning import Gradient


@triton.jit
def _neighbors(
    index,
    index_stride,
    index_step,
    counted,
    counted_stride,
    counted_step,
    s,
    q,  # [N] int64
    query_count,
    COUNTED: tl.constexpr,
):
    """Rows of the keys, [N] int64, and which of them contribute."""
    real = q < query_count
    if COUNTED:
        real &= tl.load(counted + s * counted_stride + q * counted_step, mask=real, other=0) != 0
    return tl.load(index + s * index_stride + q * index_step, mask=real, other=0), real


@triton.jit
def _differences(queries, query_stride, keys, key_stride, q, row, real, deep, depth):
    """[N, D] fp32 queries minus their neighbors; 0 where there is none."""
    mask = real[:, None] & (deep < depth)[None, :]
    query = tl.load(queries + q[:, None] * query_stride + deep[None, :], mask=mask, other=0.0)
    key = tl.load(keys + row[:, None] * key_stride + deep[None, :], mask=mask, other=0.0)
    return query.to(tl.float32) - key.to(tl.float32)


@triton.jit
def project_kernel(
    queries,  # [Q, d] fp32, fp16 or bf16
    query_stride,
    query_count,
    keys,  # [K, d] likewise
    key_stride,
    index,  # [S, Q] int64
    index_stride,
    index_step,
    counted,  # [S, Q] bool, COUNTED only
    counted_stride,
    counted_step,
    pieces,  # [N, 5] int32: subspace, first column, columns, first piece of that subspace, how many it has
    rotation,  # [d, d] fp32
    rotation_stride,
    depth,
    projected,  # [Q, d] fp32
    squares,  # [N, Q] fp32
    COLUMNS: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    DEPTH_BLOCK: tl.constexpr,
    COUNTED: tl.constexpr,
    DOT: tl.constexpr,
):
    """Grid (query blocks, pieces): a block of queries times the piece's columns, over all of the depth."""
    q = tl.program_id(0).to(tl.int64) * QUERY_BLOCK + tl.arange(0, QUERY_BLOCK)
    piece = tl.program_id(1)
    s = tl.load(pieces + 5 * piece).to(tl.int64)
    columns = tl.load(pieces + 5 * piece + 1) + tl.arange(0, COLUMNS)
    inside = tl.arange(0, COLUMNS) < tl.load(pieces + 5 * piece + 2)
    row, real = _neighbors(
        index, index_stride, index_step, counted, counted_stride, counted_step, s, q, query_count, COUNTED
    )
    total = tl.zeros([QUERY_BLOCK, COLUMNS], tl.float32)
    for start in range(0, depth, DEPTH_BLOCK):
        deep = start + tl.arange(0, DEPTH_BLOCK)
        delta = _differences(queries, query_stride, keys, key_stride, q, row, real, deep, depth)
        basis = tl.load(
            rotation + deep[:, None] * rotation_stride + columns[None, :],
            mask=(deep < depth)[:, None] & inside[None, :],
            other=0.0,
        )
        total = tl.dot(delta, basis, total, input_precision=DOT)
    there = q < query_count
    tl.store(projected + q[:, None] * depth + columns[None, :], total, mask=there[:, None] & inside[None, :])
    tl.store(squares + piece.to(tl.int64) * query_count + q, tl.sum(total * total, 1), mask=there)


@triton.jit
def gradient_kernel(
    queries,
    query_stride,
    query_count,
    keys,
    key_stride,
    index,
    index_stride,
    index_step,
    counted,
    counted_stride,
    counted_step,
    pieces,
    projected,
    squares,
    depth,
    losses,  # [S] fp32
    gradient,  # [d, d] fp32
    query_share,  # 1/Q
    share,  # 1/(S Q), or 1/(d Q) where LOG
    log_floor,  # [S] fp32, LOG only
    sizes,  # [S] fp32 widths, LOG only
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,  # pieces of a subspace at most, as a power of two
    ROWS: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    COUNTED: tl.constexpr,
    LOG: tl.constexpr,
    DOT: tl.constexpr,
):
    """Grid (row blocks, pieces): ROWS x COLUMNS of the gradient; the first of a subspace has its loss too."""
    block, piece = tl.program_id(0), tl.program_id(1)
    s = tl.load(pieces + 5 * piece).to(tl.int64)
    columns = tl.load(pieces + 5 * piece + 1) + tl.arange(0, COLUMNS)
    inside = tl.arange(0, COLUMNS) < tl.load(pieces + 5 * piece + 2)
    first = tl.load(pieces + 5 * piece + 3)
    parts = tl.arange(0, PARTS)
    own = parts < tl.load(pieces + 5 * piece + 4)
    deep = block * ROWS + tl.arange(0, ROWS)
    if LOG:
        floor = tl.load(log_floor + s)
        share *= tl.load(sizes + s)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    distance = tl.zeros([QUERY_BLOCK], tl.float32)
    for start in range(0, query_count, QUERY_BLOCK):
        q = start + tl.arange(0, QUERY_BLOCK).to(tl.int64)
        there = q < query_count
        squared = tl.load(
            squares + (first + parts).to(tl.int64)[:, None] * query_count + q[None, :],
            mask=own[:, None] & there[None, :],
            other=0.0,
        )
        squared = tl.sum(squared, 0)
        unit = tl.load(
            projected + q[:, None] * depth + columns[None, :],
            mask=there[:, None] & inside[None, :],
            other=0.0,
        )
        row, real = _neighbors(
            index, index_stride, index_step, counted, counted_stride, counted_step, s, q, query_count, COUNTED
        )
        if LOG:
            norm = squared + floor * floor
            distance += tl.where(real, 0.5 * tl.log(tl.where(norm == 0, 1.0, norm)), 0.0)
        else:
            norm = tl.sqrt_rn(squared)
            distance += norm
        positive = norm > 0  # a distance of zero has no gradient; that of NaN comes with the difference
        unit = tl.where(positive[:, None], unit * (1 / tl.where(positive, norm, 1.0))[:, None], 0.0)
        delta = _differences(queries, query_stride, keys, key_stride, q, row, real, deep, depth)
        total = tl.dot(tl.trans(delta), unit, total, input_precision=DOT)
    tl.store(
        gradient + deep.to(tl.int64)[:, None] * depth + columns[None, :],
        total * share,
        mask=(deep < depth)[:, None] & inside[None, :],
    )
    if (block == 0) & (piece == first):
        tl.store(losses + s, tl.sum(distance, 0) * query_share)


def loss_and_gradient(
    queries: Tensor,
    keys: Tensor,
    index: Tensor,
    rotation: Tensor,
    widths: Sequence[int],
    metric: str,
    counted: Tensor | None = None,
    log_floor: Tensor | None = None,
    *,
    products: str = "ieee",
    shape: Gradient | None = None,
) -> Objective:
    """Loss and gradient for given neighbors, as ``geometry.objective.loss_and_gradient`` has them.

    Euclidean only: the cosine is left to that function's torch code. The first call for new widths copies a
    small table to the device; make it before a CUDA graph is captured.

    Args:
        queries: [Q, d]; keys: [K, d]; each fp32, fp16 or bf16.
        index: [S, Q] int64, the row of ``keys`` that is nearest; not checked.
        rotation: [d, d] fp32; it may be off from orthogonal.
        widths: S widths that sum to d.
        counted: [S, Q] bool, the neighbors that contribute; default all. Others are not read.
        log_floor: [S] fp32, for the loss of logarithms.
        products: ``"ieee"`` for fp32 products, ``"tf32x3"`` for products on the matrix units of numbers split
            into two tf32 each, good to 2^-21.
        shape: of the kernels' tiles; default by ``kernels/tuning.py``.

    Returns:
        ``Objective(by_subspace [S] fp32, gradient [d, d] fp32)``. Without any distance, no gradient; a
        coordinate that is NaN makes its row of the gradient NaN.
    """
    if metric == "cosine":
        return objective.loss_and_gradient(queries, keys, index, rotation, widths, metric, counted, log_floor)
    from . import tuning

    queries, keys, rotation = (unit_columns(rows) for rows in (queries, keys, rotation))
    (count, width), subspaces = queries.shape, len(widths)
    shape = shape or tuning.gradient_shape(widths, count)
    pieces = _pieces(tuple(widths), shape.columns, queries.device)
    projected = torch.empty(count, width, device=queries.device)
    squares = torch.empty(len(pieces.table), count, device=queries.device)
    losses = torch.empty(subspaces, device=queries.device)
    result = torch.empty(width, width, device=queries.device)
    mask = index if counted is None else counted
    rows = (queries, queries.stride(0), count, keys, keys.stride(0))
    neighbors = (index, *index.stride(), mask, *mask.stride(), pieces.table)
    options = {"COLUMNS": shape.columns, "COUNTED": counted is not None, "DOT": products}
    options |= {"num_warps": shape.warps, "num_stages": 2, **tuning.OPTIONS}
    project = {"QUERY_BLOCK": shape.project_queries, "DEPTH_BLOCK": shape.depth, **options}
    total = {"PARTS": pieces.parts, "ROWS": shape.rows, "QUERY_BLOCK": shape.sum_queries, **options}
    with device_of(queries):
        project_kernel[(-(-count // shape.project_queries), len(pieces.table))](
            *rows, *neighbors, rotation, rotation.stride(0), width, projected, squares, **project
        )
        gradient_kernel[(-(-width // shape.rows), len(pieces.table))](
            *(*rows, *neighbors, projected, squares, width, losses, result),
            *(1 / count, 1 / (count * (subspaces if log_floor is None else width))),
            *(losses if log_floor is None else log_floor, pieces.sizes),
            LOG=log_floor is not None,
            **total,
        )
    return Objective(losses, result)


class _Pieces(NamedTuple):
    """Subspaces cut into what one block of the gradient's kernels takes."""

    table: Tensor
    """[N, 5] int32: subspace, first column, columns, first piece of that subspace, how many it has."""
    sizes: Tensor
    """[S] fp32 widths of the subspaces."""
    parts: int
    """Power of two that no subspace has more pieces than."""


@lru_cache(maxsize=64)
def _pieces(widths: tuple[int, ...], columns: int, device: torch.device) -> _Pieces:
    rows: list[tuple[int, ...]] = []
    offset = 0
    for subspace, width in enumerate(widths):
        first, count = len(rows), -(-width // columns)
        for start in range(0, width, columns):
            rows.append((subspace, offset + start, min(columns, width - start), first, count))
        offset += width
    most = max(row[4] for row in rows)
    table = torch.tensor(rows, dtype=torch.int32, device=device)
    sizes = torch.tensor(widths, dtype=torch.float32, device=device)
    return _Pieces(table, sizes, 1 << (most - 1).bit_length())
