"""KSG mutual information of all pairs: ours against eager torch, which builds the [pairs, Q, K] tensors.

    python bench/mutual_information.py [--repeats N]

Both get raw activations and rotate the keys; ours is also timed without that (the kernels alone). Eager
torch works on as many pairs at once as fit in --memory-gb. Correctness is checked first.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from ndm_fast import cpu, reference

SIZES = [(12, 384), (24, 768)]
QUERIES, KEYS = 128, 16384
RESULTS = Path(__file__).parent / "results"


def data(subspaces: int, width: int) -> tuple[Tensor, ...]:
    """Activations whose subspaces share a little information, and the arguments of the ops."""
    torch.manual_seed(0)
    shared = torch.randn(QUERIES + KEYS, 1)
    rows = torch.randn(QUERIES + KEYS, width) + 0.3 * shared
    rotation = torch.linalg.qr(torch.randn(width, width))[0]
    part = width // subspaces
    variances = torch.stack([x.var(0).sum() for x in (rows @ rotation).split(part, 1)])
    pairs = torch.combinations(torch.arange(subspaces))
    return rows[:QUERIES], rows[QUERIES:], rotation, variances, pairs


def eager(
    queries: Tensor, keys: Tensor, rotation: Tensor, widths, variances: Tensor, pairs: Tensor, at_once: int
):
    """The published estimator in eager torch."""
    query_parts, key_parts = (queries @ rotation).split(widths, 1), (keys @ rotation).split(widths, 1)
    scaled = torch.stack(
        [torch.cdist(q, k) / v.sqrt() for q, k, v in zip(query_parts, key_parts, variances, strict=True)]
    )
    counts = []
    for some in pairs.split(at_once):
        both = scaled[some]  # [pairs, 2, Q, K]
        radius = both.amax(1).amin(-1)
        counts.append((both < radius[:, None, :, None]).sum(-1))
    return estimate(torch.cat(counts), len(keys))


def estimate(counts: Tensor, keys: int) -> Tensor:
    """[P] nats, from [P, 2, Q] counts: psi(1) + psi(N) - mean(psi(n_a + 1) + psi(n_b + 1))."""
    digamma = torch.digamma(counts.double() + 1).sum(1).mean(1)
    return torch.digamma(torch.tensor([1.0, keys + 1.0], dtype=torch.float64)).sum() - digamma


def measure(subspaces: int, width: int, repeats: int, memory_gb: float) -> dict[str, object]:
    queries, keys, rotation, variances, pairs = data(subspaces, width)
    widths = [width // subspaces] * subspaces
    at_once = max(1, int(memory_gb * 2**30 / (QUERIES * KEYS * 4 * 3)))
    arguments = (queries, keys, rotation, widths, variances, pairs)

    def ours() -> Tensor:
        return estimate(cpu.ksg_radius_and_counts(*arguments)[1], KEYS)

    exact = torch.cat(
        [
            reference.ksg_counts(*arguments[:5], some, reference.ksg_radius(*arguments[:5], some))
            for some in pairs[:6].split(3)
        ]
    )
    gap = float((estimate(exact, KEYS) - ours()[:6]).abs().max())
    if not gap <= 1e-4:
        sys.exit(f"mutual information is off by {gap:.1e}: nothing is timed")
    prepared = cpu._ksg_arguments(*arguments)

    def kernels_only() -> None:
        radius = torch.empty(len(pairs), QUERIES)
        cpu._extension().ksg_radius(*prepared.values, radius.data_ptr())
        cpu._ksg_counts(prepared, radius, len(pairs), QUERIES)

    times: dict[str, list[float]] = {"eager": [], "ours": [], "kernels only": []}
    for _ in range(repeats):
        for name, run in (
            ("ours", ours),
            ("kernels only", kernels_only),
            ("eager", lambda: eager(*arguments, at_once)),
        ):
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "S": subspaces,
        "d": width,
        "pairs": len(pairs),
        "pairs_at_once_eager": at_once,
        "gap_to_fp64": gap,
        "seconds": medians,
        "spread": {name: [min(v), max(v)] for name, v in times.items()},
        "speedup": statistics.median(e / o for e, o in zip(times["eager"], times["ours"], strict=True)),
        "speedup_kernels": statistics.median(
            e / o for e, o in zip(times["eager"], times["kernels only"], strict=True)
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory-gb", type=float, default=4.0, help="for the tensors of eager torch")
    parser.add_argument("--out", type=Path, default=RESULTS / f"mi-{platform.node() or 'machine'}.json")
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    from search import machine

    rows = []
    print(f"{'S':>3} {'d':>5} {'pairs':>5} | {'eager s':>8} {'ours s':>8} {'kernels':>8} | speedup (kernels)")
    for subspaces, width in SIZES:
        row = measure(subspaces, width, arguments.repeats, arguments.memory_gb)
        rows.append(row)
        s = row["seconds"]
        print(
            f"{subspaces:>3} {width:>5} {row['pairs']:>5} | {s['eager']:>8.2f} {s['ours']:>8.3f} "
            f"{s['kernels only']:>8.3f} | {row['speedup']:.0f} ({row['speedup_kernels']:.0f})",
            flush=True,
        )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
