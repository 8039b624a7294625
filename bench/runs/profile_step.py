"""Where the time of the loop goes on a CPU: BLAS, our ops, torch's elementwise kernels, Python.

    python bench/runs/profile_step.py [--out FILE]

Self time of every operator by torch.profiler over two blocks of 32 steps, as shares of the wall time:
what is left over is Python, and the profiler itself. The goal counts BLAS and our ops.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

sys.path.append(str(Path(__file__).resolve().parents[1]))  # not the root: its `kernels` hides another

from measuring import result_file, seconds, verdict, write_results
from synthetic import clustered

from ndm_fast.activations.rows import TensorStream
from ndm_fast.config import TrainConfig
from ndm_fast.ops.cpu import product as compiled
from ndm_fast.ops.library import Direct
from ndm_fast.table import text_table
from ndm_fast.train.trainer import Observer, Trainer

GOAL = 0.90
BLAS = ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "mkldnn")
SHARED, BLOCKS = 32, 2
CASES = (("lie", 384, 32), ("lazy", 384, 32), ("lazy", 2304, 72))


def kind(operator: str) -> str:
    """What an operator's own time counts as."""
    if operator.startswith(BLAS):
        return "blas"
    return "ours" if operator.startswith("ndm_fast::") else "elementwise"


def name_our_calls() -> None:
    """In a step our functions are called without operators around them: name them for torch's profiler."""
    product, direct = compiled.product, Direct.__call__

    def named_product(*factors: Tensor, **options: Any) -> Tensor:
        with record_function("ndm_fast::product"):
            return product(*factors, **options)

    def named(self: Direct, **given: Any) -> Any:
        with record_function("ndm_fast::direct"):
            return direct(self, **given)

    compiled.product = named_product
    Direct.__call__ = named  # type: ignore[method-assign]


def shares(rotation: str, d: int, unit: int) -> dict[str, Any]:
    """Shares of the wall time of a block, K = 16,384, Q = 128."""
    rows = clustered(512 + 16384 + (2 * BLOCKS + 1) * SHARED * 128 + 16384, d, unit)
    config = TrainConfig(
        rotation=rotation,
        unit_size=unit,
        search_every=SHARED,
        precision="bf16",
        lr=3e-4,
        schedule="constant",
        max_steps=(2 * BLOCKS + 1) * SHARED,
        heldout_queries=512,
        pool_rows=len(rows),
    )
    trainer = Trainer(TensorStream([rows[:16896], rows[16896:]]), config)

    def blocks() -> None:
        for _ in range(BLOCKS):
            trainer.train_block(SHARED, Observer())

    trainer.train_block(SHARED, Observer())
    plain = seconds(blocks)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        profiled = seconds(blocks)
    spent = {"blas": 0.0, "ours": 0.0, "elementwise": 0.0}
    for event in profiler.key_averages():
        spent[kind(event.key)] += event.self_cpu_time_total / 1e6
    row: dict[str, Any] = {"rotation": rotation, "d": d, "ms_per_step": 1e3 * plain / (BLOCKS * SHARED)}
    row |= {name: took / profiled for name, took in spent.items()}
    row["python"] = 1 - sum(spent.values()) / profiled
    row["blas_and_ours"] = row["blas"] + row["ours"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=result_file("profile-step"))
    options = parser.parse_args()
    name_our_calls()
    rows = []
    for case in CASES:
        rows.append(shares(*case))
        print(rows[-1], flush=True)
    print(text_table(rows))
    for row in rows:
        share = row["blas_and_ours"]
        print(
            f"{row['rotation']} {row['d']}: {100 * share:.0f} % in BLAS and our ops ({verdict(share, GOAL)})"
        )
    write_results(options.out, rows)


if __name__ == "__main__":
    main()
