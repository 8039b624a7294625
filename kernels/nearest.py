"""Nearest key of every query in every subspace: a sweep in fp16 that proposes, and a search that decides.

Let ``x`` be a key and ``q`` a query in one subspace, centred and scaled by a power of two (for cosine: made
unit vectors), and ``x^``, ``q^`` the same rounded to fp16. The sweep forms ``|x^|^2/2 - q^ x^`` on the tensor
cores and keeps one number for each query and tile of keys, the least. Rounding moves a point by at most
``u |x|``, so a key nearer than the best one known, at distance r, has ``|x| <= |q| + r`` and lies less than

    r + u (2 |q| + r)

from ``q^``: a tile whose least value is above that holds no such key, whatever outliers it has. The search
visits the tile with the least value, and then every other that can hold a nearer key.

The tile of keys stays in place while all queries pass: keys are read, centred, rounded and normed once, any
number of queries fills the card, and projecting raw keys (``PROJECT``) is just another way to get a tile.
"""

import triton
import triton.language as tl

NO_ROW = tl.constexpr(9223372036854775807)
"""Above every number of a row."""

FP16_MAX = tl.constexpr(65504.0)
UNDERFLOW = tl.constexpr(2.0**-25)
"""Half the least fp16 number."""


@triton.jit
def coordinates(
    keys,  # [K, d], rotated or (PROJECT) raw
    key_stride,
    rows,  # [N] int64
    valid,  # [N]
    column,  # first column of the subspace
    columns,  # [P] within the subspace
    rotation,  # [d, d], PROJECT only
    rotation_stride,
    depth,
    origin,  # [d] fp32 rotated, CENTRE only
    scale,
    WIDTH: tl.constexpr,
    CENTRE: tl.constexpr,
    PROJECT: tl.constexpr,
    DEPTH_BLOCK: tl.constexpr,
    DOT: tl.constexpr,
):
    """[N, P] fp32 keys in one subspace, centred and scaled; 0 outside of the subspace."""
    inside = columns < WIDTH
    if PROJECT:
        tile = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32)
        for start in range(0, depth, DEPTH_BLOCK):
            deep = start + tl.arange(0, DEPTH_BLOCK)
            part = tl.load(
                keys + rows[:, None] * key_stride + deep[None, :],
                mask=valid[:, None] & (deep < depth)[None, :],
                other=0.0,
            )
            basis = tl.load(
                rotation + deep[:, None] * rotation_stride + (column + columns)[None, :],
                mask=(deep < depth)[:, None] & inside[None, :],
                other=0.0,
            )
            tile = tl.dot(part.to(basis.dtype), basis, tile, input_precision=DOT)
    else:
        tile = tl.load(
            keys + rows[:, None] * key_stride + (column + columns)[None, :],
            mask=valid[:, None] & inside[None, :],
            other=0.0,
        ).to(tl.float32)
    if CENTRE:
        tile -= tl.load(origin + column + columns, mask=inside, other=0.0)[None, :]
    return tl.where(inside[None, :], tile * scale, 0.0)


@triton.jit
def _to_fp16(tile):
    """Saturated: that only brings keys nearer to any query in range, and so never hides one."""
    tile = tl.where(tile == tile, tile, 0.0)
    return tl.minimum(tl.maximum(tile, -FP16_MAX), FP16_MAX).to(tl.float16)


@triton.jit
def inverse_norm(squared):
    return tl.where(squared > 0, 1 / tl.sqrt(tl.where(squared > 0, squared, 1.0)), 0.0)


