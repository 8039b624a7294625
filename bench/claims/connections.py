"""Are the edges between subspaces those that are known, and do weights, gradients and patches agree?

    python bench/claims/connections.py --induction 0 1 2 3 4 --with-mlp 0 1
    python bench/claims/connections.py --planted 0 1 2
    python bench/claims/connections.py --model smollm2 --tests 1 2 3 \\
        --runs runs/seed0/blocks.{16,17,20,24}.hook_resid_post [--baseline pca] --activations ACTIVATIONS
    python bench/claims/connections.py --model smollm2 --exact --prompts 8 --tests 1 2 \\
        --runs runs/seed0/blocks.{16,17,20}.hook_resid_post
    python bench/claims/connections.py --model gemma3-270m --tests 1 2 3 \\
        --runs runs-gemma/seed0/blocks.{4,6,10,13}.hook_resid_post

The first trains the two-block induction model of each seed, in which three edges are known, and ranks them
among all edges: subspaces from labels, from NDM, and from principal components of the same width. The second
trains the planted language model, in which every variable must lead to itself. The others take finished runs
(see ``language_model.py``) and measure all edges between their sites on circuit tests; ``--baseline`` puts
untrained subspaces of the same widths in their place, principal components of the harvest ``--activations``.
With it the record also says what else than weights would tell the edges (``explained``). Prompts come from
template set b. Each call replaces its own part of the record.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from math import isnan
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # not the root: its `kernels` hides another

from measuring import RESULTS

from ndm_fast.activations.cache import ActivationCache
from ndm_fast.evaluate.baselines import baseline_partition
from ndm_fast.evaluate.circuits.prompts import chosen_tests
from ndm_fast.evaluate.connections.agreement import area_under_curve, rank_correlation, strong
from ndm_fast.evaluate.connections.connections import run_connections
from ndm_fast.evaluate.connections.finding import find_heads
from ndm_fast.evaluate.connections.heads import SIDES
from ndm_fast.evaluate.connections.measured import ConnectionOptions
from ndm_fast.evaluate.connections.results import (
    Connections,
    Pair,
    connection_rows,
    mlp_edges,
    strongest,
)
from ndm_fast.evaluate.connections.weights import Factors, head_weights, subspace_sums
from ndm_fast.evaluate.gini import top_share
from ndm_fast.evaluate.patching.language_model import load_language_model
from ndm_fast.evaluate.patching.layers_above import LayersAbove
from ndm_fast.evaluate.patching.prompts import columns_of, pad_prompts
from ndm_fast.evaluate.truth.induction import run_induction
from ndm_fast.evaluate.truth.planted_routing import run_routing
from ndm_fast.partition import SubspacePartition
from ndm_fast.provenance import provenance
from ndm_fast.run.load import load_partition
from ndm_fast.table import text_table

RECORD = RESULTS / "connections.json"
_EDGES = 10
_ROWS = 65536
"""Activations for principal components and variances."""


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


def planted(seed: int, starts: int) -> dict[str, Any]:
    """One record of the planted model."""
    found = run_routing(seed=seed, starts=starts)
    rows = [
        {"seed": seed, "subspaces": name, "distinct": one["distinct"], "way": way}
        | {"area": one["weights_area"].get(way), "first_of_row": one["weights_first"].get(way)}
        | {"first_by_data": sum(rank == 1 for rank in one["data"][way]), "share": one["data_share"][way]}
        | {"own": one["data_own"][way], "drop": one["drops"][way]}
        for name, one in found["partitions"].items()
        for way in one["data"]
    ]
    print(text_table(rows))
    return found


def rows_of(cache: Path, site: str) -> torch.Tensor:
    """[N, d] the first activations of a harvest."""
    parts, count = [], 0
    for batch in ActivationCache(cache).stream(site).batches():
        parts.append(batch.float())
        count += len(batch)
        if count >= _ROWS:
            break
    return torch.cat(parts)[:_ROWS]


def _baseline(kind: str, of: SubspacePartition, rows: torch.Tensor) -> SubspacePartition:
    made = baseline_partition(kind, of.widths, rows)
    return SubspacePartition(made.rotation, of.widths, {**of.source, **made.source})


def language_model(options: argparse.Namespace) -> dict[str, Any]:
    """What the edges between the sites of some runs are, in short."""
    began = time.process_time()
    model, tests, prompts, exact = options.model, options.tests, options.prompts, options.exact
    partitions = {str(path): load_partition(path) for path in options.runs}
    activations = {}
    if options.activations:
        sites = (partition.source["site"] for partition in partitions.values())
        activations = {site: rows_of(options.activations, site) for site in sites}
    if options.baseline:
        partitions = {
            name: _baseline(options.baseline, one, activations[one.source["site"]])
            for name, one in partitions.items()
        }
    found = run_connections(
        partitions,
        model,
        tests=tests,
        options=ConnectionOptions(prompts=prompts, templates="b", exact=exact),
    )
    print(text_table(connection_rows(found, _EDGES)))
    pairs = [_short(found, pair) for pair in found.pairs]
    if activations:
        for short, pair in zip(pairs, found.pairs, strict=True):
            below = partitions[found.sites[pair.below].partition]
            rows = activations[below.source["site"]]
            short["explained"] = explained(model, pair, below, rows)
    return {
        "model": model,
        "prompts": prompts,
        "templates": "b",
        "exact": exact,
        "threads": torch.get_num_threads(),
        "cpu_seconds": time.process_time() - began,
        "baseline": options.baseline,
        "pairs": pairs,
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
            "effects": [by_edge[one["head"], one["side"], s].effect for s in range(len(tested.subspaces))],
        }
        one["top_share"] = top_share(torch.tensor(one["effects"]))
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
        "mlps": _mlps(pair),
        "skip": {"whole": tested.skip.whole, "effects": tested.skip.effects},
        "run": tested.run,
        "cpu_seconds": tested.cpu_seconds,
    }


def _mlps(pair: Pair) -> dict[str, Any]:
    """The edges into MLPs, and how far weights and first order tell them."""
    assert pair.tested is not None
    edges = mlp_edges(pair)
    return {
        "whole": {str(node.block): node.whole for node in pair.mlps},
        "strongest_edges": [
            {
                "edge": f"s{e.subspace} MLP {e.block}",
                "effect": e.effect,
                "error": e.error,
                "first_order": e.attributed,
                "times_chance": e.times,
                "rank_by_weights": sum(o.times >= e.times for o in edges),
            }
            for e in strongest(edges, 5)
        ],
        "largest_over_heads": max(abs(e.effect or 0.0) for e in edges)
        / max(abs(e.effect or 0.0) for e in pair.edges),
        "agreement": vars(pair.tested.mlp_agreement) if pair.tested.mlp_agreement else None,
    }


@torch.no_grad()
def explained(name: str, pair: Pair, below: SubspacePartition, rows: torch.Tensor) -> dict[str, Any]:
    """Why do weights tell the edges, or not? Scores by weights, and two that also know what varies.

    With C_s the second moments inside of a subspace, the share of a side that acts by A is
    ``tr(C_s R_s' A A' R_s)``, over the same of the whole activation. ``variance``: C of activations on text;
    ``difference``: C of counterfactual less own activation on the test. ``across`` are all edges; ``within``
    the mean over the sides of heads that the whole activation matters to, at least a tenth of the largest.
    ``times_against_variance`` is the rank correlation over subspaces of what sides read over chance, the mean
    over heads, with the variance there.
    """
    model, tokenizer = load_language_model(name, "cpu")
    assert pair.tested is not None
    site, count = below.source["site"], len(pair.tested.texts)
    moved = _differences(model, tokenizer, pair.tested.test, site, count) @ below.rotation
    moments = {
        "variance": torch.cov((rows @ below.rotation).T),
        "difference": moved.T @ moved / len(moved),
    }
    blocks = sorted({e.block for e in pair.edges})
    sizes, whole, scores = [], [], {"weights": [], **{kind: [] for kind in moments}}
    for heads in find_heads(model, blocks):
        weights = head_weights(heads)
        for place, side in enumerate(SIDES):
            own = [e for e in pair.edges if (e.block, e.side) == (heads.block, side)]
            places = [(e.head or 0, e.subspace) for e in own]
            sizes.append(_table([e.effect for e in own], places))
            scores["weights"].append(_table([e.times for e in own], places))
            whole += [abs((n.effects or [])[place]) for n in pair.heads if n.block == heads.block]
            for kind, moment in moments.items():
                scores[kind].append(_varied_shares(weights.acts(side), below, moment))
    size, mattering = torch.cat(sizes), strong(torch.tensor(whole))
    spread = subspace_sums(moments["variance"].diag(), below.widths)
    found: dict[str, Any] = {
        "variance_shares": (spread / spread.sum()).tolist(),
        "sides_that_matter": int(mattering.sum()),
        "times_against_variance": {
            side: rank_correlation(torch.cat(scores["weights"][place :: len(SIDES)]).mean(0), spread)
            for place, side in enumerate(SIDES)
        },
    }
    for kind, parts in scores.items():
        score = torch.cat(parts)
        inside = [_told(one, other) for one, other in zip(score[mattering], size[mattering], strict=True)]
        areas = [one["area"] for one in inside if one["area"] is not None]
        found[kind] = {
            "across": _told(score, size),
            "within": {
                "area": sum(areas) / len(areas) if areas else None,
                "ranks": sum(one["ranks"] for one in inside) / len(inside),
            },
        }
    return found


def _differences(model: Any, tokenizer: Any, test: str, site: str, prompts: int) -> torch.Tensor:
    """[N, d] counterfactual less own activation at the positions that a test patches."""
    made = chosen_tests([test])[0].build(tokenizer, prompts, 0, "b")
    here, there = (pad_prompts(p) for p in (made.prompts, made.counterfactuals))
    columns, used = columns_of(here, made.positions)
    row, place = used.nonzero(as_tuple=True)
    cut = LayersAbove(model, site)
    return (cut.below(there) - cut.below(here))[row, columns[row, place]].float()


def _varied_shares(acts: Factors, below: SubspacePartition, covariance: torch.Tensor) -> torch.Tensor:
    """[n, S]"""
    left = below.rotation.T @ acts.left
    gram = left @ (acts.right @ acts.right.mT) @ left.mT
    parts, end = [], 0
    for width in below.widths:
        own = slice(end, end + width)
        parts.append((gram[:, own, own] * covariance[own, own]).sum((1, 2)))
        end += width
    return torch.stack(parts, 1) / (gram * covariance).sum((1, 2))[:, None]


def _table(values: Sequence[float | None], places: Sequence[tuple[int, int]]) -> torch.Tensor:
    """[n, S] sizes."""
    found = torch.zeros(*(max(axis) + 1 for axis in zip(*places, strict=True)))
    for value, place in zip(values, places, strict=True):
        found[place] = abs(value or 0.0)
    return found


def _told(shares: torch.Tensor, sizes: torch.Tensor) -> dict[str, Any]:
    area = area_under_curve(shares.flatten(), strong(sizes).flatten())
    return {
        "area": None if isnan(area) else area,
        "ranks": rank_correlation(shares.flatten(), sizes.flatten()),
    }


def main() -> None:
    """One part of the record, replaced."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--induction", type=int, nargs="+", metavar="SEED")
    parser.add_argument("--with-mlp", type=int, nargs="*", default=[], metavar="SEED")
    parser.add_argument("--planted", type=int, nargs="+", metavar="SEED")
    parser.add_argument("--starts", type=int, default=4, help="of NDM on the planted model")
    parser.add_argument("--model")
    parser.add_argument("--baseline", help="subspaces instead of those of the runs: pca, random ...")
    parser.add_argument("--label", help="set apart in the record from other runs of the model: seed 1 ...")
    parser.add_argument("--activations", type=Path, help="a harvest of the runs' sites")
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
    for seed in options.planted or ():
        record.setdefault("planted", {})[str(seed)] = {"made_with": made_with} | planted(seed, options.starts)
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    if options.model:
        found = language_model(options)
        parts = [options.model, "exact" if options.exact else None, options.baseline, options.label]
        name = ", ".join(filter(None, parts))
        record.setdefault("language_models", {})[name] = {"made_with": made_with, **found}
    options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
