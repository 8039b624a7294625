"""Do NDM's subspaces carry the variables of a language model's circuit, better than the baselines'?

    ndm-fast harvest --model smollm2 --site x16.post x17.post x20.post x24.post --data TEXT --rows 240000 \\
        --context-length 256 --bos --max-norm-ratio 3 --out acts
    ndm-fast train --preset language-model --acts acts --repeat-data --seed 0 --out runs/seed0     # and 1, 2
    python bench/claims/language_model.py --test 1 --data TEXT runs/seed?/blocks.16.hook_resid_post

One circuit test at one site, for partitions of several seeds. Prompts come from template set b;
settings were chosen on the templates of set a. Baselines have the same widths and are measured once. DAS saw
labels: it says what is possible. The result goes into a file in place of an earlier one of the same model and
test.
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
from tqdm import tqdm

from ndm_fast.activations.site_rows import site_activations
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
from ndm_fast.run.load import load_partition
from ndm_fast.table import text_table

_TRAINING_PROMPTS = 256


def partitions_of(options: argparse.Namespace) -> dict[str, tuple[SubspacePartition, float | None]]:
    """By name: NDM's with their held-out losses, then the baselines."""
    model, tokenizer = load_language_model(options.model, "cpu")
    found: dict[str, tuple[SubspacePartition, float | None]] = {}
    for path in options.partitions:
        partition = load_partition(path)
        loss = RunFolder(path).result()["heldout_loss"] if (path / "result.json").exists() else None
        found[f"ndm {path.parent.name if path.name.startswith('blocks') else path.name}"] = partition, loss
    first = next(iter(found.values()))[0]
    given = {"data": options.data, "context_length": 256, "rows": 16384}
    rows = site_activations(model, tokenizer, first.source["site"], first.source, **given)
    options.rows, options.loaded = rows, (model, tokenizer)
    for kind in STANDARD_BASELINES:
        if kind == "pca_ascending" and len(set(first.widths)) == 1:
            continue  # the subspaces of pca_descending, in another order
        for seed in range(options.random_seeds if kind == "random" else 1):
            name = f"{kind} {seed}" if kind == "random" else kind
            found[name] = baseline_partition(kind, first.widths, rows, seed), None
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
    parser.add_argument("partitions", nargs="+", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--test", default="1", choices=list(TESTS))
    parser.add_argument("--data", required=True)
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--templates", default="b")
    parser.add_argument("--random-seeds", type=int, default=2)
    parser.add_argument("--das-steps", type=int, default=100, help="0: no DAS")
    parser.add_argument("--figure", type=Path, help="the tests of this model as a picture")
    parser.add_argument("--out", type=Path, default=RESULTS / "language-model.json")
    options = parser.parse_args()
    began = time.monotonic(), time.process_time()
    partitions = partitions_of(options)
    model, tokenizer = options.loaded
    site = next(iter(partitions.values()))[0].source["site"]
    made = TESTS[options.test].build(tokenizer, options.prompts, 0, options.templates)
    measured = {"complement": False, "rows": 64}
    rows = []
    for name, (partition, loss) in tqdm(partitions.items(), desc=f"test {options.test}"):
        found = circuit_effects(model, site, partition, made, options.rows, **measured)
        rows.append(row_of(name, found, loss))
    if options.das_steps:
        training = TESTS[options.test].build(tokenizer, _TRAINING_PROMPTS, 1, "a")
        best = next(iter(partitions.values()))[0]
        sticks = yardstick_partitions(
            model, site, training, best.widths, rows[0]["best"], steps=options.das_steps
        )
        for name in ("das", "svd"):
            found = circuit_effects(model, site, sticks[name], made, options.rows, **measured)
            rows.append(row_of(f"{name} (saw labels)", found, None))
    result = {
        "model": options.model,
        "test": options.test,
        "what": TESTS[options.test].what,
        "site": site,
        "prompts": options.prompts,
        "templates": options.templates,
        "seconds": time.monotonic() - began[0],
        "cpu_seconds": time.process_time() - began[1],
        "rows": rows,
        "made_with": provenance(),
    }
    earlier = json.loads(options.out.read_text())["tests"] if options.out.exists() else []
    key = (options.model, options.test)
    kept = [one for one in earlier if (one["model"], one["test"]) != key]
    tests = sorted([*kept, result], key=lambda one: (one["model"], one["test"]))
    options.out.write_text(json.dumps({"tests": tests}, indent=1) + "\n")
    if options.figure:
        draw([one for one in tests if one["model"] == options.model], options.figure)
    shown = ("method", "mean_gini", "best_of_whole", "heldout_loss")
    print(text_table([{name: row[name] for name in shown} | row["gini"] for row in rows]))


if __name__ == "__main__":
    main()
