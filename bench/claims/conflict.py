"""Do what the context says and what the model knows lie in different subspaces?

    python bench/claims/conflict.py --model smollm2 --attribute Country --ravel FOLDER \\
        runs/seed?/blocks.16.hook_resid_post
    python bench/claims/conflict.py --model gemma3-270m --attribute Continent --ravel FOLDER \\
        runs-gemma/seed?/blocks.6.hook_resid_post

The same on other prompts, with seed0 alone: ``--prompts 48 --seed 1``, and ``--attribute Continent`` for
SmolLM2, ``Language`` for Gemma, whose first entry has ``--prompts 48`` too.

FOLDER holds RAVEL's files of cities. As `ndm-fast evaluate conflict`, for the runs of several seeds and the
baselines of the same widths. Every partition is written down as soon as it is measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # not the root: its `kernels` hides another

from measuring import RESULTS

from ndm_fast.activations.site_rows import site_activations
from ndm_fast.evaluate.baselines import baseline_partition
from ndm_fast.evaluate.conflict.prompts import make_conflicts, read_ravel
from ndm_fast.evaluate.conflict.rates import conflict_rates
from ndm_fast.evaluate.patching.language_model import load_language_model
from ndm_fast.partition import SubspacePartition
from ndm_fast.provenance import provenance
from ndm_fast.run.folder import RunFolder
from ndm_fast.table import text_table

RECORD = RESULTS / "conflict.json"
BASELINES = ("pca_descending", "identity", "random")
"""All subspaces are of one width, so ascending components are the same subspaces."""


def partitions(runs: list[Path], baselines: list[SubspacePartition]) -> dict[str, SubspacePartition]:
    """By name, the first seed and the baselines before the other seeds."""
    found = [(f"ndm seed {run.config().train.seed}", run.partition()) for run in map(RunFolder, runs)]
    return dict([*found[:1], *zip(BASELINES, baselines, strict=True), *found[1:]])


def main() -> None:
    """One model and attribute, added to the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--attribute", required=True)
    parser.add_argument("--ravel", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")
    parser.add_argument("--out", type=Path, default=RECORD)
    options = parser.parse_args()
    model, tokenizer = load_language_model(options.model, "cpu")
    names = ("entity_attributes", "attribute_to_prompts")
    data = read_ravel(*(options.ravel / f"ravel_city_{name}.json" for name in names))
    conflicts = make_conflicts(
        model, tokenizer, data, options.attribute, count=options.prompts, seed=options.seed
    )
    first = RunFolder(options.runs[0])
    site, partition = first.config().harvest.site[0], first.partition()
    activations = site_activations(model, tokenizer, site, partition.source)
    baselines = [baseline_partition(kind, partition.widths, activations) for kind in BASELINES]
    about = {"model": options.model, "attribute": options.attribute, "site": site, "seed": options.seed}
    entry: dict[str, Any] = {**about, "made_with": provenance(), "methods": {}}
    others = json.loads(options.out.read_text())["entries"] if options.out.exists() else []
    others = [one for one in others if any(one[name] != value for name, value in about.items())]
    for name, one in partitions(options.runs, baselines).items():
        began = time.process_time()
        found = conflict_rates(model, site, one, conflicts, rows=16)
        entry["methods"][name] = {**found, "cpu_seconds": time.process_time() - began}
        options.out.write_text(json.dumps({"entries": [*others, entry]}, indent=1) + "\n")
    rows = [
        {"method": name, "separation": found["separation"]}
        | dict(zip(("low", "high"), found["separation_interval"], strict=True))
        for name, found in entry["methods"].items()
    ]
    print(text_table(rows))


if __name__ == "__main__":
    main()
