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

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Part, multiprocessors
from .queries import QueryPack, pack_queries
from .tiles import FP16_MAX, UNDERFLOW, coordinates, inverse_norm, to_fp16

if TYPE_CHECKING:
    from .tuning import Sweep


@triton.jit
def _key_tile(
    keys, key_stride, key_count, rows, rotation, rotation_stride, depth, origin, scale, error,
    width,
    P1: tl.constexpr,
    P2: tl.constexpr,
    WHOLE: tl.constexpr,
    CENTRE: tl.constexpr,
    PROJECT: tl.constexpr,
    COSINE: tl.constexpr,
    DEPTH_BLOCK: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """[P1, N] and [P2, N] fp16 keys, transposed, and their [N] half squared norms.

    Without a second part that is the first again. inf for keys that are not there, or NaN.
    """
    valid = rows < key_count
    main, rest = tl.arange(0, P1), P1 + tl.arange(0, P2 if P2 else 16)
    inside = main < (P1 if P2 or WHOLE else width)
    tile = coordinates(
        keys, key_stride, rows, valid, main, inside, rotation, rotation_stride, depth, origin, scale,
        CENTRE, PROJECT, DEPTH_BLOCK, DOT,
    )  # fmt: skip
    squared = tl.sum(tile * tile, 1)
    if P2:
        inside = rest < (P1 + P2 if WHOLE else width)
        tile_rest = coordinates(
            keys, key_stride, rows, valid, rest, inside, rotation, rotation_stride, depth, origin, scale,
            CENTRE, PROJECT, DEPTH_BLOCK, DOT,
        )  # fmt: skip
        squared += tl.sum(tile_rest * tile_rest, 1)
    usable = valid & (squared == squared)
    if COSINE:
        inverse = inverse_norm(squared)
        tile *= inverse[:, None]
        if P2:
            tile_rest *= inverse[:, None]
    rounded = to_fp16(tile)
    half_norm = 0.5 * tl.sum(rounded.to(tl.float32) * rounded.to(tl.float32), 1)
    rounded_rest = rounded
    if P2:
        rounded_rest = to_fp16(tile_rest)
        half_norm += 0.5 * tl.sum(rounded_rest.to(tl.float32) * rounded_rest.to(tl.float32), 1)
    if COSINE:  # an error moves a unit vector e |x|^-1, and half a squared distance by at most twice that
        half_norm = tl.where(inverse > 0, half_norm, 0.5) - 2 * error * inverse
    half_norm = tl.where(usable, half_norm, float("inf"))
    return tl.trans(rounded), tl.trans(rounded_rest), half_norm


@triton.jit
def _least(part, part_rest, keys, keys_rest, half_norm, P2: tl.constexpr):
    """[Q] least of ``|x^|^2/2 - q^ x^`` over a tile of keys."""
    product = tl.dot(part, keys)
    if P2:
        product = tl.dot(part_rest, keys_rest, product)
    return tl.min(half_norm[None, :] - product, 1)


@triton.jit(do_not_specialize=["width"], do_not_specialize_on_alignment=["scales", "errors"])
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
    query_slots,  # Q rounded up to whole blocks
    minima,  # [S, tiles, query_slots] fp32
    tiles,
    width,  # in ALIGNED columns
    ALIGNED: tl.constexpr,
    P1: tl.constexpr,
    P2: tl.constexpr,
    WHOLE: tl.constexpr,  # the width is P1 + P2
    TILE: tl.constexpr,
    TOGETHER: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    CENTRE: tl.constexpr,
    PROJECT: tl.constexpr,
    COSINE: tl.constexpr,
    DEPTH_BLOCK: tl.constexpr,
    DOT: tl.constexpr,
):
    """Grid (tiles / TOGETHER, S). ``minima[s, t, q] = min |x^|^2/2 - q^ x^`` over the keys of tile t."""
    # So triton knows how wide loads may be. Where it projects, masks would cost in the inner loop.
    width = ALIGNED if PROJECT else width * ALIGNED
    number, s = tl.program_id(0).to(tl.int64) * TOGETHER, tl.program_id(1).to(tl.int64)
    rows = number * TILE + tl.arange(0, TILE)
    if not PROJECT:
        keys += s * width
    rotation += s * width
    origin += s * width
    scale, error = tl.load(scales + s), tl.load(errors + s)
    first, first_rest, first_norm = _key_tile(
        keys, key_stride, key_count, rows, rotation, rotation_stride, depth, origin, scale, error,
        width, P1, P2, WHOLE, CENTRE, PROJECT, COSINE, DEPTH_BLOCK, DOT,
    )  # fmt: skip
    if TOGETHER == 2:
        second, second_rest, second_norm = _key_tile(
            keys, key_stride, key_count, rows + TILE, rotation, rotation_stride, depth, origin,
            scale, error, width, P1, P2, WHOLE, CENTRE, PROJECT, COSINE, DEPTH_BLOCK, DOT,
        )  # fmt: skip
    queries = tl.arange(0, QUERY_BLOCK)
    minima += (s * tiles + number) * query_slots
    for start in tl.range(0, query_slots, QUERY_BLOCK, num_stages=STAGES):
        slots = s * query_slots + start + queries
        part = tl.load(packed + slots[:, None] * P1 + tl.arange(0, P1)[None, :])
        part_rest = part
        if P2:
            part_rest = tl.load(packed_rest + slots[:, None] * P2 + tl.arange(0, P2)[None, :])
        tl.store(minima + start + queries, _least(part, part_rest, first, first_rest, first_norm, P2))
        if TOGETHER == 2:
            there = number + 1 + 0 * queries < tiles  # a mask is a tensor
            least = _least(part, part_rest, second, second_rest, second_norm, P2)
            tl.store(minima + query_slots + start + queries, least, mask=there)


