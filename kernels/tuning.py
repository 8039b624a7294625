"""Tiles of the sweep and of the search that decides, as data: ``tuning.json``, and what was measured here.

Both files have the same form: by compute capability, lists of entries for the sweep and for the resolve. An
entry says for which subspaces (``columns``: padded, at most so many; null: any), how many queries (``few``:
they keep their place while keys pass, ``more``, or ``any``) and which type of swept keys (or ``any``) it is,
what is chosen, and why; a measured one its ``milliseconds`` and the ``record`` they are from.

What is not measured follows from registers and shared memory, which ``lint.py`` reads from the compiled
kernels, and from the bytes of queries that a tile of keys reads: a tile of n keys does n operations for each,
and a card needs about its ratio of fp16 rate to L2 bandwidth (H100: 790 TFLOP/s over 6 TB/s, 130).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple


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
"""Environment variable that names the file of measured choices; default ~/.cache/ndm_fast/tiles.json."""

OPTIONS = {"enable_fp_fusion": True}
"""Of every launch. Products and sums may fuse into one rounding; triton 3.9 warns where that is left open."""

SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""KiB a block may use, by compute capability (CUDA C++ programming guide, technical specifications)."""

WIDEST_IN_PLACE = 512
"""Wider subspaces go through ``sweep_wide_kernel``."""


MOST_STREAMED = 256
"""Queries that can keep their place; of more, each reads a tile of keys once they are ready."""

WIDE = Sweep(tile=64, query_block=64, warps=4, stages=2)

SHIPPED: dict[str, dict[str, list[dict[str, Any]]]] = json.loads(
    Path(__file__).with_name("tuning.json").read_text()
)

FORM = dict.fromkeys(SHARED_MEMORY, "split")
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
    """Power of two that covers the width, where the whole of a query is looked at."""
    CHUNK: int
    """Rows of a tile looked at together."""
    PIECE: int
    """Columns of them at once."""
    TOGETHER: int
    """Pieces whose loads are under way together."""
    WHOLE: bool
    """They leave no column over."""
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


