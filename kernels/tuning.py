"""Tile choices as data, per architecture and width of the subspaces, each with its reasoning.

Those for Hopper were measured on an H200 (bench/results/gpu-h200-*.json). The others follow from registers
and shared memory, which ``resources.py`` reads from the compiled kernels, and from the bytes of queries that
a tile of keys reads: a tile of n keys does n operations for each, and a card needs about its ratio of fp16
rate to L2 bandwidth (H100: 790 TFLOP/s over 6 TB/s, 130).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple


class Sweep(NamedTuple):
    """Tiles of ``sweep_kernel``."""

    tile: int
    """Keys kept in place; one minimum is stored for each query and tile."""
    query_block: int
    warps: int
    stages: int
    """Blocks of queries in flight."""
    together: int = 1
    """Tiles of a block, 1 or 2: two read each block of queries once. Wide subspaces take one."""
    streams: int = 0
    """Blocks a multiprocessor that keep all queries, and walk through keys (``stream.py``); 0: none do."""


CACHE_VARIABLE = "NDM_FAST_TUNING"
"""Environment variable that names the file of measured choices; default ~/.cache/ndm_fast/tuning.json."""

OPTIONS = {"enable_fp_fusion": True}
"""Of every launch. Products and sums may fuse into one rounding; triton 3.9 warns where that is left open."""

SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""KiB a block may use, by compute capability (CUDA C++ programming guide, technical specifications)."""

WIDEST_IN_PLACE = 512
"""Wider subspaces go through ``sweep_wide_kernel``."""


MOST_STREAMED = 256
"""Queries that can keep their place; of more, each reads a tile of keys once they are ready."""

WIDEST_STREAMED = 128

STREAM = Sweep(tile=128, query_block=128, warps=4, stages=3, streams=2)
"""Measured on an H200, 128 queries, 32 x 72 columns: 0.198 ms for 65,536 keys; ``sweep_kernel`` takes 0.258.
Wider than 80 columns four warps spill."""

WIDE = Sweep(tile=64, query_block=64, warps=4, stages=2)

_AMPERE = {
    # mma.sync holds the tile of keys and the sums in registers. 8 warps: 98 registers at 32 columns, 168 at
    # 64, so 2 and 1 blocks an SM; 4 warps need 255 at 64 columns. Larger tiles spill.
    32: Sweep(128, 128, 8, 3),
    64: Sweep(128, 128, 8, 3),
    # Twice the columns, half the keys, for the same registers.
    128: Sweep(64, 128, 8, 2),
    256: Sweep(32, 64, 8, 2),
    512: Sweep(16, 64, 8, 1),
}


_SMALL_SHARED = {
    # As above with 99 KiB: fewer blocks of queries in flight, smaller blocks for wide subspaces.
    32: Sweep(128, 128, 8, 3),
    64: Sweep(128, 128, 8, 2),
    128: Sweep(64, 64, 8, 2),
    256: Sweep(32, 32, 4, 2),
    512: Sweep(16, 32, 4, 1),
}


_HOPPER = {
    # wgmma reads both operands from shared memory, registers hold the sums only: [128, 128] fp32 on 8 warps
    # are 64 a thread, so that two blocks share an SM and one's reduction hides behind the other's product.
    32: Sweep(128, 128, 8, 3),
    # Before minima coalesced: 13.2 ms for 409,600 keys, 4096 queries, 24 subspaces, the best of 24 choices.
    64: Sweep(128, 128, 4, 3),
    # 64 + 16 columns, 32 subspaces: 16.8 ms, the best of 26; (128, 128, 8, 3) takes 18.9, (128, 64, 4, 3, 2)
    # 17.6. Four blocks of 120 registers on an SM.
    80: Sweep(128, 64, 4, 3),
    # Not measured. Wider, 4 warps spill.
    128: Sweep(128, 128, 8, 2),
    256: Sweep(128, 64, 8, 2),
    512: Sweep(64, 64, 8, 2),
}


# tcgen05 sums in tensor memory, but sums pass through registers to be reduced: 4 warps spill at 64 columns.
_BLACKWELL = _HOPPER | {64: Sweep(128, 128, 8, 3)}


