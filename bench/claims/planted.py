"""Does NDM find planted variables, and does a lower loss mean cleaner ones?

    for seed in 0 1 2 3 4; do OMP_NUM_THREADS=1 python bench/claims/planted.py --seed $seed; done
    OMP_NUM_THREADS=1 python bench/claims/planted.py --seed 0 --starts 12

Every call adds its run to the file, in place of an earlier one with the same seed and number of starts.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from ndm_fast.drawing import draw_curves
from ndm_fast.evaluate.truth.planted import planted_rows, run_planted
from ndm_fast.provenance import provenance
from ndm_fast.table import text_table


def main() -> None:
    """One run, added to the results; with many starts also the figure of loss against Gini."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--starts", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("bench/results/planted.json"))
    options = parser.parse_args()
    result = run_planted(seed=options.seed, starts=options.starts, merge=True)
    run = result.record()
    for method in run["methods"].values():
        del method["effects"]
    key = (options.seed, options.starts)
    earlier = json.loads(options.out.read_text())["runs"] if options.out.exists() else []
    kept = [one for one in earlier if (one["planted"]["seed"], len(one["starts"])) != key]
    content = {"runs": [*kept, run], "made_with": provenance()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(content, indent=1) + "\n")
    print(f"seed {options.seed}, {run['seconds']:.0f} s, {run['cpu_seconds']:.0f} s of one core")
    print(text_table(planted_rows(result)))
    starts = sorted(run["starts"], key=lambda start: start["loss"])
    losses, ginis = ([start[name] for start in starts] for name in ("loss", "gini"))
    print(text_table(starts))
    if len(starts) >= 10:
        print(f"correlation of loss and Gini over starts: {np.corrcoef(losses, ginis)[0, 1]:.2f}")
        panel = {"title": "planted model, random starts", "x": losses, "y": ginis, "joined": False}
        labels = {"xlabel": "held-out loss", "ylabel": "mean Gini over variables"}
        draw_curves([{**panel, **labels}], Path("docs/images/planted-starts.png"))


if __name__ == "__main__":
    main()