@triton.jit
def sweep_kernel(
    keys,  # [K, d] from the first column of these subspaces on
    key_stride,
    key_count,
    rotation,
    rotation_stride,
    depth,
    origin,
    scales,  # [S] fp32
    errors,  # [S] fp32, bound on the error of a key's coordinates, after scaling
    packed,  # [S, query_slots, P1] fp16, zero beyond the width
    packed_rest,  # [S, query_slots, P2] fp16
    query_count,
    query_slots,  # query_count rounded up to whole blocks
    minima,  # [S, Q, tiles] fp32
    tiles,
    WIDTH: tl.constexpr,
    P1: tl.constexpr,
    P2: tl.constexpr,
    TILE: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    CENTRE: tl.constexpr,
    PROJECT: tl.constexpr,
    COSINE: tl.constexpr,
    DEPTH_BLOCK: tl.constexpr,
    DOT: tl.constexpr,
):
    """Grid (tiles, S). ``minima[s, q, t] = min |x^|^2/2 - q^ x^`` over the keys of tile t."""
    tile_number, s = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows = tile_number.to(tl.int64) * TILE + tl.arange(0, TILE)
    valid = rows < key_count
    scale = tl.load(scales + s)
    main, rest = tl.arange(0, P1), P1 + tl.arange(0, P2 if P2 else 16)
    tile = coordinates(
        keys, key_stride, rows, valid, s * WIDTH, main, rotation, rotation_stride, depth, origin, scale,
        WIDTH, CENTRE, PROJECT, DEPTH_BLOCK, DOT,
    )  # fmt: skip
    squared = tl.sum(tile * tile, 1)
    if P2:
        tile_rest = coordinates(
            keys, key_stride, rows, valid, s * WIDTH, rest, rotation, rotation_stride, depth, origin, scale,
            WIDTH, CENTRE, PROJECT, DEPTH_BLOCK, DOT,
        )  # fmt: skip
        squared += tl.sum(tile_rest * tile_rest, 1)
    usable = valid & (squared == squared)
    if COSINE:
        inverse = inverse_norm(squared)
        tile *= inverse[:, None]
        if P2:
            tile_rest *= inverse[:, None]
    rounded = _to_fp16(tile)
    half_norm = 0.5 * tl.sum(rounded.to(tl.float32) * rounded.to(tl.float32), 1)
    if P2:
        rounded_rest = _to_fp16(tile_rest)
        half_norm += 0.5 * tl.sum(rounded_rest.to(tl.float32) * rounded_rest.to(tl.float32), 1)
    if COSINE:  # an error moves a unit vector e |x|^-1, and half a squared distance by at most twice that
        half_norm = tl.where(inverse > 0, half_norm, 0.5) - 2 * tl.load(errors + s) * inverse
    half_norm = tl.where(usable, half_norm, float("inf"))

    queries = tl.arange(0, QUERY_BLOCK)
    for start in tl.range(0, query_slots, QUERY_BLOCK, num_stages=STAGES):
        slots = s * query_slots + start + queries
        part = tl.load(packed + slots[:, None] * P1 + main[None, :])
        product = tl.dot(part, tl.trans(rounded))
        if P2:
            part_rest = tl.load(packed_rest + slots[:, None] * P2 + tl.arange(0, P2)[None, :])
            product = tl.dot(part_rest, tl.trans(rounded_rest), product)
        least = tl.min(half_norm[None, :] - product, 1)
        tl.store(
            minima + (s * query_count + start + queries) * tiles + tile_number,
            least,
            mask=start + queries < query_count,
        )


@triton.jit
def sweep_wide_kernel(
    keys,
    key_stride,
    key_count,
    origin,
    scales,
    errors,
    packed,  # [S, query_slots, padded] fp16, zero beyond the width
    query_count,
    query_slots,
    minima,
    tiles,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    TILE: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    PIECE: tl.constexpr,
    CENTRE: tl.constexpr,
    COSINE: tl.constexpr,
):
    """:func:`sweep_kernel` for subspaces too wide to keep a tile in place: reads keys again for each block.

    A cosine is scaled after the product: keys are rounded as they are, not as unit vectors.
    """
    tile_number, s = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows = tile_number.to(tl.int64) * TILE + tl.arange(0, TILE)
    valid = rows < key_count
    scale = tl.load(scales + s)
    squared = tl.zeros([TILE], tl.float32)
    clean = tl.zeros([TILE], tl.float32)
    largest = tl.zeros([TILE], tl.float32)
    for start in range(0, WIDTH, PIECE):
        tile = coordinates(
            keys, key_stride, rows, valid, s * WIDTH, start + tl.arange(0, PIECE), keys, key_stride, 0,
            origin, scale, WIDTH, CENTRE, False, 16, "ieee",
        )  # fmt: skip
        clean += tl.sum(tile, 1)
        largest = tl.maximum(largest, tl.max(tl.abs(tile), 1))
        rounded = _to_fp16(tile).to(tl.float32)
        squared += tl.sum(rounded * rounded, 1)
    inverse = inverse_norm(squared)
    if COSINE:  # underflow moves a key before it is made a unit vector
        half_norm = 0.5 - 2 * (tl.load(errors + s) + UNDERFLOW * WIDTH) * inverse
        # A saturated key has another direction: its tile must be visited.
        half_norm = tl.where(largest > FP16_MAX, -float("inf"), half_norm)
    else:
        half_norm = 0.5 * squared
    half_norm = tl.where(valid & (clean == clean), half_norm, float("inf"))
    queries = tl.arange(0, QUERY_BLOCK)
    for start in range(0, query_slots, QUERY_BLOCK):
        slots = s * query_slots + start + queries
        product = tl.zeros([QUERY_BLOCK, TILE], tl.float32)
        for piece in range(0, WIDTH, PIECE):
            columns = piece + tl.arange(0, PIECE)
            tile = coordinates(
                keys, key_stride, rows, valid, s * WIDTH, columns, keys, key_stride, 0, origin, scale,
                WIDTH, CENTRE, False, 16, "ieee",
            )  # fmt: skip
            part = tl.load(packed + slots[:, None] * PADDED + columns[None, :])
            product = tl.dot(part, tl.trans(_to_fp16(tile)), product)
        if COSINE:
            product *= inverse[None, :]
        tl.store(
            minima + (s * query_count + start + queries) * tiles + tile_number,
            tl.min(half_norm[None, :] - product, 1),
            mask=start + queries < query_count,
        )
