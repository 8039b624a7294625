"""Are the edges between subspaces those that are known, and do weights, gradients and patches agree?

    python bench/claims/connections.py --induction 0 1 2 3 4 --with-mlp 0 1
    python bench/claims/connections.py --model smollm2 --tests 1 2 3 \\
        --runs runs/seed0/blocks.{16,17,20,24}.hook_resid_post
    python bench/claims/connections.py --model smollm2 --exact --prompts 8 --tests 1 2 \\
        --runs runs/seed0/blocks.{16,17,20}.hook_resid_post
    python bench/claims/connections.py --model gemma3-270m --tests 1 2 3 \\
        --runs runs-gemma/seed0/blocks.{4,6,10,13}.hook_resid_post

The first trains the two-block induction model of each seed, in which three edges are known, and ranks them
among all edges: subspaces from labels, from NDM, and from principal components of the same width. The others
take finished runs (see ``language_model.py``) and measure all edges between their sites on circuit tests.
Prompts come from template set b. Each call replaces its own part of the record.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # not the root: its `kernels` hides another

from measuring import RESULTS

from ndm_fast.evaluate.connections.connections import run_connections
from ndm_fast.evaluate.connections.heads import SIDES
from ndm_fast.evaluate.connections.measured import ConnectionOptions
from ndm_fast.evaluate.connections.results import Connections, Pair, connection_rows, strongest
from ndm_fast.evaluate.truth.induction import run_induction
from ndm_fast.provenance import provenance
from ndm_fast.run.load import load_partition
from ndm_fast.table import text_table

RECORD = RESULTS / "connections.json"
_EDGES = 10


def induction(seeds: list[int], mlp: bool) -> list[dict[str, Any]]:
    """One record a seed, without the tables of all edges."""
    found = []
    for seed in seeds:
        one = run_induction(seed=seed, mlp=mlp)
        for method in one["partitions"].values():
            del method["times"], method["effects"]
        found.append(one)
        rows = [
            {"seed": seed, "subspaces": name, "K_by_weights": m["weights"]["K"], "K_by_data": m["data"]["K"]}
            | {"area": m["area"], "area_previous": m["area_by_kind"]["previous"]}
            for name, m in one["partitions"].items()
        ]
        print(text_table(rows))
    return found


def language_model(
    model: str, runs: list[Path], tests: list[str], prompts: int, exact: bool
) -> dict[str, Any]:
    """What the edges between the sites of some runs are, in short."""
    began = time.process_time()
    found = run_connections(
        {str(path): load_partition(path) for path in runs},
        model,
        tests=tests,
        options=ConnectionOptions(prompts=prompts, templates="b", exact=exact),
    )
    print(text_table(connection_rows(found, _EDGES)))
    return {
        "model": model,
        "prompts": prompts,
        "templates": "b",
        "exact": exact,
        "threads": torch.get_num_threads(),
        "cpu_seconds": time.process_time() - began,
        "pairs": [_short(found, pair) for pair in found.pairs],
        "left_out": found.left_out,
    }


def _short(found: Connections, pair: Pair) -> dict[str, Any]:
    tested = pair.tested
    assert tested is not None
    best = max(range(len(tested.subspaces)), key=lambda s: abs(tested.subspaces[s]))
    into = sorted(
        (
            {"head": f"{node.block}.{node.head}", "side": side, "effect": effect}
            for node in pair.heads
            for side, effect in zip(SIDES, node.effects or [], strict=True)
        ),
        key=lambda one: -abs(one["effect"]),
    )[:5]
    by_edge = {(f"{e.block}.{e.head}", e.side, e.subspace): e for e in pair.edges}
    for one in into:
        edge = by_edge[one["head"], one["side"], best]
        one |= {
            "of_it_through_best_subspace": (edge.effect or 0.0) / one["effect"],
            "times_chance": edge.times,
        }
    arriving = strongest(pair.edges, 1)[0].arriving or []
    return {
        "below": found.sites[pair.below].site,
        "above": found.sites[pair.above].site,
        "test": tested.test,
        "clean": tested.clean,
        "whole": tested.whole,
        "best_subspace": best,
        "best_of_whole": tested.subspaces[best] / tested.whole,
        "heads_by_path_patching": into,
        "strongest_edges": [
            {
                "edge": f"s{e.subspace} {e.block}.{e.head} {e.side}",
                "effect": e.effect,
                "error": e.error,
                "first_order": e.attributed,
                "times_chance": e.times,
                "rank_by_weights": sum(o.times >= e.times for o in pair.edges),
            }
            for e in strongest(pair.edges, _EDGES)
        ],
        "strongest_edge_arrives_in": max(range(len(arriving)), key=lambda s: abs(arriving[s]), default=None),
        "edges": len(pair.edges),
        "agreement": vars(tested.agreement),
        "run": tested.run,
        "cpu_seconds": tested.cpu_seconds,
    }


def main() -> None:
    """One part of the record, replaced."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--induction", type=int, nargs="+", metavar="SEED")
    parser.add_argument("--with-mlp", type=int, nargs="*", default=[], metavar="SEED")
    parser.add_argument("--model")
    parser.add_argument("--runs", type=Path, nargs="+")
    parser.add_argument("--tests", nargs="+", default=["1", "2", "3"])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--exact", action="store_true", help="run every edge through all layers above")
    parser.add_argument("--out", type=Path, default=RECORD)
    options = parser.parse_args()
    record = json.loads(options.out.read_text()) if options.out.exists() else {}
    made_with = provenance()
    if options.induction:
        found = induction(options.induction, mlp=False) + induction(options.with_mlp, mlp=True)
        record |= {"rows": found, "made_with": made_with}
    if options.model:
        found = language_model(options.model, options.runs, options.tests, options.prompts, options.exact)
        name = f"{options.model}{', exact' if options.exact else ''}"
        record.setdefault("language_models", {})[name] = {"made_with": made_with, **found}
    options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
