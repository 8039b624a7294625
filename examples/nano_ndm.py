"""Neighbor distance minimization (NDM) in one file of plain torch, for readers of the paper.

    python examples/nano_ndm.py                                   # planted groups: are they found?
    python examples/nano_ndm.py activations.npy --unit 32         # [N, d] activations of your own

Huang and Hahn, "Decomposing Representation Space into Interpretable Subspaces with Unsupervised Learning",
arXiv 2508.01916. The method, in the order of this file:

1. Take activations h in R^d. Learn an orthogonal R. Rotated activations h R are cut into S subspaces.
2. In each subspace, find for every query the nearest of many other activations, the keys.
3. The loss is the mean distance to these neighbors. Move R by Adam to lower it, and search again.
4. Now and then, estimate how much information each pair of subspaces shares. Merge pairs that share much.
5. Stop when no pair merges. Each subspace is now, one hopes, a variable of the model.

What this file leaves out, all of it in the package `ndm_fast` beside it:

- Speed. Every step searches anew and holds all [Q, K] distances of a subspace in memory. The package shares a
  search between steps, never forms the distances, and has kernels for CPUs and GPUs.
- A cheaper rotation. Every step takes a matrix exponential. The package moves R along the Lie algebra.
- Precision. The search subtracts large numbers in fp32. Where one coordinate is huge it may miss the nearest
  key. The loss is measured on differences of rows, so it is right for the keys that were found.
- Ways out of a local minimum. Here the best of a few random starts is taken, and that only on the toy.
- The cosine metric, activations from a model, half precision, several devices, checkpoints, evaluation.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn


class Partition(NamedTuple):
    """Subspace s owns the next ``widths[s]`` columns of the rotation."""

    rotation: Tensor  # [d, d] orthogonal
    widths: list[int]  # [S], sum d


# --- 1 The rotation: R = B exp(X - X'), with B fixed and X learned -----------------------------------------
class Rotation(nn.Module):
    """A point of SO(d) that Adam can move: the matrix exponential of a skew matrix, from a base point."""

    def __init__(self, start: Tensor) -> None:  # [d, d] orthogonal
        super().__init__()
        layer = nn.Linear(*start.shape, bias=False)
        self.layer = nn.utils.parametrizations.orthogonal(layer, orthogonal_map="matrix_exp")
        with torch.no_grad():
            self.layer.weight = start

    def forward(self) -> Tensor:  # [d, d]
        return self.layer.weight


def random_rotation(width: int) -> Tensor:
    q, r = torch.linalg.qr(torch.randn(width, width))
    return q * r.diagonal().sign()  # Haar measure: QR alone prefers some signs


# --- 2 The search: in every subspace, the key nearest to each query ----------------------------------------
@torch.no_grad()
def nearest(queries: Tensor, keys: Tensor, rotation: Tensor, widths: list[int]) -> Tensor:
    """[S, Q] row of the nearest key. Queries are [Q, d], keys [K, d]."""
    parts = zip((queries @ rotation).split(widths, 1), (keys @ rotation).split(widths, 1), strict=True)
    # |q - k|^2 = |q|^2 + |k|^2 - 2 qk, and |q|^2 is the same for all keys
    return torch.stack([(k.square().sum(1) - 2 * q @ k.T).argmin(1) for q, k in parts])


# --- 3 The loss: mean distance to the neighbors. Which key is nearest carries no gradient ------------------
def ndm_loss(queries: Tensor, keys: Tensor, index: Tensor, rotation: Tensor, widths: list[int]) -> Tensor:
    """Mean over subspaces and queries of |(q - n_s(q)) R_s|. Subtract first, then rotate: nothing cancels."""
    parts = zip(index, rotation.split(widths, 1), strict=True)
    return torch.stack([((queries - keys[rows]) @ basis).norm(dim=1) for rows, basis in parts]).mean()


# --- 4 Mutual information by the estimator of Kraskov, Stögbauer and Grassberger (2004), k = 1 -------------
@torch.no_grad()
def mutual_information(queries: Tensor, keys: Tensor, partition: Partition) -> Tensor:
    """[S, S] nats between every two subspaces, from [Q, d] queries and [K, d] keys.

    A query's radius is the distance to its nearest key in the joint space, in the maximum norm. Count the
    keys that are nearer than that in each of the two spaces alone. Few keys: much shared information.
    """
    rotation, widths = partition
    origin = keys.mean(0)  # a common offset changes no distance, and smaller numbers round less
    sides = [((rows - origin) @ rotation).split(widths, 1) for rows in (queries, keys)]
    # Each subspace in units of its own spread: otherwise the wider one alone decides the radius.
    distance = [torch.cdist(q, k) / k.var(0).sum().sqrt() for q, k in zip(*sides, strict=True)]
    ends = torch.digamma(torch.tensor([1.0, len(keys) + 1.0]).double()).sum()  # the keys and the query itself
    information = torch.zeros(len(widths), len(widths)).double()
    for a in range(len(widths)):
        for b in range(a + 1, len(widths)):
            radius = torch.maximum(distance[a], distance[b]).amin(1, keepdim=True)
            inside = [(distance[side] < radius).sum(1).double() for side in (a, b)]
            psi = sum(torch.digamma(count + 1).mean() for count in inside)
            information[a, b] = information[b, a] = ends - psi
    return information


def merge(partition: Partition, information: Tensor, threshold: float) -> Partition | None:
    """Merge pairs with MI / (p_a + p_b) above the threshold, best first; None if there is no such pair.

    Pairs are disjoint and at most ``max(1, S // 8)``. Columns are re-ordered so that widths descend.
    """
    rotation, widths = partition
    count = len(widths)
    scores = {(a, b): information[a, b] / (widths[a] + widths[b]) for b in range(count) for a in range(b)}
    groups, free, left = [[s] for s in range(count)], set(range(count)), max(1, count // 8)
    for (a, b), score in sorted(scores.items(), key=lambda item: -item[1]):
        if left and score > threshold and {a, b} <= free:
            groups[a], groups[b], free, left = [a, b], [], free - {a, b}, left - 1
    if len(free) == count:
        return None
    bases = rotation.split(widths, 1)
    merged = [torch.cat([bases[s] for s in group], 1) for group in groups if group]
    merged.sort(key=lambda basis: -basis.shape[1])
    return Partition(torch.cat(merged, 1), [basis.shape[1] for basis in merged])


# --- 5 The loop --------------------------------------------------------------------------------------------
def batches(pool: Tensor, queries: int, keys: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (queries [Q, d], keys [K, d]). A query is not among its keys, and is used once a round."""
    while True:
        pool = pool[torch.randperm(len(pool))]
        for start in range(0, len(pool) - queries - keys + 1, queries):
            rest = pool[start + queries :]
            first = torch.randint(len(rest) - keys + 1, ()).item()
            yield pool[start : start + queries], rest[first : first + keys]


def train(
    data: Iterator[tuple[Tensor, Tensor]],  # of queries [Q, d] and keys [K, d], for one step each
    heldout: Tensor,  # [H, d] queries for the mutual information, never trained on
    start: Partition,
    *,
    steps: int,
    lr: float = 3e-4,
    merge_start: float = math.inf,  # steps before the first check for merges
    merge_interval: int = 8000,
    threshold: float = 0.04,  # nats per dimension
) -> tuple[Partition, list[float]]:
    """Move the rotation, and merge. Returns the partition and the loss of every step.

    Published for GPT-2 small: 128 queries, 409,600 keys, 100,000 steps, first check at 20,000.
    """
    widths, model, losses = start.widths, Rotation(start.rotation), []
    adam = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.999))
    for step in range(1, steps + 1):
        queries, keys = next(data)
        rotation = model()
        index = nearest(queries, keys, rotation, widths)
        loss = ndm_loss(queries, keys, index, rotation, widths)
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 100.0)
        adam.step()
        losses.append(loss.item())
        if merge_start <= step < steps and (step - merge_start) % merge_interval == 0:
            now = Partition(model().detach(), widths)
            merged = merge(now, mutual_information(heldout, keys, now), threshold)
            if merged is None:
                break
            widths, model = merged.widths, Rotation(merged.rotation)  # a new base point, and new moments
            adam = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.999))
    return Partition(model().detach(), widths), losses