TABLE = {
    80: _AMPERE,
    86: _SMALL_SHARED,
    89: _SMALL_SHARED,
    90: _HOPPER,
    100: _BLACKWELL,
    120: _SMALL_SHARED,
}
"""Sweep by compute capability and padded width up to the key."""

FORM = dict.fromkeys(TABLE, "split")
"""``split`` rotates keys with cuBLAS and sweeps the copy; ``fused`` rotates tiles of keys in the sweep and
reads every raw key again for each subspace, p operations for each byte, of which a card needs about 130."""

FP64_IS_FAST = {80, 90, 100}
"""Capabilities at half the rate of fp32; elsewhere (103 too) it is 1/64, and reranking multiplies in fp32."""

RERANK_ROWS = 32
"""Candidates a block of ``rerank_kernel`` projects together: 32 x 32 fp64 sums are 16 registers a thread."""


RERANK_DEPTH = 16
"""Depth they are multiplied by at once, the least triton takes in fp64: 96 registers with matrix units for it
(sm_80, sm_90), 240 without; 32 spills there."""


class Resolve(NamedTuple):
    """Shapes of ``resolve_kernel``, which runs one block for each query and subspace."""

    P: int
    """Power of two that covers the width."""
    CHUNK: int
    """Rows of a tile looked at together."""
    PIECE: int
    """Columns of them at once."""
    DEEP: int
    """Rows of the rotation that are multiplied together."""
    SEGMENT: int
    """Minima of one query in registers at once, at most."""
    options: dict[str, int]
    """Of the launch."""

    def constants(self, tiles: int) -> dict[str, int]:
        """Compile-time arguments of the kernel for that many minima of a query."""
        names = self._asdict()
        del names["options"]
        return {**names, "SEGMENT": min(self.SEGMENT, 1 << (tiles - 1).bit_length())}


