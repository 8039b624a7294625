"""Nearest-neighbour search on the CPU: ours against sgemm, faiss, scikit-learn and torch, in the same run.

    python bench/search.py [--quick] [--repeats N] [--no-baselines] [--cpu-time]

Every round times each contender once, in turn, so that a busy machine is busy for all of them; ratios are
taken inside a round and their median is reported. Nothing is timed before it is right. Baselines see two
subspaces and are scaled to all (each subspace is the same work to them). With --cpu-time everything runs on
one thread and the processor's time is counted instead of the clock's: the way to compare on a machine that
others use, where two threads that wait for each other measure the scheduler.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ndm_fast import cpu, reference

SIZES = [(384, 32, 1024, 16384), (768, 32, 1024, 65536), (2304, 72, 1024, 16384)]
SIZES += [(d, p, 128, k) for d, p, _, k in SIZES]
BASELINE_SUBSPACES = 2
RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, object]:
    """Hardware, versions and commit, for the results file."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [
            x.split(":")[1].strip() for x in cpuinfo.read_text().splitlines() if x.startswith("model name")
        ]
        model = lines[0] if lines else model
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "cpu": model,
        "threads": torch.get_num_threads(),
        "isa": cpu.isa(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit,
        "load": list(os.getloadavg()),
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


_clock: Callable[[], float] = time.perf_counter


def seconds(work: Callable[[], object]) -> float:
    start = _clock()
    work()
    return _clock() - start


def peak_extra_mb(work: Callable[[], object]) -> float | None:
    """Growth of the resident set at its peak, MB; None where the system does not tell."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        work()
        return (_status("VmHWM") - before) / 1024
    except OSError:
        return None


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise OSError(field)


def check(queries, keys, rotated, rotation, widths) -> None:
    """Both forms against the fp64 oracle on some queries; ends the run on a miss."""
    part = queries[:16]
    for given, is_rotated in ((keys, False), (rotated, True)):
        found = cpu.nearest_neighbors(part, given, rotation, widths, keys_rotated=is_rotated)
        oracle = reference.nearest_neighbors(part, given, rotation, widths, keys_rotated=is_rotated).distance
        excess = float((found.distance.double() / oracle - 1).abs().max())
        if not excess <= 1e-5:
            sys.exit(f"wrong by {excess:.1e} (rotated={is_rotated}): nothing is timed")


def baselines(queries, rotated, width) -> dict[str, Callable[[], object]]:
    """Name -> one search of BASELINE_SUBSPACES subspaces over contiguous rotated rows."""
    columns = [slice(i * width, (i + 1) * width) for i in range(BASELINE_SUBSPACES)]
    parts = [(queries[:, c].contiguous(), rotated[:, c].contiguous()) for c in columns]

    def expanded(q, k):
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


def measure(size: tuple[int, int, int, int], repeats: int, with_baselines: bool) -> dict[str, object]:
    d, p, n_queries, n_keys = size
    torch.manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(d, d))[0]
    widths = [p] * (d // p)
    queries, keys = torch.randn(n_queries, d), torch.randn(n_keys, d)
    rotated = keys @ rotation
    check(queries, keys, rotated, rotation, widths)
    square = 2048
    left, right, out = (torch.randn(square, square) for _ in range(3))
    work = 2 * n_queries * n_keys * d
    contenders: dict[str, tuple[float, Callable[[], object]]] = {
        "sgemm": (2 * square**3, lambda: torch.mm(left, right, out=out)),
        "ours": (work, lambda: cpu.nearest_neighbors(queries, rotated, rotation, widths, keys_rotated=True)),
    }
    if with_baselines:
        share = work * BASELINE_SUBSPACES / len(widths)
        contenders |= {n: (share, f) for n, f in baselines(queries @ rotation, rotated, p).items()}
    times = _rounds(contenders, repeats)
    rates = {name: [contenders[name][0] / t / 1e9 for t in values] for name, values in times.items()}
    others = [n for n in rates if n not in ("sgemm", "ours")]
    best = max(others, key=lambda n: statistics.median(rates[n])) if others else None
    # The query rotation in fp64 is part of the call: 2 Q d^2 operations that the plain rate does not count.
    with_rotation = 1 + d / n_keys
    raw = [seconds(lambda: cpu.nearest_neighbors(queries, keys, rotation, widths)) for _ in range(1)]
    return {
        "d": d,
        "p": p,
        "Q": n_queries,
        "K": n_keys,
        "gflops": {n: round(statistics.median(r), 1) for n, r in rates.items()},
        "spread": {n: [round(min(r), 1), round(max(r), 1)] for n, r in rates.items()},
        "of_sgemm": _ratio(rates["ours"], rates["sgemm"]),
        "of_sgemm_counting_query_rotation": with_rotation * _ratio(rates["ours"], rates["sgemm"]),
        "of_sgemm_best_of_each": max(rates["ours"]) / max(rates["sgemm"]),
        "best_other": best,
        "times_best_other": _ratio(rates["ours"], rates[best]) if best else None,
        "raw_seconds": min(raw),
        **memory(size),
    }


def _rounds(
    contenders: dict[str, tuple[float, Callable[[], object]]], repeats: int
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _, run in contenders.values():
        run()
    for _ in range(repeats):
        for name, (_, run) in contenders.items():
            times[name].append(seconds(run))
    return times


def _ratio(ours: list[float], other: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, other, strict=True))


def memory(size: tuple[int, int, int, int]) -> dict[str, float | None]:
    """Peak extra memory of one call, in a fresh process whose allocator gives freed memory back at once.

    In a process that has run before, freed memory stays resident and the growth reads as nothing.
    """
    plain = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(
        [sys.executable, __file__, "--memory-of", *map(str, size)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **plain},
    )
    return json.loads(done.stdout)


def print_memory(d: int, p: int, n_queries: int, n_keys: int) -> None:
    rotation, widths = torch.eye(d), [p] * (d // p)
    queries, keys = torch.randn(n_queries, d), torch.randn(n_keys, d)
    torch.mm(queries, rotation)  # what BLAS keeps for itself is not ours
    extra = {
        name: peak_extra_mb(
            lambda r=r: cpu.nearest_neighbors(queries, keys, rotation, widths, keys_rotated=r)
        )
        for name, r in (("extra_mb_rotated", True), ("extra_mb_raw", False))
    }
    extra["copy_of_keys_mb"] = n_keys * d * 4 / 2**20
    print(json.dumps(extra))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only d = 384")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--no-baselines", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / f"search-{platform.node() or 'machine'}.json")
    parser.add_argument("--cpu-time", action="store_true", help="one thread, processor time")
    parser.add_argument(
        "--memory-of", type=int, nargs=4, metavar=("d", "p", "Q", "K"), help=argparse.SUPPRESS
    )
    arguments = parser.parse_args()
    if arguments.memory_of:
        print_memory(*arguments.memory_of)
        return
    if arguments.cpu_time:
        global _clock
        _clock = time.process_time
        torch.set_num_threads(1)
    sizes = [s for s in SIZES if s[0] == 384] if arguments.quick else SIZES
    rows = []
    print(
        f"{'d':>5} {'p':>3} {'Q':>5} {'K':>6} | {'sgemm':>6} {'ours':>6} | of sgemm  best  | times best other"
    )
    for size in sizes:
        row = measure(size, arguments.repeats, not arguments.no_baselines)
        rows.append(row)
        rate = row["gflops"]
        other = f"{row['times_best_other']:.1f} ({row['best_other']})" if row["best_other"] else "-"
        shape = f"{row['d']:>5} {row['p']:>3} {row['Q']:>5} {row['K']:>6}"
        print(
            f"{shape} | {rate['sgemm']:>6} {rate['ours']:>6} | "
            f"{row['of_sgemm']:>7.2f} {row['of_sgemm_best_of_each']:>6.2f}  | {other}",
            flush=True,
        )
        result = {"machine": machine(), "clock": _clock.__name__, "rows": rows}
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
