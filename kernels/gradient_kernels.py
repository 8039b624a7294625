"""The three kernels of ``gradient.py``, and the products they are made of.

``DOT`` names the products. ``"ieee"`` and ``"tf32x3"`` are triton's. ``"fp16x3"`` splits both factors into
two fp16 each, 22 bits, and leaves out the product of the lesser halves: as good as three products in tf32 at
half the cost, and the matrix units take fp16 in either order of rows and columns.

What fp16 lacks is range: entries of a rotation and of unit vectors are at most about 1, but differences are
not. Half a difference of two fp16 numbers is in range, always; it is good to 2^-24, to which fp16 itself
represents small numbers (``HALF``). Other rows of differences are scaled by powers of two to a largest entry
from 2^14 to 2^15, beside which 2^-40 of it is still represented.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Times 65504 or less: entries of a rotation may be up to 1000, those of a unit vector to 64.
ROTATION_SCALE = tl.constexpr(64.0)
UNIT_SCALE = tl.constexpr(1024.0)


@triton.jit
def _halves(numbers):
    """Two fp16 whose sum is good to 2^-23 of a number, or to 2^-25."""
    high = numbers.to(tl.float16)
    return high, (numbers - high.to(tl.float32)).to(tl.float16)


@triton.jit
def _no_exponents(SIZE: tl.constexpr):
    """[N] what rows are in units of before any has been seen: far enough from 0 that those below exist."""
    return tl.full([SIZE], 32 << 23, tl.int32)


@triton.jit
def _left(rows, exponents, DOT: tl.constexpr, HALF: tl.constexpr):
    """Two parts of a left factor, [N, K] fp32, in units that its largest entry so far asks for.

    Returns the parts, the new exponents as they lie in fp32, and [N] what brings sums to the new units.
    """
    if DOT == "fp16x3":
        if HALF:
            high, low = _halves(rows * 0.5)
            new, change = exponents, 1.0
        else:
            largest = tl.max(tl.abs(rows), 1).to(tl.int32, bitcast=True) & 0x7F800000
            new = tl.minimum(tl.maximum(largest, exponents), 254 << 23)
            down = ((254 << 23) - new + (14 << 23)).to(tl.float32, bitcast=True)
            change = tl.maximum((127 << 23) - new + exponents, 0).to(tl.float32, bitcast=True)
            high, low = _halves(rows * down[:, None])
    else:
        high, low, new, change = rows, rows, exponents, 1.0
    return high, low, new, change


@triton.jit
def _unit(exponents, scale, DOT: tl.constexpr, HALF: tl.constexpr):
    """What sums of products are in units of, [N, 1] or a number: ``scale`` is that of the right factor."""
    if DOT == "fp16x3":
        if HALF:
            unit = 2.0 / scale
        else:
            unit = ((exponents - (14 << 23)).to(tl.float32, bitcast=True) * (1.0 / scale))[:, None]
    else:
        unit = 1.0
    return unit


@triton.jit
def _add_product(total, change, left, left_low, right, right_low, DOT: tl.constexpr, HALF: tl.constexpr):
    """``total``, in new units, plus the product of a left factor and a right one, each in its parts."""
    if DOT == "fp16x3":
        if not HALF:
            total *= change[:, None]
        total = tl.dot(left_low, right, total)
        total = tl.dot(left, right_low, total)
        total = tl.dot(left, right, total)
    else:
        total = tl.dot(left, right, total, input_precision=DOT)
    return total


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
def _basis(rotation, rotation_stride, deep, depth, columns, inside, DOT: tl.constexpr):
    """[D, C] of the rotation as a right factor."""
    mask = (deep < depth)[:, None] & inside[None, :]
    at = rotation + deep[:, None] * rotation_stride + columns[None, :]
    basis = tl.load(at, mask=mask, other=0.0)
    if DOT == "fp16x3":
        high, low = _halves(basis * ROTATION_SCALE)
    else:
        high, low = basis, basis
    return high, low


@triton.jit
def _units(units, plane, q, there, depth, columns, inside, DOT: tl.constexpr):
    """[N, C] of the unit vectors as a right factor."""
    mask = there[:, None] & inside[None, :]
    at = units + q[:, None] * depth + columns[None, :]
    high = tl.load(at, mask=mask, other=0.0)
    if DOT == "fp16x3":
        low = tl.load(at + plane, mask=mask, other=0.0)
    else:
        low = high
    return high, low


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
    pieces,  # [N, 4] int32: subspace, first column, columns, whether it is the subspace's first
    rotation,  # [d, d] fp32
    rotation_stride,
    depth,
    projected,  # [SPLITS, Q, d] fp32
    SPLITS: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    ALIGNED: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    DEPTH_BLOCK: tl.constexpr,
    COUNTED: tl.constexpr,
    HALF: tl.constexpr,  # queries and keys are fp16, and there are no weights
    DOT: tl.constexpr,
):
    """Grid (query blocks, splits, pieces): queries times the piece's columns, over a part of the depth."""
    split, piece = tl.program_id(1), tl.program_id(2)
    q = tl.program_id(0).to(tl.int64) * QUERY_BLOCK + tl.arange(0, QUERY_BLOCK)
    s = tl.load(pieces + 4 * piece).to(tl.int64)
    # All first columns and numbers of columns are multiples of ALIGNED, so that loads may be wide.
    first = tl.multiple_of(tl.load(pieces + 4 * piece + 1), ALIGNED)
    width = tl.multiple_of(tl.load(pieces + 4 * piece + 2), ALIGNED)
    columns, inside = first + tl.arange(0, MAIN), tl.arange(0, MAIN) < width
    row, real = _neighbors(
        index, index_stride, index_step, counted, counted_stride, counted_step, s, q, query_count, COUNTED
    )
    exponents = _no_exponents(QUERY_BLOCK)
    total = tl.zeros([QUERY_BLOCK, MAIN], tl.float32)
    if REST > 0:
        others, beyond = first + MAIN + tl.arange(0, REST), MAIN + tl.arange(0, REST) < width
        rest = tl.zeros([QUERY_BLOCK, REST], tl.float32)
    share = tl.cdiv(tl.cdiv(depth, DEPTH_BLOCK), SPLITS) * DEPTH_BLOCK
    for start in range(split * share, tl.minimum((split + 1) * share, depth), DEPTH_BLOCK):
        deep = start + tl.arange(0, DEPTH_BLOCK)
        delta = _differences(queries, query_stride, keys, key_stride, q, row, real, deep, depth)
        left, low, exponents, change = _left(delta, exponents, DOT, HALF)
        basis, basis_low = _basis(rotation, rotation_stride, deep, depth, columns, inside, DOT)
        total = _add_product(total, change, left, low, basis, basis_low, DOT, HALF)
        if REST > 0:
            basis, basis_low = _basis(rotation, rotation_stride, deep, depth, others, beyond, DOT)
            rest = _add_product(rest, change, left, low, basis, basis_low, DOT, HALF)
    there = (q < query_count)[:, None]
    at = projected + (split * query_count + q)[:, None] * depth
    unit = _unit(exponents, ROTATION_SCALE, DOT, HALF)
    tl.store(at + columns[None, :], total * unit, mask=there & inside[None, :])
    if REST > 0:
        tl.store(at + others[None, :], rest * unit, mask=there & beyond[None, :])


