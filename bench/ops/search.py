"""Nearest-neighbor search on the CPU: ours against sgemm, faiss, scikit-learn and torch, in the same run.

    python bench/ops/search.py [--quick] [--repeats N] [--out FILE]

Queries and keys are rotated already, for every contender. Ratios are taken inside a round, and their median
is reported. Nothing is timed before it is right. Baselines see two subspaces and are scaled to all (each
subspace is the same work to them). The last rows run on AVX2 alone, against sgemm held to AVX2.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))  # not the root: its `kernels` hides another

from measuring import result_file, rounds, times_faster, verdict, write_results

from ndm_fast.geometry import reference
from ndm_fast.ops.cpu import extension, search
from ndm_fast.ops.cpu.extension import ISA_VARIABLE

SIZES = [(384, 32, 1024, 16384), (768, 32, 1024, 65536), (2304, 72, 1024, 16384)]
SIZES += [(d, p, 128, k) for d, p, _, k in SIZES]
BASELINE_SUBSPACES = 2
SQUARE = 2048
AVX2_ONLY = {"MKL_ENABLE_INSTRUCTIONS": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", ISA_VARIABLE: "avx2"}
Size = tuple[int, int, int, int]


def case(size: Size) -> tuple[Tensor, Tensor, list[int]]:
    """Rotated queries and keys, and the widths."""
    d, p, n_queries, n_keys = size
    torch.manual_seed(0)
    return torch.randn(n_queries, d), torch.randn(n_keys, d), [p] * (d // p)


def searcher(size: Size, precision: str = "fp32") -> Callable[[], reference.Neighbors]:
    queries, keys, widths = case(size)
    rotation = torch.eye(size[0])  # not used: both are rotated
    return lambda: search.nearest_neighbors(
        queries, keys, rotation, widths, keys_rotated=True, queries_rotated=True, precision=precision
    )


def check(size: Size) -> None:
    """Both precisions against the fp64 oracle on some queries; ends the run on a miss."""
    queries, keys, widths = case(size)
    rotation = torch.eye(size[0])
    some = queries[:16]
    form = {"keys_rotated": True, "queries_rotated": True}
    oracle = reference.nearest_neighbors(some, keys, rotation, widths, **form).distance
    for precision, allowed in (("fp32", 1e-5), ("bf16", 1e-2)):
        found = search.nearest_neighbors(some, keys, rotation, widths, precision=precision, **form)
        excess = float((found.distance.double() / oracle - 1).abs().max())
        if not excess <= allowed:
            sys.exit(f"{size} in {precision} is wrong by {excess:.1e}: nothing is timed")


def baselines(size: Size) -> dict[str, Callable[[], object]]:
    """Name -> one search of BASELINE_SUBSPACES subspaces over contiguous rows."""
    queries, keys, widths = case(size)
    parts = [
        (q.contiguous(), k.contiguous())
        for q, k in zip(queries.split(widths, 1), keys.split(widths, 1), strict=True)
    ][:BASELINE_SUBSPACES]

    def expanded(q: Tensor, k: Tensor) -> Tensor:
        return torch.baddbmm(k.square().sum(1)[None, None], q[None], k.T[None], alpha=-2).argmin(2)

    found: dict[str, Callable[[], object]] = {
        "torch cdist+min": lambda: [torch.cdist(q, k).min(1) for q, k in parts],
        "torch baddbmm+argmin": lambda: [expanded(q, k) for q, k in parts],
    }
    if importlib.util.find_spec("faiss"):
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        found["faiss knn"] = lambda: [faiss.knn(q.numpy(), k.numpy(), 1) for q, k in parts]
    if importlib.util.find_spec("sklearn"):
        from sklearn.metrics import pairwise_distances_argmin

        found["scikit-learn"] = lambda: [pairwise_distances_argmin(q.numpy(), k.numpy()) for q, k in parts]
    return found


def measure(size: Size, repeats: int, with_baselines: bool) -> dict[str, Any]:
    check(size)
    d, p, n_queries, n_keys = size
    left, right, out = (torch.randn(SQUARE, SQUARE) for _ in range(3))
    contenders: dict[str, Callable[[], object]] = {
        "sgemm": lambda: torch.mm(left, right, out=out),
        "ours": searcher(size),
        "ours bf16": searcher(size, "bf16"),
    }
    if with_baselines:
        contenders |= baselines(size)
    work = 2 * n_queries * n_keys * d
    operations = dict.fromkeys(contenders, work * BASELINE_SUBSPACES // (d // p))
    operations |= {"sgemm": 2 * SQUARE**3, "ours": work, "ours bf16": work}
    times = rounds(contenders, repeats)
    # Seconds per operation, so that contenders with different work compare.
    paces = {name: [t / operations[name] for t in values] for name, values in times.items()}
    rates = {name: statistics.median(1e-9 / pace for pace in values) for name, values in paces.items()}
    others = [name for name in contenders if name not in ("sgemm", "ours", "ours bf16")]
    best = max(others, key=lambda name: rates[name]) if others else None
    return {
        **dict(zip(("d", "p", "Q", "K"), size, strict=True)),
        "isa": extension.isa(),
        "gflops": {name: round(rate, 1) for name, rate in rates.items()},
        "of_sgemm": round(times_faster(paces, "ours", "sgemm"), 3),
        "bf16_over_fp32": round(times_faster(paces, "ours bf16", "ours"), 3),
        "best_other": best,
        "times_best_other": round(times_faster(paces, "ours", best), 2) if best else None,
        "extra_mb": extra_memory(size),
    }


def extra_memory(size: Size) -> float:
    """Peak memory of one call beyond its arguments, MB, in a fresh process.

    In a process that has run before, freed memory stays resident and the growth reads as nothing; and the
    allocator is told to give freed memory back.
    """
    plain = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(
        [sys.executable, __file__, "--memory-of", *map(str, size)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **plain},
    )
    return float(done.stdout)


def print_extra_memory(size: Size) -> None:
    search = searcher(size)
    searcher((64, 32, 16, 128))()  # what BLAS and the thread pool keep for themselves is not ours
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    search()
    print(round((resident("VmHWM") - before) / 1024, 1))


def resident(field: str) -> int:
    """A memory figure of this process, KB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def print_row(row: dict[str, Any]) -> None:
    rate, goal = row["gflops"], 0.9 if row["Q"] >= 1024 else 0.7
    other = f"{row['times_best_other']:.1f} ({row['best_other']})" if row["best_other"] else "-"
    print(
        f"{row['d']:>5} {row['p']:>3} {row['Q']:>5} {row['K']:>6} {row['isa']:>10} | {rate['sgemm']:>6} "
        f"{rate['ours']:>6} {row['of_sgemm']:>5.2f} {verdict(row['of_sgemm'], goal):>6} | "
        f"{rate['ours bf16']:>6} {row['bf16_over_fp32']:>5.2f} | {row['extra_mb']:>5.0f} | {other}",
        flush=True,
    )


