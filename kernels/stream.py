"""The sweep for few queries: they stay in place, and the keys of a rotated fp16 copy pass by.

What :func:`kernels.sweep.sweep_kernel` makes, ``min |x|^2/2 - q^ x`` for each query and tile of keys. There
a block makes one tile ready and lets all queries pass; with few of these most of its time goes into making
ready. Here a block keeps the queries and walks through tiles, whose copies from memory are under way while
the tile before is multiplied. Keys go to the tensor cores as they lie; the power of two that scales them,
which moves no bit of a key, is applied to the product.

Limit: keys are read once, ``2 K d`` bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import FP16_MAX


@triton.jit
def _raw_tile(keys, key_stride, rows, key_count, columns, width):
    """[N, P] fp16 keys as they lie; 0 where there is none."""
    return tl.load(
        keys + rows[:, None] * key_stride + columns[None, :],
        mask=(rows < key_count)[:, None] & (columns < width)[None, :],
        other=0.0,
    )


@triton.jit(do_not_specialize=["width"], do_not_specialize_on_alignment=["scales"])
def stream_kernel(
    keys,  # [K, d] fp16, from the first column of these subspaces on
    key_stride,
    key_count,
    scales,  # [S] fp32 powers of two
    packed,  # [S, QUERIES, P1] fp16, zero beyond the width
    packed_rest,  # [S, QUERIES, P2] fp16
    minima,  # [S, tiles, QUERIES] fp32
    tiles,
    width,  # in ALIGNED columns
    ALIGNED: tl.constexpr,
    P1: tl.constexpr,
    P2: tl.constexpr,
    WHOLE: tl.constexpr,  # the width is P1 + P2
    TILE: tl.constexpr,
    QUERIES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (blocks, S). ``minima[s, t, q]``, where a key has overflowed -inf: its tile is to be visited."""
    width *= ALIGNED  # so triton knows how wide loads may be
    s = tl.program_id(1).to(tl.int64)
    keys += s * width
    scale = tl.load(scales + s)
    queries = s * QUERIES + tl.arange(0, QUERIES)
    main, rest = tl.arange(0, P1), tl.arange(0, P2 if P2 else 16)
    part = tl.load(packed + queries[:, None] * P1 + main[None, :])
    part_rest = part
    if P2:
        part_rest = tl.load(packed_rest + queries[:, None] * P2 + rest[None, :])
    minima += s * tiles * QUERIES + tl.arange(0, QUERIES)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        rows = tile * TILE + tl.arange(0, TILE).to(tl.int64)
        key = _raw_tile(keys, key_stride, rows, key_count, main, P1 if P2 or WHOLE else width)
        product = tl.dot(part, tl.trans(key))
        wide = key.to(tl.float32)
        squared, largest = tl.sum(wide * wide, 1), tl.max(tl.abs(wide), 1)
        if P2:
            key_rest = _raw_tile(keys, key_stride, rows, key_count, P1 + rest, P1 + P2 if WHOLE else width)
            product = tl.dot(part_rest, tl.trans(key_rest), product)
            wide_rest = key_rest.to(tl.float32)
            squared += tl.sum(wide_rest * wide_rest, 1)
            largest = tl.maximum(largest, tl.max(tl.abs(wide_rest), 1))
        half_norm = 0.5 * scale * scale * squared
        half_norm = tl.where((rows < key_count) & (squared == squared), half_norm, float("inf"))
        least = tl.min(half_norm[None, :] - scale * product, 1)
        overflown = tl.max(largest, 0) > FP16_MAX
        tl.store(minima + tile * QUERIES, tl.where(overflown, -float("inf"), least))
