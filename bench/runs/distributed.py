"""Do two ranks do what one process does? The demo's run as one process and as two gloo ranks; no timing.

    python bench/runs/distributed.py --steps 160 --heldout-keys 8192 --out bench/results/distributed.json

Held-out loss of ``--parallel queries`` and ``keys`` beside one process, before merging and at the end; and
the neighbors among keys dealt out over two ranks, beside those among all keys, on the demo's activations.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ndm_fast import ops
from ndm_fast.activations.documents import open_documents
from ndm_fast.activations.models import load_model
from ndm_fast.activations.rows import take_rows
from ndm_fast.activations.stream import ActivationStream
from ndm_fast.config import from_flat
from ndm_fast.distributed import together
from ndm_fast.provenance import provenance
from ndm_fast.run.folder import RunFolder
from ndm_fast.run.presets import preset
from ndm_fast.table import text_table
from ndm_fast.train.over_ranks import nearest_neighbors

RANKS = 2
ALLOWED = 0.005
QUERIES, KEYS = 2048, 32_768
_FULL_STEPS = preset("minilm")["max_steps"]


def settings(steps: int, heldout_keys: int) -> dict[str, int]:
    """The demo's schedule, its merging shrunk with the steps."""
    names = ("merge_start", "merge_interval", "eval_every")
    return {
        "max_steps": steps,
        "heldout_keys": heldout_keys,
        **{name: preset("minilm")[name] * steps // _FULL_STEPS for name in names},
    }


def train(ranks: int, parallel: str, changes: dict[str, int], out: Path) -> dict[str, Any]:
    """What a run of the command gives."""
    launcher = ["torch.distributed.run", "--nproc-per-node", str(ranks), "-m"] if ranks > 1 else []
    command = [sys.executable, "-m", *launcher, "ndm_fast", "train", "--preset", "minilm", "--quiet"]
    command += ["--out", str(out), "--parallel", parallel]
    for name, value in changes.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    folder = RunFolder(out)
    before = next(e for e in folder.events("evaluate") if e["step"] == changes["merge_start"])
    return {
        "parallel": parallel if ranks > 1 else "one process",
        "ranks": ranks,
        "before_merging": before["heldout_loss"],
        "at_the_end": folder.result()["heldout_loss"],
        "widths": folder.result()["widths"],
    }


def activations() -> Tensor:
    """[QUERIES + KEYS, d] of the demo's model and text, which holds many equal rows."""
    config = from_flat(preset("minilm"))
    model, tokenizer = load_model(config.harvest.model)
    documents = open_documents(config.harvest.data, seed=config.train.seed)
    stream = ActivationStream(model, tokenizer, config.harvest.site[0], documents, config.harvest)
    return take_rows(stream.batches(), QUERIES + KEYS)[0]


def search(rank: int, port: int, file: Path) -> None:
    """One rank's part of a search among keys dealt out over the ranks; rank 0 saves the outcome."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "MASTER_PORT": port}
    os.environ.update({"MASTER_ADDR": "127.0.0.1", **{name: str(v) for name, v in names.items()}})
    rows, rotation, widths = torch.load(file)
    with together("keys", "cpu") as group:
        keys = group.keys.share(rows[QUERIES:])
        found = {
            precision: tuple(
                nearest_neighbors(group.keys, rows[:QUERIES], keys, rotation, widths, "euclidean", precision)
            )
            for precision in ("fp32", "bf16")
        }
    if rank == 0:
        torch.save(found, file.with_suffix(".found"))


def neighbors(run: Path, scratch: Path) -> list[dict[str, Any]]:
    """How many neighbors among dealt-out keys differ from those among all keys, in a trained rotation."""
    partition, rows = RunFolder(run).partition(), activations()
    file = scratch / "rows.pt"
    torch.save((rows, partition.rotation, list(partition.widths)), file)
    torch.multiprocessing.spawn(search, (29_513, file), nprocs=RANKS)
    found = torch.load(file.with_suffix(".found"))
    compared = []
    for precision, (distance, index) in found.items():
        alone = ops.nearest_neighbors(
            rows[:QUERIES], rows[QUERIES:], partition.rotation, partition.widths, precision=precision
        )
        compared.append(
            {
                "precision": precision,
                "neighbors": index.numel(),
                "different": int((index != alone.index).sum()),
                "largest_relative_difference": float(
                    (distance / alone.distance - 1).nan_to_num().abs().max()
                ),
            }
        )
    return compared


def main() -> None:
    """Run, print and write; fails where a loss is 0.5 % off or an fp32 neighbor differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=_FULL_STEPS)
    parser.add_argument("--heldout-keys", type=int, default=preset("minilm")["heldout_keys"])
    parser.add_argument("--out", type=Path, default=Path("bench/results/distributed.json"))
    options = parser.parse_args()
    changes = settings(options.steps, options.heldout_keys)
    runs = []
    with tempfile.TemporaryDirectory() as scratch:
        for ranks, parallel in ((1, "auto"), (RANKS, "queries"), (RANKS, "keys")):
            runs.append(train(ranks, parallel, changes, Path(scratch) / parallel))
            print(runs[-1], flush=True)
        compared = neighbors(Path(scratch) / "auto", Path(scratch))
    for run in runs:
        for name in ("before_merging", "at_the_end"):
            run[f"{name}_relative"] = run[name] / runs[0][name] - 1
    result = {"preset": "minilm", **changes, "runs": runs, "neighbors": compared, "made_with": provenance()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(text_table(runs), text_table(compared), sep="\n")
    off = max(abs(run[f"{name}_relative"]) for run in runs for name in ("before_merging", "at_the_end"))
    different = compared[0]["different"]
    if off > ALLOWED or different:
        raise SystemExit(f"losses up to {100 * off:.2f} % apart, allowed 0.5 %; {different} other neighbors")


if __name__ == "__main__":
    main()