def avx2_rows(sizes: list[Size], repeats: int) -> list[dict[str, Any]]:
    """The same without baselines, ours and sgemm both held to AVX2, in a process of its own."""
    command = [sys.executable, __file__, "--repeats", str(repeats), "--rows-of"]
    done = subprocess.run(
        [*command, json.dumps(sizes)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **AVX2_ONLY},
    )
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="only d = 384")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=result_file("search"))
    parser.add_argument("--memory-of", type=int, nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--rows-of", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print_extra_memory(tuple(options.memory_of))
        return
    if options.rows_of:
        print(json.dumps([measure(tuple(size), options.repeats, False) for size in options.rows_of]))
        return
    sizes = [s for s in SIZES if s[0] == 384] if options.quick else SIZES
    print(
        f"{'d':>5} {'p':>3} {'Q':>5} {'K':>6} {'isa':>10} | {'sgemm':>6} {'ours':>6} share        | "
        f"{'bf16':>6} gain  | extra | times the best other      (GFLOP/s, MB)"
    )
    rows = []
    for size in sizes:
        rows.append(measure(size, options.repeats, True))
        print_row(rows[-1])
    for row in avx2_rows(sizes[: max(1, len(sizes) // 2)], options.repeats):
        rows.append(row)
        print_row(row)
    write_results(options.out, rows)


if __name__ == "__main__":
    main()