def resolve_shape(width: int, tile: int, *, fused: bool, raw: bool, cosine: bool) -> Resolve:
    """Resolve shapes for subspaces of a width; a fused search needs 16 rows for the matrix units.

    A query's search is a chain of loads that wait for each other, so what counts is how many are under way:
    blocks of one warp, 16 numbers a thread, at 64 to 96 registers. Four warps where there is more to do than
    to wait for: rotating a key, or a row of the rotation for every raw row (ptxas, left to itself, spills).

    Args:
        raw: keys in reach are evaluated from raw rows.
        cosine: which holds more at once, and spills at the registers that ptxas would take.
    """
    padded = max(16, 1 << (width - 1).bit_length())
    deep = max(1, (1024 if padded >= 512 else 2048) // padded)
    chunk = min(tile, 128)
    if fused:
        chunk = max(16, min(tile, 2048 // padded))
        options = {"num_warps": 4} | ({"maxnreg": 255} if cosine else {})
        return Resolve(padded, chunk, padded, deep, 4096, options)
    if raw:
        options = {"num_warps": 4, "maxnreg": 168}
        return Resolve(padded, chunk, max(4, min(padded, 1024 // chunk)), deep, 1024, options)
    options = {"num_warps": 1} | ({"maxnreg": 255} if cosine else {})
    return Resolve(padded, chunk, max(4, min(padded, 512 // chunk)), deep, 512, options)


LOOK = {"ROWS": 32, "QUERY_BLOCK": 32, "UNROLL": 2, "num_warps": 4}
"""Of ``look.look_kernel``: 8 places of 4 tiles a thread, and rows of 128 bytes."""


KSG_DISTANCES = {"QUERY_BLOCK": 32, "KEY_BLOCK": 128, "num_warps": 8}
"""Of ``ksg.distances_kernel``: 16 sums a thread, 90 registers; at 4 warps triton 3.6 spills on sm_90."""


KSG_REDUCTIONS = {"KEY_BLOCK": 1024, "num_warps": 4}
"""Of the other two kernels of ``ksg.py``."""


LIE_BLOCK = 32
"""Side of a tile of ``lie_update_kernel``: rows of 128 bytes, four tiles of 4 KB in flight for each block of
4 warps at 64 registers. At 64 it takes 241 registers, and GPT-2 makes 78 blocks for 132 processors."""


CANDIDATES = [
    Sweep(tile, block, warps, stages, together)
    for tile, block, warps, together in (
        *((128, 64, 4, 1), (128, 128, 4, 1), (128, 128, 8, 1)),
        *((256, 64, 4, 1), (256, 64, 8, 1), (256, 128, 4, 1), (256, 128, 8, 1)),
        *((128, 64, 4, 2), (128, 128, 4, 2), (128, 128, 8, 2)),
        *((256, 64, 4, 2), (256, 64, 8, 2), (256, 128, 8, 2)),
    )
    for stages in (2, 3)
]
"""What :func:`autotune` times."""

STREAM_CANDIDATES = [
    Sweep(tile, 128, warps, stages, 1, streams)
    for tile, warps, streams in (
        *((64, 4, 2), (64, 4, 4), (128, 4, 2), (128, 4, 3), (128, 8, 2), (128, 8, 3), (256, 8, 1)),
    )
    for stages in (2, 3, 4)
]
"""Likewise for 128 queries and fewer, of a copy in fp16."""


def pieces(width: int) -> tuple[int, int]:
    """Two powers of two that cover a width, the second may be 0: 72 is 64 + 16, not 128."""
    main = max(16, 1 << (width.bit_length() - 1))
    rest = width - main
    if rest <= 0:
        return main, 0
    padded = max(16, 1 << (rest - 1).bit_length())
    return (2 * main, 0) if padded == main else (main, padded)


def architecture(capability: int) -> int:
    """The row of the tables for a compute capability such as 90: the nearest one not above it."""
    return max((known for known in TABLE if known <= capability), default=min(TABLE))


def sweep(capability: int, width: int, streamed_queries: int = 0) -> Sweep:
    """Tiles for subspaces of a width: measured on this machine by :func:`autotune`, or from the table.

    Args:
        streamed_queries: how many queries may keep their place while keys pass; 0: none.
    """
    if width > WIDEST_IN_PLACE:
        return WIDE
    if _forced:
        return _forced[-1]
    if 0 < streamed_queries <= MOST_STREAMED and width <= WIDEST_STREAMED:
        block = max(64, 1 << (streamed_queries - 1).bit_length())
        tile = STREAM.tile * 128 // max(128, block)
        return STREAM._replace(query_block=block, tile=tile, warps=8 if width > 80 else STREAM.warps)
    measured = _measured().get(_name(capability, width))
    if measured:
        return Sweep(*measured)
    padded = sum(pieces(width))
    rows = TABLE[architecture(capability)]
    return rows[min(limit for limit in rows if limit >= padded)]


def autotune(capability: int, width: int, milliseconds: Callable[[], float]) -> dict[Sweep, float]:
    """Time every candidate that runs and write the fastest to the cache file.

    Args:
        milliseconds: runs a search of subspaces of this width and returns its time; it may raise what a
            launch raises when a choice needs more than the card has.

    Returns:
        Times of the candidates that ran, the fastest first.
    """
    times: dict[Sweep, float] = {}
    problems = []
    for choice in CANDIDATES:
        _forced.append(choice)
        try:
            times[choice] = milliseconds()
        except Exception as error:  # triton raises OutOfResources and compiler errors of several types
            problems.append(f"{choice}: {error}")
        finally:
            _forced.pop()
    if not times:
        raise RuntimeError(f"no choice of tiles runs for width {width}: {problems[0]}")
    times = dict(sorted(times.items(), key=lambda timed: timed[1]))
    path = _cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    measured = _measured() | {_name(capability, width): list(next(iter(times)))}
    path.write_text(json.dumps(measured, indent=1) + "\n")
    _measured.cache_clear()
    return times


_forced: list[Sweep] = []


def _name(capability: int, width: int) -> str:
    return f"sm_{capability}/width {width}"


def _cache_file() -> Path:
    named = os.environ.get(CACHE_VARIABLE)
    return Path(named) if named else Path.home() / ".cache" / "ndm_fast" / "tuning.json"


@lru_cache(maxsize=1)
def _measured() -> dict[str, list[int]]:
    path = _cache_file()
    return json.loads(path.read_text()) if path.exists() else {}
