"""Does the demo find position, whatever the seed? Collects finished runs of it into one record.

    for s in 0 1 2 3 4; do python examples/demo_minilm.py runs/demo-$s $s; done
    python bench/claims/demo_minilm.py runs/demo-0 runs/demo-1 runs/demo-2 runs/demo-3 runs/demo-4

Asked for: exactly one subspace with position_within_3 >= 0.98 and same_position >= 0.80, every other one with
position_within_3 <= 0.35.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # not the root: its `kernels` hides another

from measuring import RESULTS

from ndm_fast.run.folder import RunFolder
from ndm_fast.table import text_table

WITHIN, SAME, OTHERS = 0.98, 0.80, 0.35


def record(folder: RunFolder) -> dict[str, Any]:
    """What one run found."""
    saved = json.loads(folder.config_file.read_text())
    rows = json.loads(folder.purity_file.read_text())["ndm"]
    first, *others = sorted(rows, key=lambda row: -row["position_within_3"])
    result = folder.result()
    return {
        "seed": folder.config().train.seed,
        "position_within_3": first["position_within_3"],
        "same_position": first["same_position"],
        "others_within_3": max(row["position_within_3"] for row in others),
        "heldout_distance": result["heldout_loss"],
        "widths": result["widths"],
        "purity": rows,
        "made_with": saved["made_with"],
    }


def passes(row: dict[str, Any]) -> bool:
    """Whether a run is what was asked for."""
    return (
        row["position_within_3"] >= WITHIN
        and row["same_position"] >= SAME
        and row["others_within_3"] <= OTHERS
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS / "demo-minilm.json")
    options = parser.parse_args()
    folders = [RunFolder(path) for path in options.runs]
    runs = [record(folder) for folder in folders]
    settings = folders[0].config().flat()
    options.out.write_text(json.dumps({"settings": settings, "runs": runs}, indent=1) + "\n")
    shown = ("seed", "position_within_3", "same_position", "others_within_3", "heldout_distance")
    print(text_table([{**{name: run[name] for name in shown}, "met": passes(run)} for run in runs]))
    if not all(map(passes, runs)):
        raise SystemExit("a seed missed")


if __name__ == "__main__":
    main()
