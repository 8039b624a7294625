"""Does speed cost quality? Held-out distance of every training mode after the same steps, on the demo's data.

    python bench/quality.py --steps 2000 --out bench/results/quality.json

The published scheme is ``exp/1``: matrix exponential, a search at every step, constant rate 3e-4.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from ndm_fast.config import TrainConfig, from_flat
from ndm_fast.harvest import ActivationStream, load_model
from ndm_fast.pool import TensorStream, take_rows
from ndm_fast.presets import preset
from ndm_fast.provenance import provenance
from ndm_fast.report.table import text_table
from ndm_fast.text import open_documents
from ndm_fast.trainer import Trainer

MODES = (("exp", 1), ("lie", 1), ("lie", 8), ("lie", 32))
ALLOWED = 0.005
BATCH = 1024


def harvest(steps: int) -> TensorStream:
    """Enough activations of the demo's model and text for this many steps."""
    config = from_flat(preset("demo"))
    model, tokenizer = load_model(config.harvest.model)
    documents = open_documents(config.harvest.data, seed=config.train.seed)
    stream = ActivationStream(model, tokenizer, config.harvest.site[0], documents, config.harvest)
    train = settings(steps, "lie", 32)
    wanted = train.heldout_queries + train.heldout_keys + train.pool_rows
    # The rest of the batch that completes the held-out rows is not trained on, hence one batch more.
    rows, _ = take_rows(stream.batches(), wanted + BATCH)
    return TensorStream(rows.split(BATCH))


def settings(steps: int, rotation: str, search_every: int, precision: str = "fp32") -> TrainConfig:
    """The published rate and batch, for a number of steps."""
    return TrainConfig(
        rotation=rotation,
        search_every=search_every,
        precision=precision,
        max_steps=steps,
        lr=3e-4,
        schedule="constant",
        warmup_steps=0,
        pool_rows=steps * 128 + 16384,
        eval_every=steps,
    )


def main() -> None:
    """Train every mode, print and write the table; fails where a mode is more than 0.5 % off."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=Path("bench/results/quality.json"))
    options = parser.parse_args()
    stream = harvest(options.steps)
    rows = []
    for rotation, search_every in MODES:
        trainer = Trainer(stream, settings(options.steps, rotation, search_every))
        start = float(trainer.heldout_distance().mean())
        began = time.perf_counter()
        trainer.run()
        rows.append(
            {
                "mode": f"{rotation}/{search_every}",
                "start": start,
                "heldout": trainer.heldout_loss,
                "ms_per_step": 1e3 * (time.perf_counter() - began) / options.steps,
            }
        )
        print(rows[-1], flush=True)
    published = rows[0]["heldout"]
    for row in rows:
        row["relative_to_published"] = row["heldout"] / published - 1
    spread = max(row["heldout"] for row in rows) / min(row["heldout"] for row in rows) - 1
    result = {"steps": options.steps, "modes": rows, "spread": spread, "made_with": provenance()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(text_table(rows))
    print(f"spread {100 * spread:.2f} %, allowed {100 * ALLOWED:.1f} %; threads {torch.get_num_threads()}")
    if spread > ALLOWED:
        raise SystemExit("a mode is farther than 0.5 % from another")


if __name__ == "__main__":
    main()
