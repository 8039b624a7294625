"""Do NDM's subspaces carry the variables of a language model's circuit, better than the baselines'?

    ndm-fast evaluate trace --model MODEL --out trace         # names a site for each test
    ndm-fast harvest --model MODEL --site x16.post x17.post x20.post x24.post --data TEXT --rows 240000 \\
        --context-length 256 --bos --max-norm-ratio 3 --out acts
    ndm-fast train --preset language-model --acts acts --repeat-data --seed 0 --out runs/seed0     # and 1, 2
    python bench/claims/language_model.py --model MODEL --test 1 --data TEXT \\
        runs/seed?/blocks.16.hook_resid_post

MODEL is smollm2, or gemma3-270m with the blocks of its own trace. One circuit test at one site, for the runs
of several seeds. Prompts come from template set b; settings were chosen on SmolLM2 with set a. Baselines have
the same widths. DAS saw labels: it says what is possible. Every partition is written down as soon as it is
measured; one that the record holds, at the same site and prompts, is not measured again, so that more seeds
can come later.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # not the root: its `kernels` hides another

from measuring import RESULTS
from tqdm import tqdm

from ndm_fast.activations.site_rows import site_activations
from ndm_fast.config import from_flat
from ndm_fast.drawing import BLUE, GREY, VERMILION, new_figure, save_figure, style
from ndm_fast.evaluate.baselines import STANDARD_BASELINES, baseline_partition
from ndm_fast.evaluate.circuits.circuits import circuit_effects
from ndm_fast.evaluate.circuits.prompts import TESTS
from ndm_fast.evaluate.circuits.results import MethodResult
from ndm_fast.evaluate.circuits.yardsticks import yardstick_partitions
from ndm_fast.evaluate.patching.language_model import load_language_model
from ndm_fast.partition import SubspacePartition
from ndm_fast.provenance import provenance
from ndm_fast.run.folder import RunFolder
from ndm_fast.run.presets import preset
from ndm_fast.table import text_table

PRESET = dataclasses.asdict(from_flat(preset("language-model")).train)
del PRESET["seed"]
_TRAINING_PROMPTS = 256


class Bench:
    """One test at the site of the first partition, and the record that its rows go into."""

    def __init__(self, options: argparse.Namespace, found: dict[str, SubspacePartition]) -> None:
        self.options, self.out = options, options.out or _record_of(options.model)
        self.model, self.tokenizer = load_language_model(options.model, "cpu")
        self.first = next(iter(found.values()))
        self.site = self.first.source["site"]
        given = {"data": options.data, "context_length": 256, "rows": 16384}
        self.activations = site_activations(self.model, self.tokenizer, self.site, self.first.source, **given)
        test = TESTS[options.test]
        self.prompts = test.build(self.tokenizer, options.prompts, 0, options.templates)
        self.made_with = provenance()
        about = {
            "model": options.model,
            "test": options.test,
            "what": test.what,
            "site": self.site,
            "prompts": options.prompts,
            "templates": options.templates,
        }
        self.others, earlier = self._earlier()
        same = earlier if all(earlier.get(name) == value for name, value in about.items()) else {}
        self.record = {**about, "rows": same.get("rows", []), "made_with": self.made_with}

    def _earlier(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The record's other tests, and what it holds of this one."""
        tests = json.loads(self.out.read_text())["tests"] if self.out.exists() else []
        mine = [
            one for one in tests if (one["model"], one["test"]) == (self.options.model, self.options.test)
        ]
        return [one for one in tests if one not in mine], mine[0] if mine else {}

    def measure(self, name: str, partition: SubspacePartition, loss: float | None = None) -> None:
        """One more row, written down at once, unless the record has it already."""
        rows = [row for row in self.record["rows"] if row["method"] != name]
        if any(row["method"] == name and row["heldout_loss"] == loss for row in self.record["rows"]):
            return
        began = time.monotonic(), time.process_time()
        found = circuit_effects(
            self.model, self.site, partition, self.prompts, self.activations, complement=False, rows=64
        )
        row = row_of(name, found, loss) | {
            "seconds": time.monotonic() - began[0],
            "cpu_seconds": time.process_time() - began[1],
            "commit": self.made_with["commit"],
        }
        self.record["rows"] = sorted([*rows, row], key=lambda one: not one["method"].startswith("ndm"))
        self.out.write_text(json.dumps({"tests": self.tests()}, indent=1) + "\n")

    def tests(self) -> list[dict[str, Any]]:
        """All of the record, in order."""
        return sorted([*self.others, self.record], key=lambda one: (one["model"], one["test"]))

    def yardsticks(self, first: str) -> None:
        """DAS and the singular vectors, as wide as the best subspace of the first partition, of this name."""
        training = TESTS[self.options.test].build(self.tokenizer, _TRAINING_PROMPTS, 1, "a")
        best = next(row["best"] for row in self.record["rows"] if row["method"] == first)
        steps = self.options.das_steps
        made = yardstick_partitions(self.model, self.site, training, self.first.widths, best, steps=steps)
        for kind in ("das", "svd"):
            self.measure(f"{kind} (saw labels)", made[kind])


