"""Could a sweep over shadows of 16, 32 or 64 columns be faster on a card than the sweep over all?

    python bench/gpu/shadow_sweep.py

From counts alone (``bench/results/shadow-counts.json``), with everything that is not counted free: the best
known neighbor from the start, no look at a bound, no loads. What a shadow leaves differs from query to query,
so it is decided outside of the tensor cores, at the highest rate of fp32. That rate is compared with the one
that Gemma's sweep of 4,096 queries is expected at (docs/kernels-gpu.md). Above 1 the shadow is slower.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # not the root: its `kernels` hides another

from gpu.floors import FP32
from measuring import RESULTS

from ndm_fast.table import text_table

TILES = (16, 32, 64)
"""Columns of a tile of the sweep: h of them, and the length of the rest."""
PADDING = 16
"""Today's sweep multiplies the width, rounded up to this."""
SWEEP = 2 * 4096 * 409_600 * 2304 / 16.8e-3
"""FLOP a second."""


def best(row: dict[str, Any]) -> dict[str, Any] | None:
    """The cheapest shadow of a partition, in times of the full sweep; None where none fits a tile."""
    padded = -(-row["width"] // PADDING) * PADDING
    found = []
    for counts in row["by_columns"]:
        h, left = counts["columns"], counts["groups_32_left"]
        tile = next((tile for tile in TILES if h < tile), None)
        if tile is not None:
            found.append((tile / padded + left * row["width"] / padded * SWEEP / FP32, int(h), left))
    if not found:
        return None
    times, h, left = min(found)
    names = ("rows", "partition", "width", "keys")
    return {name: row[name] for name in names} | {"h": h, "left": f"{left:.1%}", "times": f"{times:.2f}"}


def main() -> None:
    """Print the table."""
    rows = json.loads((RESULTS / "shadow-counts.json").read_text())["rows"]
    print(f"the sweep is {SWEEP / FP32:.1f} times as fast as fp32 can be")
    print(text_table([found for row in rows if (found := best(row))]))


if __name__ == "__main__":
    main()
