"""Measure the tiles of the sweep and of the search that decides on this card, and keep the fastest.

    python -m ndm_fast.kernels.autotune 32 64 72 [--queries 4096] [--keys 65536]

Each is timed apart. A minute or two for a width: some 40 choices, each compiled once and timed for half a
second. ``tuning.py`` reads what is kept.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import tuning
from .launch import Part, capability, chunks, device_of
from .queries import make_frame, make_search
from .search import nearest_index, resolve_part
from .sweep import packed, sweep
from .tuning import Key, Sweep

SWEEP_CANDIDATES = [
    Sweep(tile, block, warps, stages, together)
    for tile, block, warps, together in (
        *((128, 64, 4, 1), (128, 128, 4, 1), (128, 128, 8, 1)),
        *((256, 64, 4, 1), (256, 64, 8, 1), (256, 128, 4, 1), (256, 128, 8, 1)),
        *((128, 64, 4, 2), (128, 128, 4, 2), (128, 128, 8, 2)),
        *((256, 64, 4, 2), (256, 64, 8, 2), (256, 128, 8, 2)),
    )
    for stages in (2, 3)
]
"""Tiles of the sweep to try, for many queries."""

STREAM_CANDIDATES = [
    Sweep(tile, 128, warps, stages, 1, streams)
    for tile, warps, streams in (
        *((64, 4, 2), (64, 4, 4), (128, 4, 2), (128, 4, 3), (128, 8, 2), (128, 8, 3), (256, 8, 1)),
    )
    for stages in (2, 3, 4)
]
"""For 128 queries and fewer, of a copy in fp16."""

RESOLVE_CANDIDATES = [
    {"numbers": numbers, "segment": segment, "warps": warps}
    for numbers, warps in ((256, 1), (512, 1), (1024, 1), (512, 2), (1024, 2), (1024, 4), (2048, 4))
    for segment in (512, 1024)
]
"""Of the search that decides: ``numbers`` are those of a tile that a block holds at once."""


def fastest(
    kind: str, key: Key, candidates: Sequence[dict[str, Any]], milliseconds: Callable[[], float], record: str
) -> list[tuple[dict[str, Any], float]]:
    """Time every candidate that runs and write the fastest to this machine's file.

    Args:
        kind: ``sweep`` or ``resolve``.
        milliseconds: runs what is timed; it may raise what a launch raises when a choice needs more than the
            card has.
        record: where the times are from.

    Returns:
        The candidates that ran with their times, the fastest first.
    """
    times: list[tuple[dict[str, Any], float]] = []
    problems = []
    for choice in candidates:
        try:
            with tuning.forced(kind, choice):
                times.append((choice, milliseconds()))
        except Exception as error:  # triton raises OutOfResources and compiler errors of several types
            problems.append(f"{choice}: {error}")
    if not times:
        raise RuntimeError(f"no choice runs for {key}: {problems[0]}")
    times.sort(key=lambda timed: timed[1])
    path = tuning.measured_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(added(tuning.measured(), kind, key, *times[0], record), indent=1) + "\n")
    tuning.measured.cache_clear()
    return times


def added(
    table: dict[str, Any], kind: str, key: Key, choice: dict[str, Any], milliseconds: float, record: str
) -> dict[str, Any]:
    """A table with one entry more, in the place of what was there for the same."""
    what = {"columns": key.columns, "queries": key.queries, "keys": key.keys}
    rows = table.get(str(key.capability), {})
    kept = [row for row in rows.get(kind, []) if any(row[name] != what[name] for name in what)]
    entry = {**what, "choice": choice, "milliseconds": milliseconds, "record": record}
    return {**table, str(key.capability): {**rows, kind: [*kept, entry]}}


class Timed(NamedTuple):
    """One search to time, and what a choice for it is kept by."""

    part: Part
    sweep_key: Key
    sweeps: list[dict[str, Any]]
    """Candidates for the sweep."""

    def tiles(self) -> Sweep:
        """As chosen now."""
        return tuning.sweep(self.sweep_key.capability, self.part.width, self._queries, self.sweep_key.keys)

    @property
    def _queries(self) -> int:
        return len(self.part.frame.rotated[self.part.group])

    def resolve_key(self) -> Key:
        """Of the search that decides, after a sweep in the tiles as chosen now."""
        return self.sweep_key._replace(queries="few" if self.tiles().streams else "more")

    def resolve(self) -> Callable[[], None]:
        """The search that decides, from the start, in the shape that is chosen when it is called."""
        tiles = self.tiles()
        pack = packed(self.part, tiles)
        minima = sweep(self.part, tiles, pack)
        shape = (self.part.subspace_count, self._queries, 4)
        best = torch.full(shape, torch.inf, dtype=torch.float64, device=self.part.chunk.rows.device)
        index = torch.full(shape, -1, device=best.device)

        def run() -> None:
            best.fill_(torch.inf)
            index.fill_(-1)
            resolve_part(self.part, tiles, minima, pack, (best, index))

        return run


def timed(queries: Tensor, keys: Tensor, rotation: Tensor, widths: list[int]) -> Timed:
    """A search in half precision of fp16 rows, all of one width: the sweep of what fits in one launch."""
    asked = make_search(keys, "euclidean", "bf16", keys_rotated=False, queries_rotated=False, fused=False)
    frame = make_frame(queries, keys, rotation, widths, asked, exact=False)
    chunk = next(iter(chunks(keys, frame, widths, asked)))
    every = slice(0, len(queries))
    part = Part(frame, chunk, asked, slice(0, len(widths)), slice(0, sum(widths)), every)
    key = tuning.sweep_key(capability(keys.device), widths[0], len(queries), "float16")
    few = len(queries) <= 128
    candidates = STREAM_CANDIDATES + SWEEP_CANDIDATES[::2] if few else SWEEP_CANDIDATES
    return Timed(part, key, [choice._asdict() for choice in candidates])


def tune(
    widths: list[int],
    queries: int,
    keys: int,
    device: str = "cuda",
    milliseconds_of: Callable[[Callable[[], object]], float] | None = None,
) -> dict[str, list[tuple[dict[str, Any], float]]]:
    """Times of the sweep and of the search that decides, by choice, the fastest first, which are kept.

    Args:
        widths: of the subspaces, all the same.
        queries, keys: how many.
        milliseconds_of: how long a call takes; default by triton's benchmark.
    """
    milliseconds_of = milliseconds_of or _median_milliseconds
    left, right = (torch.randn(n, sum(widths), device=device).half() for n in (queries, keys))
    rotation = torch.eye(sum(widths), device=device)
    record = torch.cuda.get_device_name() if device == "cuda" else device
    with device_of(left):
        one = timed(left, right, rotation, widths)
        expected = nearest_index(left, right, rotation, widths)

        def checked(run: Callable[[], object]) -> float:
            if not torch.equal(nearest_index(left, right, rotation, widths), expected):
                raise RuntimeError("this choice finds other neighbors")
            return milliseconds_of(run)

        def sweep_time() -> float:
            tiles = one.tiles()
            pack = packed(one.part, tiles)
            return checked(lambda: sweep(one.part, tiles, pack))

        found = {"sweep": fastest("sweep", one.sweep_key, one.sweeps, sweep_time, record)}
        resolve = one.resolve()
        key = one.resolve_key()
        found["resolve"] = fastest("resolve", key, RESOLVE_CANDIDATES, lambda: checked(resolve), record)
    return found


def _median_milliseconds(run: Callable[[], object]) -> float:
    import triton.testing

    return triton.testing.do_bench(run, warmup=100, rep=400, return_mode="median")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("widths", type=int, nargs="+")
    parser.add_argument("--queries", type=int, default=4096)
    parser.add_argument("--keys", type=int, default=65536)
    arguments = parser.parse_args()
    for width in arguments.widths:
        found = tune([width] * max(1, 768 // width), arguments.queries, arguments.keys)
        for kind, times in found.items():
            for choice, time in times:
                print(f"{kind:8} width {width:4} {time:8.3f} ms  {choice}", flush=True)


if __name__ == "__main__":
    main()
