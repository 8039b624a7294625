"""How long until the held-out loss that the published scheme has after 2,000 steps? On the demo's data.

    python bench/runs/time_to_loss.py [--steps N] [--out FILE] [--figure FILE]

The published scheme is eager torch (``published.py``): rate 3e-4, a search at every step, 16,384 keys, 128
queries, matrix exponential. Every contender of ours is trained to the end of its schedule; all are measured
with the same held-out rows, outside of the time. The goal is the target in a 50th of the published time.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # not the root: its `kernels` hides another

from measuring import result_file, seconds, verdict, write_results
from published import PublishedTrainer
from quality import harvest, settings

from ndm_fast import nearest_neighbors
from ndm_fast.activations.pool import ActivationPool, PoolConfig
from ndm_fast.activations.rows import TensorStream, take_rows
from ndm_fast.config import TrainConfig
from ndm_fast.seeds import Draw, seeded
from ndm_fast.table import text_table
from ndm_fast.train.trainer import Observer, Trainer

GOAL = 50.0
POINTS = 20
"""Measurements of the loss along a run."""
ENOUGH = 512
"""Steps of 128 queries for which activations are harvested at least: what our longest run takes."""
DECAYED: dict[str, Any] = {"schedule": "linear", "warmup_steps": 20, "precision": "bf16"}
LAZY: dict[str, Any] = {**DECAYED, "rotation": "lazy", "lr": 2e-2, "queries": 256, "max_steps": 128}
CONTENDERS: dict[str, dict[str, Any]] = {
    "lie, rate 3e-4, 32 steps a search": {"precision": "bf16"},
    "lie, 1e-2 decayed, 8 steps a search": {**DECAYED, "lr": 1e-2, "search_every": 8, "max_steps": 320},
    "lazy, 2e-2 decayed, 4,096 keys": {**LAZY, "keys": 4096, "search_every": 8},
    "lazy, 2e-2 decayed, 2,048 keys": {**LAZY, "keys": 2048, "search_every": 4},
}


def curve(steps: int, advance: Callable[[], int], loss: Callable[[], float]) -> list[dict[str, float]]:
    """Loss after points spread over a run, with the seconds spent in ``advance``, which returns the step."""
    step, spent = 0, 0.0
    points = [{"step": 0, "seconds": 0.0, "loss": loss()}]
    while step < steps:
        began = step

        def until_next_point(began: int = began) -> None:
            nonlocal step
            while step < min(steps, began + max(1, steps // POINTS)):
                step = advance()

        spent += seconds(until_next_point)
        points.append({"step": step, "seconds": spent, "loss": loss()})
    return points


class HeldOut(NamedTuple):
    """The split that a trainer with seed 0 makes."""

    queries: torch.Tensor
    keys: torch.Tensor
    widths: tuple[int, ...]
    batches: int
    """Batches of the stream that it took."""

    def loss(self, rotation: torch.Tensor) -> float:
        """Mean distance of the queries to their exact nearest keys."""
        return float(nearest_neighbors(self.queries, self.keys, rotation, self.widths).distance.mean())


def hold_out(stream: TensorStream, config: TrainConfig) -> HeldOut:
    """Rows that no contender trains on."""
    rows, batches = take_rows(stream.batches(), config.heldout_queries + config.heldout_keys)
    rows = rows[torch.randperm(len(rows), generator=seeded(config.seed, Draw.HELD_OUT))]
    cut = config.heldout_queries
    return HeldOut(rows[:cut], rows[cut:], config.widths(rows.shape[1]), batches)


def published_curve(stream: TensorStream, held: HeldOut, config: TrainConfig) -> list[dict[str, float]]:
    """The published scheme, on the rows that a trainer of ours gets."""
    pool = ActivationPool(stream, PoolConfig(config.pool_rows, config.keys, first_batch=held.batches))
    published = PublishedTrainer(sum(held.widths), held.widths, lr=config.lr)
    done = 0

    def advance() -> int:
        nonlocal done
        published.step(pool.take(config.queries), pool.next_keys())
        done += 1
        return done

    return curve(config.max_steps, advance, lambda: held.loss(published.rotation))


def our_curve(stream: TensorStream, held: HeldOut, config: TrainConfig) -> list[dict[str, float]]:
    """A trainer of ours, block by block as :meth:`Trainer.run` takes them."""
    trainer = Trainer(stream, config)

    def advance() -> int:
        trainer.train_block(min(config.search_every, config.max_steps - trainer.step), Observer())
        return trainer.step

    return curve(config.max_steps, advance, lambda: held.loss(trainer.rotation.matrix))


def row(name: str, points: list[dict[str, float]], target: float, published_seconds: float) -> dict[str, Any]:
    """What a run says about the target; ``seconds`` and ``times`` are None where it was not reached."""
    reached = next((point for point in points if point["loss"] <= target), None)
    took = reached["seconds"] if reached else None
    return {
        "mode": name,
        "steps": points[-1]["step"],
        "run_seconds": points[-1]["seconds"],
        "ms_per_step": 1e3 * points[-1]["seconds"] / points[-1]["step"],
        "final_loss": points[-1]["loss"],
        "seconds_to_target": took,
        "times_published": published_seconds / took if took else None,
        "curve": points,
    }


def draw(rows: list[dict[str, Any]], target: float, path: Path) -> None:
    """Held-out loss against seconds, on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.2), layout="constrained")
    for one in rows:
        points = one["curve"][1:]
        label = one["mode"] if one["mode"] == "published" else f"ours: {one['mode']}"
        axes.plot([p["seconds"] for p in points], [p["loss"] for p in points], marker=".", label=label)
    axes.axhline(target, color="grey", linewidth=0.8, linestyle="--")
    axes.set(xscale="log", xlabel="seconds of training", ylabel="held-out distance to the nearest neighbor")
    figure.legend(fontsize=8, frameon=False, loc="outside upper center", ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    print(f"written to {path}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2000, help="steps of the published scheme")
    parser.add_argument("--out", type=Path, default=result_file("time-to-loss"))
    parser.add_argument("--figure", type=Path, default=Path("docs/images/time-to-loss.png"))
    options = parser.parse_args()
    stream = harvest(max(options.steps, ENOUGH))
    base = settings(options.steps, "lie", 32)
    held = hold_out(stream, base)
    published = published_curve(stream, held, base)
    target, took = published[-1]["loss"], published[-1]["seconds"]
    rows = [row("published", published, target, took)]
    for name, changes in CONTENDERS.items():
        rows.append(row(name, our_curve(stream, held, dataclasses.replace(base, **changes)), target, took))
    print(text_table([{k: v for k, v in one.items() if k != "curve"} for one in rows]))
    best = max(one["times_published"] or 0.0 for one in rows)
    print(f"target {target:.4f}: reached {best:.0f} times sooner, goal {GOAL:.0f}: {verdict(best, GOAL)}")
    write_results(options.out, rows)
    draw(rows, target, options.figure)


if __name__ == "__main__":
    main()