# --- A toy with known subspaces ----------------------------------------------------------------------------
PLANTED = [8, 4]  # widths of the groups


def planted_groups(rows: int, values: int = 64, noise: float = 0.02) -> tuple[Tensor, list[Tensor]]:
    """[rows, d] activations, and for each group an orthonormal basis [d, p] of its subspace.

    A group is a variable with 64 values, each a point of its subspace. An activation is the sum of one point
    of each group, and noise. A random rotation hides the groups. The 4,096 joint states outnumber the keys:
    else every query has a twin among them, and the loss is low in any rotation.
    """
    bases = list(random_rotation(sum(PLANTED)).split(PLANTED, 1))
    points = [torch.randn(values, basis.shape[1]) @ basis.T for basis in bases]
    parts = [each[torch.randint(values, (rows,))] for each in points]
    return torch.stack(parts).sum(0) + noise * torch.randn(rows, sum(PLANTED)), bases


def toy(starts: int = 6) -> Partition:
    """Train from some random starts, let the best merge, and print where the groups went."""
    rows, bases = planted_groups(40_000)
    heldout, keys, pool = rows[:512], rows[512:1536], rows[1536:]
    tried = []
    for number in range(starts):  # about half of them end in a local minimum, the groups mixed
        start = Partition(random_rotation(sum(PLANTED)), [4, 4, 4])
        found, _ = train(batches(pool, 64, 512), heldout, start, steps=300, lr=3e-2)
        with torch.no_grad():
            loss = ndm_loss(heldout, keys, nearest(heldout, keys, *found), *found).item()
        tried.append((loss, found))
        print(f"start {number}: held-out distance {loss:.3f}")
    best = min(tried, key=lambda each: each[0])[1]
    merging = {"merge_start": 50, "merge_interval": 50, "threshold": 0.2}
    partition, _ = train(batches(pool, 64, 512), heldout, best, steps=200, lr=3e-3, **merging)
    print(f"planted widths {PLANTED}, found {partition.widths}")
    for number, basis in enumerate(bases):
        parts = partition.rotation.split(partition.widths, 1)
        shares = [(basis.T @ part).square().sum().item() / basis.shape[1] for part in parts]
        print(f"share of group {number} in each subspace: " + "  ".join(f"{share:.1%}" for share in shares))
    return partition


