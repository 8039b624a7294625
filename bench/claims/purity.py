"""What the subspaces of a language model hold, and whether a circuit test points at the one that says so.

    python bench/claims/purity.py --model smollm2 --test 1 runs/seed?/blocks.16.hook_resid_post

Purity of each run on the rows that its training held out, beside PCA. Beside the usual labels one of
induction: the token that followed the last earlier occurrence of the current one in the same text, which is
what an induction head finds. The test's subspace is read from the record of `bench/claims/language_model.py`.
Results go into `bench/results/purity.json`, one entry for each model and test; --figure draws all of a test.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))  # not the root: its `kernels` hides another

from measuring import RESULTS
from tqdm import tqdm

from ndm_fast.activations.rows import TokenRows
from ndm_fast.drawing import BLUE, GREY, VERMILION, new_figure, save_figure, style
from ndm_fast.evaluate.baselines import baseline_partition
from ndm_fast.evaluate.purity.purity import held_out_rows, neighbor_purity
from ndm_fast.provenance import provenance
from ndm_fast.run.folder import RunFolder
from ndm_fast.seeds import Draw, seeded
from ndm_fast.table import text_table

RECORD = RESULTS / "purity.json"
SHOWN = {
    "same_token": "current token",
    "same_previous_token": "previous token",
    "same_next_token": "next token",
    "position_within_3": "position",
    "same_induction": "induction",
}


def induction_tokens(rows: TokenRows) -> Tensor:
    """[N] the token that followed the last earlier occurrence of each row's token in its text.

    Rows are in the order of the text. A token that did not occur before gets a negative number of its own,
    so that it agrees with nothing.
    """
    columns = (rows.token, rows.next_token, rows.position, rows.document)
    found, follower, before = [], {}, (-1, -1)
    for number, (token, following, position, document) in enumerate(
        zip(*(c.tolist() for c in columns), strict=True)
    ):
        if document != before[0] or position <= before[1]:
            follower = {}
        found.append(follower.get(token, -2 - number))
        follower[token], before = following, (document, position)
    return torch.tensor(found)


def labelled(folder: RunFolder) -> tuple[TokenRows, TokenRows, dict[str, tuple[Tensor, Tensor]]]:
    """The queries and keys that a run held out, with the label of induction for both."""
    queries, keys = held_out_rows(folder)
    together = TokenRows(*(torch.cat(both) for both in zip(queries, keys, strict=True)))
    order = torch.randperm(len(together.token), generator=seeded(folder.config().train.seed, Draw.HELD_OUT))
    in_text = TokenRows(*(column[order.argsort()] for column in together))
    labels = induction_tokens(in_text)[order]
    return queries, keys, {"induction": (labels[: len(queries.token)], labels[len(queries.token) :])}


def measured(folder: RunFolder, test: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A row for NDM and one for PCA of the same widths."""
    partition, seed = folder.partition(), folder.config().train.seed
    queries, keys, labels = labelled(folder)
    pca = baseline_partition("pca_descending", partition.widths, keys.activations)
    found = []
    for method, name, one in (("NDM", f"ndm seed {seed}", partition), ("PCA", "pca_descending", pca)):
        purity = neighbor_purity(queries, keys, one, labels=labels)
        # the record holds other settings of the same seed too: the loss tells which run this is
        loss = folder.result()["heldout_loss"] if method == "NDM" else None
        rows = [r for r in (test or {"rows": []})["rows"] if r["method"].startswith(name)]
        named = next((row["best"] for row in rows if row["heldout_loss"] == loss), None)
        found.append({"method": method, "seed": seed, "test_names": named, "subspaces": purity})
    return found


def record_of(model: str, test: str) -> dict[str, Any] | None:
    """What `bench/claims/language_model.py` measured of this test."""
    path = RESULTS / ("language-model.json" if model == "smollm2" else f"language-model-{model}.json")
    tests = json.loads(path.read_text())["tests"] if path.exists() else []
    return next((one for one in tests if (one["model"], one["test"]) == (model, test)), None)


def draw(entries: list[dict[str, Any]], path: Path) -> None:
    """For each model and test: every subspace by what its neighbors share, the test's own filled."""
    with style():
        figure = new_figure(4.2 * len(entries), 3.4)
        for axes, entry in zip(figure.subplots(1, len(entries), squeeze=False)[0], entries, strict=True):
            for method, color in (("PCA", VERMILION), ("NDM", BLUE)):
                for row in (one for one in entry["rows"] if one["method"] == method):
                    at = [(s["same_token"], s["same_previous_token"]) for s in row["subspaces"]]
                    label = method if row["seed"] == entry["rows"][0]["seed"] else None
                    axes.plot(*zip(*at, strict=True), "o", markersize=5, mfc="none", color=color, label=label)
                    if method == "NDM" and row["test_names"] is not None:
                        axes.plot(*at[row["test_names"]], "o", markersize=7, color=color)
            axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8)
            block = entry["site"].split(".")[1]
            axes.set_title(
                f"{entry['model']}, block {block}\nfilled: named by test {entry['test']}", loc="left"
            )
            axes.set_xlabel("nearest neighbor has the same token")
            axes.set_ylabel("... the same previous token")
            axes.legend(loc="lower right")
        save_figure(figure, path)


def main() -> None:
    """One model and test, added to the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--test", default="1")
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    test = record_of(options.model, options.test)
    folders = [RunFolder(path) for path in options.runs]
    rows = [row for folder in tqdm(folders, desc="runs") for row in measured(folder, test)]
    entry = {
        "model": options.model,
        "test": options.test,
        "site": folders[0].config().harvest.site[0],
        "rows": rows,
        "made_with": provenance(),
    }
    entries = json.loads(RECORD.read_text())["entries"] if RECORD.exists() else []
    mine = (options.model, options.test)
    entries = [one for one in entries if (one["model"], one["test"]) != mine] + [entry]
    entries.sort(key=lambda one: (one["test"], one["model"] != "smollm2"))
    RECORD.write_text(json.dumps({"entries": entries}, indent=1) + "\n")
    if options.figure:
        draw([one for one in entries if one["test"] == options.test], options.figure)
    for row in rows:
        print(f"\n{row['method']} seed {row['seed']}; test {options.test} names {row['test_names']}")
        kept = [
            {"s": s["subspace"], **{SHOWN[n]: s[n] for n in SHOWN}, "reading": s["reading"]}
            for s in row["subspaces"]
        ]
        print(text_table(kept))


if __name__ == "__main__":
    main()
