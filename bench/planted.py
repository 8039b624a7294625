"""Does a lower loss mean cleaner variables? The planted language model over seeds and starts.

    OMP_NUM_THREADS=1 python bench/planted.py --seeds 0 1 2 3 4 --starts 12 --out bench/results/planted.json

The first seed gets ``--starts`` random starts, the others four.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from ndm_fast.evaluate.effect_figure import draw_curves
from ndm_fast.evaluate.planted import planted_rows, run_planted
from ndm_fast.provenance import provenance
from ndm_fast.report.table import text_table


def main() -> None:
    """Run every seed, write the results after each, print tables, draw loss against Gini."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--starts", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path("bench/results/planted.json"))
    options = parser.parse_args()
    runs: list[dict] = []
    for seed in options.seeds:
        runs.append(run_planted(seed=seed, starts=4 if runs else options.starts))
        for method in runs[-1]["methods"].values():
            method.pop("effects")
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"runs": runs, "made_with": provenance()}, indent=1) + "\n")
        print(f"seed {seed}, {runs[-1]['seconds']:.0f} s\n{text_table(planted_rows(runs[-1]))}", flush=True)
    first = sorted(runs[0]["starts"], key=lambda start: start["loss"])
    print(text_table(first))
    losses, ginis = ([start[name] for start in first] for name in ("loss", "gini"))
    print(f"correlation of loss and Gini over starts: {np.corrcoef(losses, ginis)[0, 1]:.2f}")
    panel = {"title": "planted model, random starts", "x": losses, "y": ginis, "joined": False}
    labels = {"xlabel": "held-out loss", "ylabel": "mean Gini over variables"}
    draw_curves([{**panel, **labels}], Path("docs/images/planted-starts.png"))


if __name__ == "__main__":
    main()