def main() -> None:
    parser = argparse.ArgumentParser(description="NDM in one file; without activations, a toy")
    parser.add_argument("activations", nargs="?", help=".npy file of [N, d] activations")
    parser.add_argument("--unit", type=int, default=32, help="width of the subspaces at the start; divides d")
    parser.add_argument("--keys", type=int, default=8192, help="keys that each query is compared with")
    parser.add_argument("--steps", type=int, default=2000, help="most steps")
    parser.add_argument("--lr", type=float, default=3e-3, help="learning rate of Adam")
    parser.add_argument("--threshold", type=float, default=0.04, help="merge above this, nats per dimension")
    parser.add_argument("--out", default="partition.npz", help="file for rotation and widths")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.activations is None:
        toy()
        return
    rows = torch.from_numpy(np.load(args.activations)).float()
    rows = rows[torch.randperm(len(rows))]
    width, heldout = rows.shape[1], rows[:128]
    if width % args.unit or len(rows) < args.keys + 256:
        parser.error(f"{tuple(rows.shape)} activations: --unit must divide d, and N be at least --keys + 256")
    start = Partition(torch.eye(width), [args.unit] * (width // args.unit))
    data = batches(rows[128:], 128, args.keys)
    schedule = {"merge_start": args.steps // 2, "merge_interval": max(1, args.steps // 10)}
    partition, losses = train(
        data, heldout, start, steps=args.steps, lr=args.lr, threshold=args.threshold, **schedule
    )
    np.savez(args.out, rotation=partition.rotation.numpy(), widths=partition.widths)
    print(f"distance at first {losses[0]:.4f}, before merging {losses[args.steps // 2 - 1]:.4f}")
    print(f"widths {partition.widths}; wrote {args.out}")


if __name__ == "__main__":
    main()
