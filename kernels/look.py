"""First look at the minima of a sweep: the few tiles of keys where each query's are least.

Minima lie as the sweep writes them, query beside query, ``[S, tiles, query_slots]``: whole sectors of memory.
A search that looked at them for one query would read a sector for each. So one kernel reads all of them once,
row by row, and keeps for each query the :data:`FEW` least with the numbers of their tiles, in order; equal
values go by tile. That serves all but a few queries; the others look again, one by one (``resolve.py``).

A block has 32 queries and every 32nd tile in each of 32 rows. A row keeps its own few, without a word to the
others; they are merged at the end.

Limit: minima are read once, ``4 S Q K / TILE`` bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

FEW = 4
"""Tiles kept."""
NO_TILE = tl.constexpr(2147483647)


@triton.jit
def look_kernel(
    minima,  # [S, tiles, query_slots] fp32
    tiles,
    query_slots,
    query_count,
    few,  # [S, Q, 4] fp32, least first; inf for none
    few_tiles,  # [S, Q, 4] int32
    ROWS: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Grid (query blocks, S)."""
    s = tl.program_id(1).to(tl.int64)
    q = tl.program_id(0) * QUERY_BLOCK + tl.arange(0, QUERY_BLOCK)
    rows = tl.arange(0, ROWS)
    minima += s * tiles * query_slots + q[None, :]
    low0 = tl.full([ROWS, QUERY_BLOCK], float("inf"), tl.float32)
    low1, low2, low3 = low0, low0, low0
    tile0 = tl.full([ROWS, QUERY_BLOCK], NO_TILE, tl.int32)
    tile1, tile2, tile3 = tile0, tile0, tile0
    for start in tl.range(0, tiles, ROWS, loop_unroll_factor=UNROLL):
        tile = (start + rows)[:, None]
        there = (tile < tiles) & (q < query_slots)[None, :]
        low = tl.load(minima + tile.to(tl.int64) * query_slots, mask=there, other=float("inf"))
        tile = tl.broadcast_to(tile, [ROWS, QUERY_BLOCK])
        # From the last place up: each takes what was above it, the new one, or stays.
        tile3 = tl.where(low < low2, tile2, tl.where(low < low3, tile, tile3))
        low3 = tl.where(low < low2, low2, tl.where(low < low3, low, low3))
        tile2 = tl.where(low < low1, tile1, tl.where(low < low2, tile, tile2))
        low2 = tl.where(low < low1, low1, tl.where(low < low2, low, low2))
        tile1 = tl.where(low < low0, tile0, tl.where(low < low1, tile, tile1))
        low1 = tl.where(low < low0, low0, tl.where(low < low1, low, low1))
        tile0 = tl.where(low < low0, tile, tile0)
        low0 = tl.where(low < low0, low, low0)
    out = (s * query_count + q) * 4
    for place in range(4):
        low = tl.min(low0, 0)
        tile = tl.min(tl.where(low0 == low[None, :], tile0, NO_TILE), 0)
        tl.store(few + out + place, low, mask=q < query_count)
        tl.store(few_tiles + out + place, tile, mask=q < query_count)
        taken = (low0 == low[None, :]) & (tile0 == tile[None, :])
        low0, tile0 = tl.where(taken, low1, low0), tl.where(taken, tile1, tile0)
        low1, tile1 = tl.where(taken, low2, low1), tl.where(taken, tile2, tile1)
        low2, tile2 = tl.where(taken, low3, low2), tl.where(taken, tile3, tile2)
        low3 = tl.where(taken, float("inf"), low3)


def look(minima: Tensor, queries: int) -> tuple[Tensor, Tensor]:
    """[S, Q, 4] least values of each query, the least first, and the int32 numbers of their tiles.

    Args:
        minima: [S, tiles, query_slots] fp32.
        queries: Q, at most ``query_slots``.
    """
    from . import tuning

    subspaces, tiles, slots = minima.shape
    few = minima.new_empty(subspaces, queries, FEW)
    numbers = few.new_empty(few.shape, dtype=torch.int32)
    shape = dict(tuning.LOOK)
    look_kernel[(-(-queries // shape["QUERY_BLOCK"]), subspaces)](
        minima, tiles, slots, queries, few, numbers, **shape, **tuning.OPTIONS
    )
    return few, numbers
