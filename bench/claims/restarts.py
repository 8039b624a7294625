"""Do re-initialisations of pairs pay on a real model? Held-out loss at equal steps, MiniLM layer 3.

    python bench/claims/restarts.py --steps 1000 --seeds 0 1 2 --out bench/results/restarts.json

Three ways to spend the same steps: one plain run; one run whose second half goes to re-initialised pairs,
each kept only where the held-out loss fell; two starts (identity, random) of half the steps each, the better
one counts. Times are given: estimates of information, which choose the pairs, come on top of the steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

from ndm_fast.activations.documents import open_documents
from ndm_fast.activations.models import load_model
from ndm_fast.activations.rows import TensorStream, take_rows
from ndm_fast.activations.stream import ActivationStream
from ndm_fast.config import RunSettings, TrainConfig, from_flat
from ndm_fast.provenance import provenance
from ndm_fast.run.presets import preset
from ndm_fast.table import text_table
from ndm_fast.train.trainer import Trainer

BATCH = 1024


def harvest(train: TrainConfig) -> TensorStream:
    """Activations of the demo's model and text, enough for these settings."""
    config = from_flat(preset("minilm"))
    model, tokenizer = load_model(config.harvest.model)
    documents = open_documents(config.harvest.data)
    stream = ActivationStream(model, tokenizer, config.harvest.site[0], documents, config.harvest)
    wanted = train.heldout_queries + train.heldout_keys + train.pool_rows + 2 * BATCH
    return TensorStream(take_rows(stream.batches(), wanted)[0].split(BATCH))


def ways(base: TrainConfig) -> dict[str, list[TrainConfig]]:
    """What each way trains; of several trainings the one of lowest loss counts."""
    half = base.max_steps // 2
    tries = 4
    escapes = dataclasses.replace(base, escape_tries=tries, escape_steps=half // tries)
    starts = [dataclasses.replace(base, max_steps=half, start=start) for start in ("identity", "random")]
    return {"plain": [base], "pairs re-initialised": [escapes], "best of two starts": starts}


def main() -> None:
    """Train every way with every seed, print and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("bench/results/restarts.json"))
    options = parser.parse_args()
    base = TrainConfig(
        lr=1e-2,
        search_every=8,
        max_steps=options.steps,
        pool_rows=options.steps * 128 + 16384,
    )
    rarely = RunSettings(eval_every=options.steps, checkpoint_every=options.steps)
    stream = harvest(base)
    rows = []
    for seed in options.seeds:
        for name, trainings in ways(dataclasses.replace(base, seed=seed)).items():
            began = time.perf_counter()
            losses = []
            for train in trainings:
                trainer = Trainer(stream, train, settings=rarely)
                trainer.run()
                losses.append(trainer.heldout_loss)
            spent = time.perf_counter() - began
            rows.append({"seed": seed, "way": name, "heldout_loss": min(losses), "seconds": spent})
            print(rows[-1], flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    about = {"steps": options.steps, "made_with": provenance()}
    options.out.write_text(json.dumps({**about, "runs": rows}, indent=1) + "\n")
    print(text_table(rows))


if __name__ == "__main__":
    main()