@triton.jit
def _sum_of_parts(projected, at, mask, plane, SPLITS: tl.constexpr):
    total = tl.load(projected + at, mask=mask, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(projected + split * plane + at, mask=mask, other=0.0)
    return total


@triton.jit
def _put_units(units, plane, at, mask, unit, DOT: tl.constexpr):
    if DOT != "fp16x3":
        tl.store(units + at, unit, mask=mask)
    else:
        high, low = _halves(unit * UNIT_SCALE)
        tl.store(units + at, high, mask=mask)
        tl.store(units + plane + at, low, mask=mask)


@triton.jit
def units_kernel(
    query_count,
    depth,
    counted,
    counted_stride,
    counted_step,
    subspaces,  # [S, 2] int32: first column, width
    log_floor,  # [S] fp32, LOG only
    plane,  # Q d
    projected,  # [SPLITS, Q, d] fp32; where COLUMNS do not hold a subspace, the first becomes their sum
    units,  # [Q, d] fp32, or [2, Q, d] fp16
    distances,  # [S, Q] fp32
    weights,  # [S, Q] fp32, LOG only
    SPLITS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WHOLE: tl.constexpr,  # no subspace is wider than COLUMNS
    ALIGNED: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    COUNTED: tl.constexpr,
    LOG: tl.constexpr,
    DOT: tl.constexpr,
):
    """Grid (query blocks, subspaces): sums the projections' parts, in order, and divides by the distance.

    The gradient of a query is its difference times the unit vector, where LOG times a weight:
    ``r / (|r|^2 + f^2) = r / |r| * (|r| / (|r|^2 + f^2))``.
    """
    s = tl.program_id(1).to(tl.int64)
    q = tl.program_id(0).to(tl.int64) * QUERY_BLOCK + tl.arange(0, QUERY_BLOCK)
    there = q < query_count
    first = tl.multiple_of(tl.load(subspaces + 2 * s), ALIGNED)
    width = tl.multiple_of(tl.load(subspaces + 2 * s + 1), ALIGNED)
    some = tl.arange(0, COLUMNS)
    at = q[:, None] * depth + first + some[None, :]
    mask = there[:, None] & (some < width)[None, :]
    total = _sum_of_parts(projected, at, mask, plane, SPLITS)
    squared = tl.sum(total * total, 1)
    if not WHOLE:
        for start in range(COLUMNS, width, COLUMNS):
            inside = there[:, None] & (start + some < width)[None, :]
            more = _sum_of_parts(projected, at + start, inside, plane, SPLITS)
            squared += tl.sum(more * more, 1)
            tl.store(projected + at + start, more, mask=inside)
        tl.debug_barrier()  # what other threads have stored is read below
    norm = tl.sqrt_rn(squared)
    positive = norm > 0  # a distance of zero has no gradient; that of NaN comes with the difference
    scale = tl.where(positive, 1 / tl.where(positive, norm, 1.0), 0.0)[:, None]
    _put_units(units, plane, at, mask, tl.where(positive[:, None], total * scale, 0.0), DOT)
    if not WHOLE:
        for start in range(COLUMNS, width, COLUMNS):
            inside = there[:, None] & (start + some < width)[None, :]
            more = tl.load(projected + at + start, mask=inside, other=0.0)
            _put_units(units, plane, at + start, inside, tl.where(positive[:, None], more * scale, 0.0), DOT)
    spot = s * query_count + q
    if LOG:
        floor = tl.load(log_floor + s)
        lifted = squared + floor * floor
        real = there
        if COUNTED:
            real &= tl.load(counted + s * counted_stride + q * counted_step, mask=there, other=0) != 0
        tl.store(
            weights + spot, tl.where(lifted > 0, norm / tl.where(lifted > 0, lifted, 1.0), 0.0), mask=there
        )
        norm = tl.where(real, 0.5 * tl.log(tl.where(lifted == 0, 1.0, lifted)), 0.0)
    tl.store(distances + spot, norm, mask=there)


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
    plane,  # Q d
    units,
    distances,
    weights,
    depth,
    losses,  # [S] fp32
    gradient,  # [d, d] fp32
    query_share,  # 1/Q
    share,  # 1/(S Q), or 1/(d Q) where LOG
    sizes,  # [S] fp32 widths, LOG only
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    COUNTED: tl.constexpr,
    LOG: tl.constexpr,
    HALF: tl.constexpr,
    DOT: tl.constexpr,
):
    """Grid (row blocks, pieces): ROWS of the piece's columns of the gradient; the first has the loss too."""
    block, piece = tl.program_id(0), tl.program_id(1)
    s = tl.load(pieces + 4 * piece).to(tl.int64)
    first = tl.multiple_of(tl.load(pieces + 4 * piece + 1), ALIGNED)
    width = tl.multiple_of(tl.load(pieces + 4 * piece + 2), ALIGNED)
    columns, inside = first + tl.arange(0, MAIN), tl.arange(0, MAIN) < width
    deep = block * ROWS + tl.arange(0, ROWS)
    exponents = _no_exponents(ROWS)
    total = tl.zeros([ROWS, MAIN], tl.float32)
    if REST > 0:
        others, beyond = first + MAIN + tl.arange(0, REST), MAIN + tl.arange(0, REST) < width
        rest = tl.zeros([ROWS, REST], tl.float32)
    for start in range(0, query_count, QUERY_BLOCK):
        q = start + tl.arange(0, QUERY_BLOCK).to(tl.int64)
        there = q < query_count
        row, real = _neighbors(
            index, index_stride, index_step, counted, counted_stride, counted_step, s, q, query_count, COUNTED
        )
        delta = _differences(queries, query_stride, keys, key_stride, q, row, real, deep, depth)
        if LOG:
            delta *= tl.load(weights + s * query_count + q, mask=there, other=0.0)[:, None]
        left, low, exponents, change = _left(tl.trans(delta), exponents, DOT, HALF)
        unit, unit_low = _units(units, plane, q, there, depth, columns, inside, DOT)
        total = _add_product(total, change, left, low, unit, unit_low, DOT, HALF)
        if REST > 0:
            unit, unit_low = _units(units, plane, q, there, depth, others, beyond, DOT)
            rest = _add_product(rest, change, left, low, unit, unit_low, DOT, HALF)
    if LOG:
        share *= tl.load(sizes + s)
    scale = share * _unit(exponents, UNIT_SCALE, DOT, HALF)
    at = gradient + deep.to(tl.int64)[:, None] * depth
    real_rows = (deep < depth)[:, None]
    tl.store(at + columns[None, :], total * scale, mask=real_rows & inside[None, :])
    if REST > 0:
        tl.store(at + others[None, :], rest * scale, mask=real_rows & beyond[None, :])
    if (block == 0) & (tl.load(pieces + 4 * piece + 3) != 0):
        distance = tl.zeros([QUERY_BLOCK], tl.float32)
        for start in range(0, query_count, QUERY_BLOCK):
            q = start + tl.arange(0, QUERY_BLOCK).to(tl.int64)
            distance += tl.load(distances + s * query_count + q, mask=q < query_count, other=0.0)
        tl.store(losses + s, tl.sum(distance, 0) * query_share)
