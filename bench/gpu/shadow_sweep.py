"""Could a sweep over shadows of 16, 32 or 64 columns be faster on a card than the sweep over all?

    python bench/gpu/shadow_sweep.py [--markdown]

A prediction, from what shadows leave on real activations (``bench/results/shadow-counts-gpu.json``; MiniLM
is in ``shadow-counts.json`` only, without large groups). Free are: the axes, the lengths of what is left out,
the best known neighbor from the start, each further look at the minima. What is left can be decided in three
ways:

- ``now``: as now, each query reading the tiles of 128 keys that are left to it, at the rate measured.
- ``fp32``: in groups of 32 keys, at the highest rate of fp32. Nothing without the tensor cores is faster.
- ``tensor``: each tile or group of keys gathers the queries that it is left to, for the tensor cores, at the
  sweep's rate or the second-level cache's. The lists are free. No kernel of ours does that.

The sweep takes 2.05 times its floor (``floors.py``), as 32 and 72 columns do on an H200. Its instructions are
counted in the kernels, which are compiled for this without a card.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # not the root: its `kernels` hides another

from gpu.floors import FP32, MEMORY, SLOTS, TENSOR
from measuring import RESULTS

from ndm_fast.kernels import lint, replay, resources, search, shipped, tuning
from ndm_fast.table import text_table

OVER_FLOOR = 2.05
"""Measured sweeps over their floors: 7.2 of 3.6 ms at 32 columns, 16.8 of 8.0 ms at 72."""
RESOLVE = 1.6e12
"""Bytes of tiles a second that ``resolve_kernel`` reads: 98,304 queries of 1.05 tiles of 8 KB in 0.59 ms
(GPT-2, on an H200) are 1.4e12, and 131,072 of 18 KB in 1.4 ms (Gemma, expected) 1.8e12."""
SECOND_LEVEL = 6e12
"""Bytes a second of the second-level cache (``kernels/tuning.py``)."""
QUERIES, KEYS = 4096, 409_600
GROUPS = (32, 64, 128)
"""Keys that are taken or left as one; 128 are a tile."""
TILES = (16, 32, 64)
"""Columns of a tile of the sweep: h of them, and the length of the rest."""
SHAPES = {32: 768, 64: 1536, 72: 2304, 96: 2304, 192: 2304, 432: 2160}
"""Width of the subspaces, and of the activations: GPT-2, Qwen, Gemma, and Gemma's after merges."""


@cache
def element(width: int) -> float:
    """Seconds that the sweep takes for a key, query and subspace, expected from its floor."""
    tiles = tuning.sweep(90, width)
    with replay.recorded(90) as made:
        search.nearest_index(*shipped.asked([width] * max(1, 768 // width), QUERIES))
    launch = next(each for each in made if each.name == "sweep_kernel")
    turn = lint.hot_loop(resources.disassembled(launch.compiled())).instructions * tiles.warps
    issue = turn / (tiles.tile * tiles.query_block) / SLOTS
    return OVER_FLOOR * max(issue, 2 * sum(tuning.pieces(width)) / TENSOR)


def ways(left: dict[str, float], width: int) -> dict[str, float]:
    """Seconds for a key, query and subspace that deciding what is left takes, by the way to do it."""
    minima = {
        group: 8 * (1 / group - 1 / 128) / MEMORY for group in GROUPS
    }  # written and read, more than now
    found = {"fp32": left["groups_32_left"] * 2 * width / FP32 + minima[32]}
    found["tensor"] = min(
        left[f"groups_{group}_left"] * max(element(width), 2 * width / SECOND_LEVEL / group) + minima[group]
        for group in GROUPS
        if f"groups_{group}_left" in left
    )
    if "groups_128_left" in left:
        found["now"] = left["groups_128_left"] * 2 * width / RESOLVE
    return found


def predicted(row: dict[str, Any]) -> list[dict[str, Any]]:
    """For each h of a row of counts: milliseconds of a search's sweep, and times of it."""
    width, full = row["width"], element(row["width"])
    found = []
    for left in row["by_columns"]:
        tile = next((tile for tile in TILES if left["columns"] < tile < width), None)
        if tile is None:
            continue
        times = {name: (element(tile) + more) / full for name, more in ways(left, width).items()}
        shares = {f"of {group}": left.get(f"groups_{group}_left", "") for group in (32, 128)}
        names = {"rows": row["rows"], "partition": row["partition"], "keys": row["keys"], "width": width}
        found.append(names | {"tile": tile} | shares | times)
    return found


def sweeps() -> list[dict[str, Any]]:
    """Milliseconds of the sweeps alone."""
    found = []
    for width, d in SHAPES.items():
        elements = 1e3 * QUERIES * KEYS * (d // width)
        row = {"width": width, "d": d, "today": elements * element(width)}
        found.append(row | {f"{tile}": elements * element(tile) for tile in TILES if tile < width})
    return found


def counted() -> list[dict[str, Any]]:
    """Rows of counts, each source from one record, at the most keys there."""
    records = [
        json.loads((RESULTS / f"{name}.json").read_text())["rows"]
        for name in ("shadow-counts-gpu", "shadow-counts")
    ]
    here = {row["rows"] for row in records[0]}
    rows = records[0] + [row for row in records[1] if row["rows"] not in here]
    most: dict[str, int] = {}
    for row in rows:
        most[row["rows"]] = max(row["keys"], most.get(row["rows"], 0))
    return [row for row in rows if row["keys"] == most[row["rows"]]]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--markdown", action="store_true", help="the second table of docs/kernels-gpu.md")
    arguments = parser.parse_args()
    rows = counted()
    if arguments.markdown:
        print(markdown(rows))
        return
    for table in (sweeps(), [found for row in rows for found in predicted(row)]):
        names = list(dict.fromkeys(name for row in table for name in row))
        print(text_table([{name: _text(row.get(name, "")) for name in names} for row in table]))


def markdown(rows: list[dict[str, Any]]) -> str:
    """Times of today's sweep with the best h, each way, for every source and width."""
    cells: dict[tuple[str, str], dict[int, str]] = {}
    for row in rows:
        if found := predicted(row):
            least = [
                _text(min(each[way] for each in found)) if way in found[0] else "–"
                for way in ("now", "fp32", "tensor")
            ]
            cells.setdefault((row["rows"], row["partition"]), {})[row["width"]] = " / ".join(least)
    lines = ["| | " + " | ".join(map(str, SHAPES)) + " |", "|---" * (len(SHAPES) + 1) + "|"]
    for source, each in cells.items():
        if any(width in each for width in SHAPES):
            lines.append(f"| {', '.join(source)} | " + " | ".join(each.get(w, "") for w in SHAPES) + " |")
    return "\n".join(lines)


def _text(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.2f}" if value < 3 else f"{value:.1f}" if value < 10 else f"{value:.0f}"


if __name__ == "__main__":
    main()
