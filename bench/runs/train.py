"""Seconds of a training step by kind of work, beside the published scheme, over d, K and Q.

    python bench/runs/train.py [--only 384 768] [--rotations lazy] [--no-sweeps] [--out FILE]

Activations are made up (``synthetic.py``), harvest is that of two blocks of a random GPT-2 of the width. The
slope of log time over log d, K or Q is compared with that of the cost model (docs/method.md) as
``ndm-fast plan`` has it: rotation of the keys once a search and of the queries, ``2 Q K d`` for the search;
``4 Q d^2`` for the gradient, products of d^3, passes over [d, d].
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import GPT2Config, GPT2Model

sys.path.append(str(Path(__file__).resolve().parents[1]))  # not the root: its `kernels` hides another

from measuring import result_file, seconds, spread, verdict, write_results
from published import PublishedTrainer
from synthetic import clustered
from timed import TimedTrainer

from ndm_fast.activations.rows import TensorStream
from ndm_fast.config import MergeConfig, TrainConfig
from ndm_fast.partition import orthogonality_error
from ndm_fast.run.hardware import Machine, machine_of
from ndm_fast.run.plan import loop_parts
from ndm_fast.table import text_table
from ndm_fast.train.trainer import Observer

UNITS = {384: 32, 768: 32, 1536: 64, 2304: 72}
KEYS, QUERIES, SHARED = 16384, 128, 32
HELDOUT = 512
BLOCKS, WARM = 4, 1
GOAL_2304, SLOPE_WITHIN = 25.0, 0.15
HARVEST_ROWS, HARVEST_CONTEXT = 16, 128


class Shape(NamedTuple):
    """What a step costs depends on this alone."""

    d: int
    K: int = KEYS
    Q: int = QUERIES


def measure(shape: Shape, rotation: str, published_steps: int, machine: Machine) -> dict[str, Any]:
    """A row: milliseconds a step of search and update, of the MI once, and of the published scheme; the loss.

    Blocks of ours and steps of the published scheme take turns; ratios are within a turn.
    """
    d, K, Q = shape
    rows = clustered(HELDOUT + K + (BLOCKS + WARM) * SHARED * Q + K, d, UNITS[d])
    config = TrainConfig(
        rotation=rotation,
        unit_size=UNITS[d],
        keys=K,
        queries=Q,
        search_every=SHARED,
        precision="bf16",
        lr=3e-4,
        schedule="constant",
        max_steps=(BLOCKS + WARM) * SHARED,
        pool_rows=len(rows),
        heldout_queries=HELDOUT,
        heldout_keys=K,
    )
    cut = HELDOUT + K
    stream = TensorStream([rows[:cut], rows[cut:]])
    trainer = TimedTrainer(stream, config, MergeConfig(mi_queries=QUERIES, mi_keys=K))
    published = PublishedTrainer(d, trainer.widths)
    taken: dict[str, list[float]] = {"search": [], "update": [], "published": []}
    for _ in range(BLOCKS + WARM):
        trainer.seconds.clear()
        trainer.train_block(SHARED, Observer())
        for name, spent in trainer.split().items():
            if name in taken:
                taken[name].append(1e3 * spent / SHARED)
        steps = [seconds(lambda: published.step(rows[:Q], rows[-K:])) for _ in range(published_steps)]
        taken["published"].append(1e3 * statistics.median(steps or [0.0]))
    taken = {name: values[WARM:] for name, values in taken.items()}
    trainer.seconds.clear()
    trainer.information()
    row: dict[str, Any] = {"d": d, "K": K, "Q": Q, "rotation": rotation}
    row |= {f"{name}_ms": statistics.median(taken[name]) for name in ("search", "update")}
    row["step_ms"] = row["search_ms"] + row["update_ms"]
    parts = {part.name: 1e3 * part.seconds / config.max_steps for part in loop_parts(config, d, machine)}
    row["search_model_ms"], row["update_model_ms"] = parts["search"], parts["gradient"] + parts["update"]
    row["spread"] = {name: spread(values) for name, values in taken.items()}
    row["merge_check_ms"] = 1e3 * trainer.split()["merge"]
    row["heldout_distance"] = float(trainer.heldout_distance().mean())
    row["orthogonality_error"] = orthogonality_error(trainer.rotation.matrix)
    if published_steps:
        row["published_ms"] = statistics.median(taken["published"])
        ours = [s + u for s, u in zip(taken["search"], taken["update"], strict=True)]
        row["times_published"] = statistics.median(
            p / o for p, o in zip(taken["published"], ours, strict=True)
        )
    return row


def harvest_ms(d: int) -> float:
    """Milliseconds for the activations of one step, by two blocks of a random GPT-2 of this width."""
    model = GPT2Model(GPT2Config(n_embd=d, n_layer=2, n_head=d // 64)).eval()
    tokens = torch.randint(1000, (HARVEST_ROWS, HARVEST_CONTEXT))
    with torch.no_grad():
        model(tokens)
        took = statistics.median(seconds(lambda: model(tokens)) for _ in range(3))
    return 1e3 * took / tokens.numel() * QUERIES


def slope(points: list[tuple[float, float]]) -> float:
    """Least squares in logarithms."""
    xs, ys = ([math.log(point[i]) for point in points] for i in (0, 1))
    mx, my = statistics.fmean(xs), statistics.fmean(ys)
    return sum((x - mx) * (y - my) for x, y in zip(xs, ys, strict=True)) / sum((x - mx) ** 2 for x in xs)


def slopes(rows: list[dict[str, Any]], over: str) -> list[dict[str, Any]]:
    """Measured and modelled slopes of search and update over ``d``, ``K`` or ``Q``."""
    found = []
    for part in ("search", "update"):
        if part == "update" and over == "K":
            continue  # it does not depend on K
        measured, model = (
            slope([(row[over], row[name]) for row in rows]) for name in (f"{part}_ms", f"{part}_model_ms")
        )
        found.append(
            {"part": part, "over": over, "slope": measured, "model": model, "off": measured / model - 1}
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", type=int, nargs="+", default=list(UNITS), choices=list(UNITS))
    parser.add_argument("--rotations", nargs="+", default=["lazy", "lie"], choices=["lazy", "lie"])
    parser.add_argument("--no-sweeps", action="store_true")
    parser.add_argument("--out", type=Path, default=result_file("train"))
    options = parser.parse_args()
    began = time.perf_counter()
    machine, widths = machine_of("cpu"), []
    for d in options.only:
        for rotation in options.rotations:
            turns = (1 if d > 768 else 4) if rotation == "lazy" else 0
            row = measure(Shape(d), rotation, turns, machine)
            row["harvest_ms"] = harvest_ms(d)
            widths.append(row)
            print({k: v for k, v in row.items() if k != "spread"}, flush=True)
    rows, fits = list(widths), []
    if len(options.only) > 1:
        fits += slopes([row for row in widths if row["rotation"] == "lazy"], "d")
    if not options.no_sweeps:
        for over, values in (("K", (4096, 8192, 16384, 32768)), ("Q", (64, 128, 256, 512))):
            swept = [measure(Shape(768)._replace(**{over: value}), "lazy", 0, machine) for value in values]
            rows += swept
            fits += slopes(swept, over)
    shown = (
        "d",
        "K",
        "Q",
        "rotation",
        "search_ms",
        "update_ms",
        "step_ms",
        "search_model_ms",
        "update_model_ms",
    )
    print(text_table([{name: row[name] for name in shown} for row in rows]))
    for fit in fits:
        within = verdict(abs(fit["off"]), SLOPE_WITHIN, at_most=True)
        print(f"{fit['part']} over {fit['over']}: {fit['slope']:.2f}, model {fit['model']:.2f} ({within})")
    for row in widths:
        if "times_published" in row:
            goal = f" ({verdict(row['times_published'], GOAL_2304)})" if row["d"] == 2304 else ""
            print(
                f"d {row['d']}: published {row['published_ms']:.0f} ms, {row['times_published']:.1f}x{goal}"
            )
    write_results(options.out, [*rows, *fits])
    print(f"took {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