@triton.jit(do_not_specialize=["width"], do_not_specialize_on_alignment=["scales", "errors"])
def sweep_wide_kernel(
    keys,
    key_stride,
    key_count,
    origin,
    scales,
    errors,
    packed,  # [S, query_slots, whole pieces] fp16, zero beyond the width
    query_slots,
    minima,
    tiles,
    width,  # in ALIGNED columns
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    PIECE: tl.constexpr,
    CENTRE: tl.constexpr,
    COSINE: tl.constexpr,
):
    """:func:`sweep_kernel` for subspaces too wide to keep a tile in place: reads keys again for each block.

    A cosine is scaled after the product: keys are rounded as they are, not as unit vectors.
    """
    width *= ALIGNED  # so triton knows how wide loads may be
    padded = tl.cdiv(width, PIECE) * PIECE
    tile_number, s = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows = tile_number.to(tl.int64) * TILE + tl.arange(0, TILE)
    valid = rows < key_count
    keys += s * width
    origin += s * width
    scale = tl.load(scales + s)
    squared = tl.zeros([TILE], tl.float32)
    clean = tl.zeros([TILE], tl.float32)
    largest = tl.zeros([TILE], tl.float32)
    for start in range(0, width, PIECE):
        columns = start + tl.arange(0, PIECE)
        tile = coordinates(
            keys, key_stride, rows, valid, columns, columns < width, keys, key_stride, 0, origin,
            scale, CENTRE, False, 16, "ieee",
        )  # fmt: skip
        clean += tl.sum(tile, 1)
        largest = tl.maximum(largest, tl.max(tl.abs(tile), 1))
        rounded = to_fp16(tile).to(tl.float32)
        squared += tl.sum(rounded * rounded, 1)
    inverse = inverse_norm(squared)
    if COSINE:  # underflow moves a key before it is made a unit vector
        half_norm = 0.5 - 2 * (tl.load(errors + s) + UNDERFLOW * width) * inverse
        # A saturated key has another direction: its tile must be visited.
        half_norm = tl.where(largest > FP16_MAX, -float("inf"), half_norm)
    else:
        half_norm = 0.5 * squared
    half_norm = tl.where(valid & (clean == clean), half_norm, float("inf"))
    queries = tl.arange(0, QUERY_BLOCK)
    for start in range(0, query_slots, QUERY_BLOCK):
        slots = s * query_slots + start + queries
        product = tl.zeros([QUERY_BLOCK, TILE], tl.float32)
        for piece in range(0, width, PIECE):
            columns = piece + tl.arange(0, PIECE)
            tile = coordinates(
                keys, key_stride, rows, valid, columns, columns < width, keys, key_stride, 0,
                origin, scale, CENTRE, False, 16, "ieee",
            )  # fmt: skip
            part = tl.load(packed + slots[:, None] * padded + columns[None, :])
            product = tl.dot(part, tl.trans(to_fp16(tile)), product)
        if COSINE:
            product *= inverse[None, :]
        least = tl.min(half_norm[None, :] - product, 1)
        tl.store(minima + (s * tiles + tile_number) * query_slots + start + queries, least)


_PIECE = 64
"""Columns of a wide subspace that are multiplied at once."""


def packed(part: Part, tiles: Sweep) -> QueryPack:
    """The queries of a part as :func:`sweep` takes them, for any keys."""
    rotated = part.frame.rotated[part.group][:, part.columns]
    slots = -(-len(rotated) // tiles.query_block) * tiles.query_block
    scales = part.frame.keys.scales[part.subspaces]
    return pack_queries(rotated, scales, part.width, part.search.cosine, *_covered(part.width), slots)


def _covered(width: int) -> tuple[int, int]:
    """Columns of the two parts of packed queries."""
    from . import tuning

    wide = width > tuning.WIDEST_IN_PLACE
    return (-(-width // _PIECE) * _PIECE, 0) if wide else tuning.pieces(width)


def sweep(part: Part, tiles: Sweep, pack: QueryPack) -> Tensor:
    """[s, tiles, slots] least value of every query over every tile of keys."""
    from . import stream, tuning

    slots, device = pack.main.shape[1], pack.main.device
    main, rest = _covered(part.width)
    tile_count = -(-len(part.chunk.rows) // tiles.tile)
    minima = torch.empty(part.subspace_count, tile_count, slots, device=device)
    options: dict[str, Any] = {"num_warps": tiles.warps, "num_stages": tiles.stages, **tuning.OPTIONS}
    parts = {"P1": main, "P2": rest, "WHOLE": part.width == main + rest}
    parts |= {"STAGES": tiles.stages, "TILE": tiles.tile}
    if tiles.streams:
        blocks = max(1, tiles.streams * multiprocessors(device) // part.subspace_count)
        stream.stream_kernel[(min(tile_count, blocks), part.subspace_count)](
            *(*part.keys(), part.scaling()[1], pack.main, pack.rest, minima, tile_count, part.units),
            **{"ALIGNED": part.aligned, "QUERIES": slots, **parts, **options},
        )
        return minima
    queries = (slots, minima, tile_count, part.units)
    options |= {"QUERY_BLOCK": tiles.query_block, **part.options()}
    grid = (-(-tile_count // tiles.together), part.subspace_count)
    if part.width > tuning.WIDEST_IN_PLACE:
        sweep_wide_kernel[grid](
            *(*part.keys(), *part.scaling(), pack.main, *queries),
            **{"PIECE": _PIECE, "TILE": tiles.tile, **options},
        )
    else:
        sweep_kernel[grid](
            *(*part.keys(), *part.turn(), *part.scaling(), pack.main, pack.rest, *queries),
            **{"TOGETHER": tiles.together, **parts, **part.projection(), **options},
        )
    return minima