def resolve_shape(
    width: int,
    tile: int,
    *,
    fused: bool,
    raw: bool,
    cosine: bool,
    capability: int = 80,
    few: bool = False,
    keys: str = "float16",
) -> Resolve:
    """Resolve shapes for subspaces of a width: measured on this machine, or as shipped.

    Args:
        fused: keys are rotated in the kernel, which takes 16 rows for the matrix units.
        raw: keys in reach are evaluated from raw rows.
        cosine: which holds more at once, and spills at the registers that ptxas would take.
        few: queries kept their place in the sweep.
        keys: type of the swept keys.
    """
    padded = max(16, 1 << (width - 1).bit_length())
    deep = max(1, (1024 if padded >= 512 else 2048) // padded)
    mode = "fused" if fused else "raw" if raw else "copy"
    key = Key(capability, sum(pieces(width)), "few" if few else "more", keys)
    found = _lookup("resolve", key, mode)
    assert found is not None
    # What a kernel does not read must not make it another one.
    whole, deep = padded if raw or cosine else 16, deep if raw else 1
    options = {"num_warps": found["warps"]}
    if "maxnreg" in found:
        options["maxnreg"] = found["maxnreg"]
    elif cosine:
        options["maxnreg"] = 255
    if fused:
        chunk = max(16, min(tile, found["numbers"] // padded))
        return Resolve(whole, chunk, padded, 1, width == padded, deep, found["segment"], options)
    chunk = min(tile, 128)
    piece = max(4, min(padded, found["numbers"] // chunk))
    return Resolve(whole, chunk, piece, 2, width % (2 * piece) == 0, deep, found["segment"], options)


LOOK = {"ROWS": 32, "QUERY_BLOCK": 32, "UNROLL": 2, "num_warps": 4}
"""Of ``look.look_kernel``: 8 places of 4 tiles a thread, and rows of 128 bytes."""


KSG_DISTANCES = {"QUERY_BLOCK": 32, "KEY_BLOCK": 128, "num_warps": 8}
"""Of ``ksg.distances_kernel``: 16 sums a thread, 90 registers; at 4 warps triton 3.6 spills on sm_90."""


KSG_REDUCTIONS = {"KEY_BLOCK": 1024, "num_warps": 4}
"""Of the other two kernels of ``ksg.py``."""


LIE_BLOCK = 32
"""Side of a tile of ``lie_update_kernel``: rows of 128 bytes, four tiles of 4 KB in flight for each block of
4 warps at 64 registers. At 64 it takes 241 registers, and GPT-2 makes 78 blocks for 132 processors."""


def pieces(width: int) -> tuple[int, int]:
    """Two powers of two that cover a width, the second may be 0: 72 is 64 + 16, not 128."""
    main = max(16, 1 << (width.bit_length() - 1))
    rest = width - main
    if rest <= 0:
        return main, 0
    padded = max(16, 1 << (rest - 1).bit_length())
    return (2 * main, 0) if padded == main else (main, padded)


class Key(NamedTuple):
    """What a choice is for."""

    capability: int
    columns: int
    """Of a subspace, padded."""
    queries: str
    """``few`` or ``more``."""
    keys: str
    """Type of the swept keys, as torch names it."""


def architecture(capability: int) -> int:
    """The row of the tables for a compute capability such as 90: the nearest one not above it."""
    known = sorted(int(name) for name in SHIPPED)
    return max((each for each in known if each <= capability), default=known[0])


def sweep_key(capability: int, width: int, streamed_queries: int = 0, keys: str = "float16") -> Key:
    """What tiles are chosen by; arguments as for :func:`sweep`."""
    columns = sum(pieces(width))
    few = 0 < streamed_queries <= MOST_STREAMED
    if few and not _entries(SHIPPED, "sweep", architecture(capability), Key(0, columns, "few", keys)):
        few = False  # too wide
    return Key(capability, columns, "few" if few else "more", keys)


def sweep(capability: int, width: int, streamed_queries: int = 0, keys: str = "float16") -> Sweep:
    """Tiles for subspaces of a width: measured on this machine by ``autotune.py``, or as shipped.

    Args:
        streamed_queries: how many queries may keep their place while keys pass; 0: none.
        keys: type of the swept keys.
    """
    if width > WIDEST_IN_PLACE:
        return WIDE
    key = sweep_key(capability, width, streamed_queries, keys)
    found = _lookup("sweep", key)
    assert found is not None
    tiles = Sweep(**found)
    if not tiles.streams or "sweep" in _forced:
        return tiles
    block = max(64, 1 << (streamed_queries - 1).bit_length())
    return tiles._replace(query_block=block, tile=tiles.tile * 128 // max(128, block))


_forced: dict[str, dict[str, Any]] = {}


@contextmanager
def forced(kind: str, choice: dict[str, Any]) -> Iterator[None]:
    """Inside, every sweep or resolve takes this choice."""
    _forced[kind] = choice
    try:
        yield
    finally:
        del _forced[kind]


def _lookup(kind: str, key: Key, mode: str | None = None) -> dict[str, Any] | None:
    """The choice being tried, or measured here for just this, or shipped."""
    if kind in _forced:
        return _forced[kind]
    here = _entries(measured(), kind, key.capability, key, mode)
    exact = [entry for entry in here if entry["columns"] == key.columns and mode in (None, "copy")]
    shipped = _entries(SHIPPED, kind, architecture(key.capability), key, mode)
    found = exact or shipped
    return found[0]["choice"] if found else None


def _entries(
    table: dict[str, Any], kind: str, row: int, key: Key, mode: str | None = None
) -> list[dict[str, Any]]:
    """Those that hold for a key; of narrower columns first, and those that name the type of keys."""
    found = [
        entry
        for entry in table.get(str(row), {}).get(kind, [])
        if (entry["columns"] is None or entry["columns"] >= key.columns)
        and entry["queries"] in (key.queries, "any")
        and entry["keys"] in (key.keys, "any")
        and entry.get("mode", mode) == mode
    ]
    return sorted(found, key=lambda entry: (entry["columns"] or 1 << 30, entry["keys"] == "any"))


def measured_file() -> Path:
    """Where ``autotune.py`` writes."""
    named = os.environ.get(CACHE_VARIABLE)
    return Path(named) if named else Path.home() / ".cache" / "ndm_fast" / "tiles.json"


@lru_cache(maxsize=1)
def measured() -> dict[str, Any]:
    """What it has written, in the form of :data:`SHIPPED`."""
    path = measured_file()
    return json.loads(path.read_text()) if path.exists() else {}
