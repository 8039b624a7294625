"""How much of KSG's distances a shadow could rule out: counts, no time.

    OMP_NUM_THREADS=1 python bench/runs/shadow_ksg.py [--acts FOLDER SITE [PARTITION]] ... [--out FILE]

Sources and partitions as in shadow_counts.py. A pass needs the distance of a key in a subspace only where it
is within reach: the largest radius of the subspace's pairs. "Known" is the reach when all keys have been met,
which the counts' own pass has: a bound of what any order of keys could save. "In order" is that of the tiles
before, as when radius and counts come from one look. A group of 16 or 32 keys is left where the shadow of one
is in reach.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from shadow_counts import CPU, SHARES, partitions, sources
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))  # not the root: its `kernels` hides another

from measuring import RESULTS, write_results

from ndm_fast.geometry import shadow
from ndm_fast.geometry.centring import rotate_centred, sample_mean
from ndm_fast.partition import SubspacePartition
from ndm_fast.table import text_table

QUERIES, KEYS, TILE = 32, 16384, 64
"""As a merge has them, but for the queries: 2,048 there."""
WIDTHS = (32, 96)
TOLERANCE = 1e-12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--acts", nargs="+", action="append", default=[], help="folder, site and partition")
    parser.add_argument("--width", type=int, default=576, help="of the noise")
    parser.add_argument("--out", type=Path, default=RESULTS / "shadow-ksg.json")
    arguments = parser.parse_args()
    rows = []
    for name, data, trained in sources(arguments.acts, arguments.width):
        for kind, partition in partitions(name, data, trained, WIDTHS):
            for row in count_partition(data, partition):
                rows.append({"rows": name, "partition": kind, **row})
                print(text_table([rows[-1]]), flush=True)
    write_results(arguments.out, rows)


@torch.no_grad()
def count_partition(data: Tensor, partition: SubspacePartition) -> Iterator[dict[str, Any]]:
    """One row for each size of groups: all products over those left, with the best h of each subspace."""
    widths, d = list(partition.widths), sum(partition.widths)
    left, right = data[:QUERIES, :d].contiguous(), data[QUERIES : QUERIES + KEYS, :d].contiguous()
    origin = sample_mean(right)
    turn = shadow.axes_of(partition.rotation.detach(), right, origin, widths).turned
    queries, keys = (rotate_centred(rows, turn, origin).double().split(widths, 1) for rows in (left, right))
    variances = [part.var(0).sum() for part in keys]
    scaled = [_squared(q, k) / v for q, k, v in zip(queries, keys, variances, strict=True)]  # S of [Q, K]
    known, in_order = reaches(torch.stack(scaled))
    for group in CPU.groups:
        found: dict[str, Any] = {"width": max(widths), "subspaces": len(widths), "keys": KEYS, "group": group}
        for name, reach in (("known", known), ("in order", in_order)):
            full, least = 0.0, 0.0
            for s, width in enumerate(widths):
                limit = reach[s] * variances[s]
                full += width
                least += least_work(queries[s], keys[s], limit, group)
            found[f"most times, {name}"] = full / least
        found["share of keys in reach"] = float(
            torch.stack([each < r[:, :1] for each, r in zip(scaled, known, strict=True)]).double().mean()
        )
        yield found


def reaches(squared: Tensor) -> tuple[Tensor, Tensor]:
    """[S, Q, 1] the largest radius of each subspace's pairs at the end, and [S, Q, K] before each tile."""
    subspaces, queries, keys = squared.shape
    end = squared.new_zeros(subspaces, queries, 1)
    before = squared.new_zeros(subspaces, queries, keys // TILE)
    for a in range(subspaces):
        for b in range(a + 1, subspaces):
            least = torch.maximum(squared[a], squared[b]).unflatten(1, (-1, TILE)).amin(2).cummin(1).values
            so_far = torch.cat([torch.full_like(least[:, :1], torch.inf), least[:, :-1]], 1)
            for s in (a, b):
                end[s] = torch.maximum(end[s], least[:, -1:])
                before[s] = torch.maximum(before[s], so_far)
    return end, before.repeat_interleave(TILE, 2)


def least_work(queries: Tensor, keys: Tensor, limit: Tensor, group: int) -> float:
    """Columns that a key takes with the best h, where a group is left if one of its shadows is in reach."""
    width = queries.shape[1]
    slack = TOLERANCE * (queries.square().sum(1)[:, None] + keys.square().sum(1).mean())
    best = float(width)
    for share in SHARES:
        h = max(1, int(width * share))
        bound = _squared(*(shadow.shadow(rows, h) for rows in (queries, keys))) + slack
        left = (bound < limit).unflatten(1, (-1, group)).any(2).double().mean()
        best = min(best, h + 1 + float(left) * (width - h))
    return best


def _squared(queries: Tensor, keys: Tensor) -> Tensor:
    return torch.cdist(queries, keys, compute_mode="use_mm_for_euclid_dist").square()


if __name__ == "__main__":
    main()
