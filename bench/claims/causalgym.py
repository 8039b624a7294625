"""Which subspace tells CausalGym's minimal pairs apart? Pairs are drawn from its templates, which stay there.

git clone https://github.com/aryamanarora/causalgym
OMP_NUM_THREADS=1 python bench/claims/causalgym.py causalgym/data/templates/syntaxgym.json --run RUN
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ndm_fast.evaluate.causalgym import SpanEffects, causalgym_rows, run_causalgym
from ndm_fast.evaluate.minimal_pairs import read_pairs
from ndm_fast.provenance import provenance
from ndm_fast.run.load import load_partition
from ndm_fast.table import text_table

TASKS = (
    "agr_gender",
    "agr_sv_num_pp",
    "npi_ever_subj-relc",
    "garden_npz_v-trans",
    "gss_subord",
    "filler_gap_obj",
)
"""Of each of its five groups one or two."""

_VARIABLE = re.compile(r"( ?\{[^}]+\})")
"""A span: a variable with the space before it; what stands between two variables is another."""


def draw(template: dict[str, Any], task: str, count: int) -> list[dict[str, Any]]:
    """``count`` pairs of one task: half of them, then the same with their sides swapped."""
    rng, found = random.Random(task), {}
    while len(found) < count // 2:
        pair = _pair(template, task, rng)
        found.setdefault(frozenset(("".join(pair["base"]), "".join(pair["src"]))), pair)
    return [*found.values(), *map(_swapped, found.values())]


def _pair(template: dict[str, Any], task: str, rng: random.Random) -> dict[str, Any]:
    types = rng.sample(sorted(template["labels"]), 2)
    feature = template["label"] if isinstance(template["label"], list) else [template["label"]]
    spans: list[list[str]] = [[], []]
    for text in filter(None, _VARIABLE.split("<|endoftext|>" + template["templates"][0])):
        name = text.strip(" {}") if _VARIABLE.fullmatch(text) else None
        if name is None:
            values = [text, text]
        elif name in feature:
            values = [rng.choice(template["variables"][name][kind]) for kind in types]
        else:
            values = [rng.choice(template["variables"][name])] * 2
        before = " " if name is not None and text.startswith(" ") else ""
        for side, value in zip(spans, values, strict=True):
            side.append(value if name is None else before + value)
    space = " " if template["result_prepend_space"] else ""
    labels = [space + rng.choice(template["labels"][kind]) for kind in types]
    pair: dict[str, Any] = {"task": task}
    for side, name in enumerate(("base", "src")):
        pair |= {name: spans[side], f"{name}_type": types[side], f"{name}_label": labels[side]}
    return pair


def _swapped(pair: dict[str, Any]) -> dict[str, Any]:
    def other(name: str) -> str:
        return name.replace("base", "src") if "base" in name else name.replace("src", "base")

    return {other(name): value for name, value in pair.items()}


def shares(found: list[SpanEffects]) -> dict[str, float]:
    """Method -> mean over tasks of the share of the whole effect that its best subspace has."""
    return {
        kind: sum(f.effect[kind][f.best[kind]] / f.whole for f in found) / len(found)
        for kind in found[0].effect
    }


def main() -> None:
    """Draw the pairs, patch, print the table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("templates", type=Path, help="data/templates/syntaxgym.json of CausalGym")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--run", nargs="+", required=True, help="run folders, of one site and several seeds")
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--pairs", type=int, default=24, help="of each task; half of them choose")
    parser.add_argument("--draw", type=Path, default=Path("runs/causalgym/pairs.json"), help="where pairs go")
    parser.add_argument("--out", type=Path, default=None, help="default: bench/results/causalgym-MODEL.json")
    options = parser.parse_args()
    templates = json.loads(options.templates.read_text())
    pairs = [pair for task in options.tasks for pair in draw(templates[task], task, options.pairs)]
    options.draw.parent.mkdir(parents=True, exist_ok=True)
    options.draw.write_text(json.dumps(pairs))
    out = options.out or Path(f"bench/results/causalgym-{options.model}.json")
    results = []
    for run in options.run:
        before = time.process_time()
        partition = load_partition(run)
        found = run_causalgym(partition, read_pairs(options.draw), options.model, choose=True, rows=192)
        print(text_table(causalgym_rows(found)), shares(found), sep="\n", flush=True)
        tasks = [{k: v for k, v in asdict(each).items() if k != "text"} for each in found]
        results.append(
            {
                "site": partition.source["site"],
                "widths": list(partition.widths),
                "share_of_whole": shares(found),
                "tasks": tasks,
                "cpu_seconds": round(time.process_time() - before),
            }
        )
        record = {"model": options.model, "pairs": options.pairs, "runs": results, "made_with": provenance()}
        out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
