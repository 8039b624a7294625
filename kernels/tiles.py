"""Device code that the sweep, the resolve and the rerank share: tiles of keys, exact rows, norms."""

from __future__ import annotations

import triton
import triton.language as tl

ROTATED, RAW, SLOTS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""What a search does with a key in reach: nothing more, the rotated key is exact; evaluate the raw row in
fp64; or keep the nearest few for ``rerank.py``."""


@triton.jit
def exact_raw(
    raw_query,  # [d]
    raw_key,  # [d]
    rotation,  # [d, d] fp32, from the subspace's first column on
    rotation_stride,
    depth,
    rotated_query,  # [P] fp64
    width,
    P: tl.constexpr,
    DEEP: tl.constexpr,
    COSINE: tl.constexpr,
):
    """Squared distance, or 1 - cos, of two raw rows in one subspace, in fp64."""
    columns = tl.arange(0, P)
    inside = columns < width
    total = tl.zeros([P], tl.float64)
    for start in range(0, depth, DEEP):
        deep = start + tl.arange(0, DEEP)
        row = tl.load(raw_key + deep, mask=deep < depth, other=0.0).to(tl.float64)
        if not COSINE:
            row = tl.load(raw_query + deep, mask=deep < depth, other=0.0).to(tl.float64) - row
        basis = tl.load(
            rotation + deep[:, None] * rotation_stride + columns[None, :],
            mask=(deep < depth)[:, None] & inside[None, :],
            other=0.0,
        )
        total += tl.sum(row[:, None] * basis.to(tl.float64), 0)
    if COSINE:
        norms = tl.sum(total * total, 0) * tl.sum(rotated_query * rotated_query, 0)
        return 1 - tl.sum(total * rotated_query, 0) * inverse_norm(norms)
    return tl.sum(total * total, 0)


@triton.jit
def load_tile(
    keys,
    key_stride,
    rows,  # [N] int64
    valid,  # [N]
    columns,  # [D] within the subspace
    inside,  # [D] which of them it has
    rotation,
    rotation_stride,
    depth,
    origin,
    scale,
    MODE: tl.constexpr,
    CENTRE: tl.constexpr,
    PROJECT: tl.constexpr,
    DEPTH_BLOCK: tl.constexpr,
    DOT: tl.constexpr,
):
    """[N, D] coordinates that are compared: as given in fp64 (ROTATED), or centred and scaled in fp32."""
    if MODE == ROTATED:
        return tl.load(
            keys + rows[:, None] * key_stride + columns[None, :],
            mask=valid[:, None] & inside[None, :],
            other=0.0,
        ).to(tl.float64)
    else:  # noqa: RET505 - triton compiles what follows a return
        tile = coordinates(
            keys, key_stride, rows, valid, columns, inside, rotation, rotation_stride, depth, origin, scale,
            CENTRE, PROJECT, DEPTH_BLOCK, DOT,
        )  # fmt: skip
        if MODE == SLOTS and not PROJECT and keys.dtype.element_ty == tl.float16:
            # Where the copy has overflowed, it is as the sweep took it.
            tile = tl.clamp(tile, -FP16_MAX * scale, FP16_MAX * scale, propagate_nan=tl.PropagateNan.ALL)
        return tile


NO_ROW = tl.constexpr(9223372036854775807)
"""Above every number of a row."""

FP16_MAX = tl.constexpr(65504.0)


UNDERFLOW = tl.constexpr(2.0**-25)
"""Half the least fp16 number."""


@triton.jit
def coordinates(
    keys,  # [K, d], rotated and from the subspace's first column on, or (PROJECT) raw
    key_stride,
    rows,  # [N] int64
    valid,  # [N]
    columns,  # [P] within the subspace
    inside,  # [P] which of them it has
    rotation,  # [d, d] from the subspace's first column on, PROJECT only
    rotation_stride,
    depth,
    origin,  # [d] fp32 rotated, likewise, CENTRE only
    scale,
    CENTRE: tl.constexpr,
    PROJECT: tl.constexpr,
    DEPTH_BLOCK: tl.constexpr,
    DOT: tl.constexpr,
):
    """[N, P] fp32 keys in one subspace, centred and scaled; 0 outside of the subspace."""
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
                rotation + deep[:, None] * rotation_stride + columns[None, :],
                mask=(deep < depth)[:, None] & inside[None, :],
                other=0.0,
            )
            tile = tl.dot(part.to(basis.dtype), basis, tile, input_precision=DOT)
    else:
        tile = tl.load(
            keys + rows[:, None] * key_stride + columns[None, :],
            mask=valid[:, None] & inside[None, :],
            other=0.0,
        ).to(tl.float32)
    if CENTRE:
        tile -= tl.load(origin + columns, mask=inside, other=0.0)[None, :]
    tile *= scale
    if PROJECT:  # where NaN may have come from other columns
        tile = tl.where(inside[None, :], tile, 0.0)
    return tile


@triton.jit
def to_fp16(tile):
    """Saturated: that only brings keys nearer to any query in range, and so never hides one."""
    tile = tl.where(tile == tile, tile, 0.0)
    return tl.minimum(tl.maximum(tile, -FP16_MAX), FP16_MAX).to(tl.float16)


@triton.jit
def inverse_norm(squared):
    return tl.where(squared > 0, 1 / tl.sqrt(tl.where(squared > 0, squared, 1.0)), 0.0)
