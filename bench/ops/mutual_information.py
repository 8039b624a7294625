"""KSG mutual information of all pairs: ours against eager torch, which builds the [pairs, Q, K] tensors.

    python bench/ops/mutual_information.py [--repeats N] [--out FILE]

Twice: over activations that are rotated already, for both, and from raw ones, where both rotate the keys.
Eager torch works on as many pairs at once as fit in --memory-gb. Correctness is checked first.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))  # not the root: its `kernels` hides another

from measuring import result_file, rounds, spread, times_faster, verdict, write_results

from ndm_fast import ops
from ndm_fast.geometry import reference
from ndm_fast.train.merge.mutual_information import mutual_information

SIZES = [(12, 384, 60), (24, 768, 150)]
"""Subspaces, width, and the ratio to reach."""
QUERIES, KEYS = 128, 16384


def activations(width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and a rotation; the subspaces share a little information."""
    torch.manual_seed(0)
    rows = torch.randn(QUERIES + KEYS, width) + 0.3 * torch.randn(QUERIES + KEYS, 1)
    return rows[:QUERIES], rows[QUERIES:], torch.linalg.qr(torch.randn(width, width))[0]


def eager(
    queries: Tensor, keys: Tensor, widths: list[int], variances: Tensor, pairs: Tensor, at_once: int
) -> Tensor:
    """[P] nats, from rotated rows, as the published estimator computes them."""
    parts = zip(queries.split(widths, 1), keys.split(widths, 1), variances, strict=True)
    scaled = torch.stack([torch.cdist(q, k) / v.sqrt() for q, k, v in parts])
    counts = []
    for some in pairs.split(at_once):
        both = scaled[some]  # [pairs, 2, Q, K]
        radius = both.amax(1).amin(-1)
        counts.append((both < radius[:, None, :, None]).sum(-1))
    return estimate(torch.cat(counts))


def estimate(counts: Tensor) -> Tensor:
    """[P] nats, from [P, 2, Q] counts: psi(1) + psi(N) - mean(psi(n_a + 1) + psi(n_b + 1))."""
    digamma = torch.digamma(counts.double() + 1).sum(1).mean(1)
    return torch.digamma(torch.tensor([1.0, KEYS + 1.0], dtype=torch.float64)).sum() - digamma


def check(arguments: tuple[Any, ...], pairs: Tensor, found: Tensor) -> float:
    """Distance to the fp64 oracle on six pairs; ends the run above 1e-4."""
    exact = [
        reference.ksg_counts(
            *arguments, some, reference.ksg_radius(*arguments, some, rotated=True), rotated=True
        )
        for some in pairs[:6].split(3)
    ]
    gap = float((estimate(torch.cat(exact)) - found[:6]).abs().max())
    if not gap <= 1e-4:
        sys.exit(f"mutual information is off by {gap:.1e}: nothing is timed")
    return gap


def measure(subspaces: int, width: int, goal: float, repeats: int, memory_gb: float) -> dict[str, Any]:
    queries, keys, rotation = activations(width)
    rotated_queries, rotated_keys = queries @ rotation, keys @ rotation
    widths = [width // subspaces] * subspaces
    variances = torch.stack([part.var(0).sum() for part in rotated_keys.split(widths, 1)])
    pairs = torch.combinations(torch.arange(subspaces))
    at_once = max(1, int(memory_gb * 2**30 / (QUERIES * KEYS * 4 * 3)))
    arguments = (rotated_queries, rotated_keys, rotation, widths, variances)

    def ours() -> Tensor:
        return estimate(ops.ksg_radius_and_counts(*arguments, pairs, rotated=True)[1])

    gap = check(arguments, pairs, ours())
    times = rounds(
        {
            "eager": lambda: eager(rotated_queries, rotated_keys, widths, variances, pairs, at_once),
            "ours": ours,
            "eager from raw": lambda: eager(
                queries @ rotation, keys @ rotation, widths, variances, pairs, at_once
            ),
            "ours from raw": lambda: mutual_information(queries, keys, rotation, widths),
        },
        repeats,
    )
    return {
        "S": subspaces,
        "d": width,
        "pairs": len(pairs),
        "pairs_at_once_eager": at_once,
        "gap_to_fp64": gap,
        "seconds": {name: spread(values) for name, values in times.items()},
        "goal": goal,
        "times_eager": times_faster(times, "ours", "eager"),
        "times_eager_from_raw": times_faster(times, "ours from raw", "eager from raw"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory-gb", type=float, default=4.0, help="for the tensors of eager torch")
    parser.add_argument("--out", type=Path, default=result_file("mi"))
    options = parser.parse_args()
    rows = []
    print(
        f"{'S':>3} {'d':>5} {'pairs':>5} | {'eager s':>8} {'ours s':>8} {'times':>6} goal        | "
        "times from raw"
    )
    for subspaces, width, goal in SIZES:
        row = measure(subspaces, width, goal, options.repeats, options.memory_gb)
        rows.append(row)
        took = {name: values["median"] for name, values in row["seconds"].items()}
        print(
            f"{subspaces:>3} {width:>5} {row['pairs']:>5} | {took['eager']:>8.2f} {took['ours']:>8.3f} "
            f"{row['times_eager']:>6.0f} {goal:>4} {verdict(row['times_eager'], goal):>6} | "
            f"{row['times_eager_from_raw']:.0f}",
            flush=True,
        )
    write_results(options.out, rows)


if __name__ == "__main__":
    main()