def _record_of(model: str) -> Path:
    return RESULTS / ("language-model.json" if model == "smollm2" else f"language-model-{model}.json")


def trained(paths: list[Path]) -> dict[str, tuple[SubspacePartition, float]]:
    """NDM's partitions by seed and what their settings change of the preset, with their held-out losses."""
    found = {}
    for folder in map(RunFolder, paths):
        settings = dataclasses.asdict(folder.config().train)
        changed = [f", {key} {settings[key]}" for key, value in PRESET.items() if settings[key] != value]
        name = f"ndm seed {settings['seed']}{''.join(changed)}"
        found[name] = folder.partition(), folder.result()["heldout_loss"]
    return found


def baselines(first: SubspacePartition, random_seeds: int) -> list[tuple[str, str, int]]:
    """Name, kind and seed of each."""
    found = []
    for kind in STANDARD_BASELINES:
        if kind == "pca_ascending" and len(set(first.widths)) == 1:
            continue  # the subspaces of pca_descending, in another order
        seeds = range(random_seeds if kind == "random" else 1)
        found += [(f"{kind} {seed}" if kind == "random" else kind, kind, seed) for seed in seeds]
    return found


def row_of(name: str, found: MethodResult, loss: float | None) -> dict[str, Any]:
    """What is recorded of one partition."""
    return {
        "method": name,
        "mean_gini": found.mean_gini,
        "gini": found.gini,
        "interval": found.gini_interval,
        "best_of_whole": found.share_of_whole[found.best],
        "best": found.best,
        "clean": found.clean,
        "whole": found.whole,
        "effect": found.effect,
        "variance": found.variance,
        "widths": found.widths,
        "heldout_loss": loss,
    }


def draw(tests: list[dict[str, Any]], path: Path) -> None:
    """A panel for each test: each subspace's share of the whole effect, the largest first."""
    with style():
        figure = new_figure(3.1 * len(tests), 3.0)
        for axes, test in zip(figure.subplots(1, len(tests), squeeze=False)[0], tests, strict=True):
            by_method = {row["method"]: row for row in test["rows"]}
            first = test["rows"][0]["method"]
            for name, label, color in (
                (first, "NDM", BLUE),
                ("pca_descending", "PCA", VERMILION),
                ("identity", "identity", GREY),
            ):
                row = by_method[name]
                shares = sorted((effect / row["whole"] for effect in row["effect"]), reverse=True)
                axes.plot(range(1, len(shares) + 1), shares, "o-", markersize=3, color=color, label=label)
            axes.axhline(0, color=GREY, linewidth=0.8)
            block, what = test["site"].split(".")[1], test["what"].removeprefix("IOI ").split(",")[0]
            axes.set_title(f"test {test['test']}: {what}\nafter block {block}", loc="left")
            axes.set_xlabel("subspace, by effect")
            axes.set_ylabel("share of the whole effect")
            axes.legend()
        save_figure(figure, path)


def main() -> None:
    """One test, added to the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--test", default="1", choices=list(TESTS))
    parser.add_argument("--data", required=True)
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--templates", default="b")
    parser.add_argument("--random-seeds", type=int, default=2)
    parser.add_argument("--das-steps", type=int, default=100, help="0: no DAS")
    parser.add_argument("--figure", type=Path, help="the tests of this model as a picture")
    parser.add_argument("--out", type=Path, help="default: the record of this model in bench/results")
    options = parser.parse_args()
    found = trained(options.runs)
    bench = Bench(options, {name: partition for name, (partition, _) in found.items()})
    for name, (partition, loss) in tqdm(found.items(), desc=f"test {options.test}"):
        bench.measure(name, partition, loss)
    for name, kind, seed in tqdm(baselines(bench.first, options.random_seeds), desc="baselines"):
        bench.measure(name, baseline_partition(kind, bench.first.widths, bench.activations, seed))
    if options.das_steps:
        bench.yardsticks(next(iter(found)))
    if options.figure:
        draw([one for one in bench.tests() if one["model"] == options.model], options.figure)
    shown = ("method", "mean_gini", "best_of_whole", "heldout_loss")
    rows = bench.record["rows"]
    print(text_table([{name: row[name] for name in shown} | row["gini"] for row in rows]))


if __name__ == "__main__":
    main()
