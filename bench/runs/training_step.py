"""One training step on the CPU: ours beside the published scheme in eager torch, and the loss both reach.

    python bench/runs/training_step.py [--steps N] [--out FILE]

Activations of the demo's model and text, d 384, 32-wide subspaces, 16,384 keys, 128 queries, rate 3e-4. Both
train for the same number of steps, in turns of 32, so that a busy machine is busy for both; then the held-out
loss of both is measured by the fp64 oracle.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # not the root: its `kernels` hides another

from measuring import result_file, seconds, spread, times_faster, verdict, write_results
from published import PublishedTrainer
from quality import harvest, settings

from ndm_fast.activations.pool import ActivationPool, PoolConfig
from ndm_fast.activations.rows import take_rows
from ndm_fast.geometry import reference
from ndm_fast.train.trainer import Observer, Trainer

TURN = 32
QUERIES, KEYS, UNIT = 128, 16384, 32
GOAL, SAME_LOSS = 10.0, 0.005
HELDOUT = 1024
PRECISIONS = ("fp32", "bf16")


def measure(steps: int) -> list[dict[str, Any]]:
    """A row per precision of our search."""
    stream = harvest(steps)
    config = settings(steps, "lie", TURN)
    heldout, batches = take_rows(stream.batches(), config.heldout_queries + config.heldout_keys)
    heldout = heldout[torch.randperm(len(heldout), generator=torch.Generator().manual_seed(0))]
    ours = {name: Trainer(stream, settings(steps, "lie", TURN, precision=name)) for name in PRECISIONS}
    widths = config.widths(heldout.shape[1])
    pool = ActivationPool(stream, PoolConfig(config.pool_rows, KEYS, first_batch=batches))
    published = PublishedTrainer(heldout.shape[1], widths, lr=config.lr)

    def published_turn() -> None:
        for _ in range(TURN):
            published.step(pool.take(QUERIES), pool.next_keys())

    times: dict[str, list[float]] = {name: [] for name in ("published", *PRECISIONS)}
    for _ in range(steps // TURN):
        times["published"].append(seconds(published_turn))
        for name, trainer in ours.items():
            times[name].append(seconds(lambda trainer=trainer: trainer.train_block(TURN, Observer())))
    times = {name: values[1:] for name, values in times.items()}  # the first turn warms up
    before = heldout_loss(heldout, published.rotation, widths)
    rows = []
    for name, trainer in ours.items():
        after = heldout_loss(heldout, trainer.rotation.matrix, widths)
        rows.append(
            {
                "d": heldout.shape[1],
                "steps": steps,
                "precision": name,
                "ms_per_step": {
                    who: spread([1e3 * t / TURN for t in times[who]]) for who in ("published", name)
                },
                "times_published": times_faster(times, name, "published"),
                "heldout": {"published": before, "ours": after},
                "heldout_difference": after / before - 1,
            }
        )
    return rows


def heldout_loss(rows: torch.Tensor, rotation: torch.Tensor, widths: tuple[int, ...]) -> float:
    """Mean distance of held-out queries to their nearest held-out keys, by the fp64 oracle."""
    queries, keys = rows[:HELDOUT], rows[HELDOUT:]
    return float(reference.nearest_neighbors(queries, keys, rotation, widths).distance.mean())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1024)
    parser.add_argument("--out", type=Path, default=result_file("training-step"))
    options = parser.parse_args()
    print(
        f"{'search':>6} | {'published':>9} {'ours':>6} ms | {'times':>5}        | "
        "held-out loss: published, ours"
    )
    rows = measure(options.steps)
    for row in rows:
        took = {name: values["median"] for name, values in row["ms_per_step"].items()}
        loss, times, difference = row["heldout"], row["times_published"], row["heldout_difference"]
        print(
            f"{row['precision']:>6} | {took['published']:>9.1f} {took[row['precision']]:>6.1f}    | "
            f"{times:>5.1f} {verdict(times, GOAL):>6} | {loss['published']:.4f}, {loss['ours']:.4f} "
            f"({100 * difference:+.2f} %, {verdict(difference, SAME_LOSS, at_most=True)})"
        )
    write_results(options.out, rows)


if __name__ == "__main__":
    main()
