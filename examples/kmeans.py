"""k-means with the package's search as its assignment step, in one space or in several at once.

    python examples/kmeans.py                                    # planted clusters: are they found?
    python examples/kmeans.py activations.npy --clusters 256 --subspaces 8

With one subspace this is Lloyd's algorithm. With S of them every part of a row has clusters of its own, which
is product quantization (Jégou, Douze and Schmid 2011): S numbers below k stand for a row.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ndm_fast import Neighbors, nearest_neighbors


class Clusters(NamedTuple):
    centers: Tensor  # [k, d]; part s of row c is the center of cluster c of subspace s
    index: Tensor  # [S, N] the cluster of every row in every subspace
    errors: list[float]  # mean squared distance of a row to its centers, at each iteration


def k_means(rows: Tensor, clusters: int, widths: list[int], iterations: int = 50) -> Clusters:
    """Rows are [N, d]. A row belongs to the nearest center; a center is the mean of its rows."""
    centers = spread_out(rows, clusters, widths)
    errors: list[float] = []
    while True:
        distance, index = assigned(rows, centers, widths)
        errors.append(distance.square().sum(0).mean().item())
        if len(errors) == iterations or (len(errors) > 1 and errors[-1] > errors[-2] * (1 - 1e-5)):
            return Clusters(centers, index, errors)
        parts = zip(rows.split(widths, 1), centers.split(widths, 1), index, strict=True)
        centers = torch.cat([means(*part) for part in parts], 1)


def assigned(rows: Tensor, centers: Tensor, widths: list[int]) -> Neighbors:
    """Distance [S, N] and index [S, N] of the nearest center. Subspaces are columns: nothing is rotated."""
    return nearest_neighbors(rows, centers, None, widths, keys_rotated=True, queries_rotated=True)


def means(rows: Tensor, centers: Tensor, index: Tensor) -> Tensor:
    """[k, p] means of the rows [N, p] of each cluster; a cluster without rows stays where it is."""
    count = index.bincount(minlength=len(centers))[:, None]
    total = torch.zeros_like(centers).index_add_(0, index, rows)
    return torch.where(count > 0, total / count.clamp_min(1), centers)


def spread_out(rows: Tensor, clusters: int, widths: list[int]) -> Tensor:
    """[k, d] first centers by k-means++ (Arthur and Vassilvitskii 2007), in every subspace on its own.

    A row becomes a center with a chance that grows with its squared distance to those there are.
    """
    centers = rows[torch.randint(len(rows), (1,))]
    nearest = torch.full((len(widths), len(rows)), torch.inf)
    for _ in range(clusters - 1):
        nearest = torch.minimum(nearest, assigned(rows, centers[-1:], widths).distance.square())
        drawn = torch.multinomial(nearest.clamp_min(1e-30), 1)[:, 0]  # [S]
        parts = zip(drawn, rows.split(widths, 1), strict=True)
        centers = torch.cat([centers, torch.cat([part[row] for row, part in parts])[None]])
    return centers


def toy() -> tuple[Clusters, Tensor]:
    """Rows of two independent parts with 12 values each: 24 centers say what takes 144 in one space."""
    widths, values, rows = [6, 4], 12, 6000
    points = [3 * torch.randn(values, width) for width in widths]
    truth = torch.randint(values, (2, rows))
    data = torch.cat([each[t] for each, t in zip(points, truth, strict=True)], 1)
    data = data + 0.1 * torch.randn(rows, sum(widths))
    apart = min((k_means(data, values, widths) for _ in range(8)), key=lambda each: each.errors[-1])
    together = k_means(data, values, [sum(widths)])
    print(f"{values} clusters, one space: mean squared distance {together.errors[-1]:.3f}")
    print(
        f"{values} clusters in each of two subspaces: {apart.errors[-1]:.3f}; noise alone has {0.01 * 10:.3f}"
    )
    return apart, truth


def main() -> None:
    parser = argparse.ArgumentParser(description="k-means; without rows, on planted clusters")
    parser.add_argument("rows", nargs="?", help=".npy file of [N, d] rows")
    parser.add_argument("--clusters", type=int, default=16)
    parser.add_argument("--subspaces", type=int, default=1)
    parser.add_argument("--out", default="clusters.npz", help="file for centers and index")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.rows is None:
        toy()
        return
    rows = torch.from_numpy(np.load(args.rows)).float()
    if rows.shape[1] % args.subspaces:
        parser.error(f"rows are {rows.shape[1]} wide: --subspaces must divide that")
    found = k_means(rows, args.clusters, [rows.shape[1] // args.subspaces] * args.subspaces)
    np.savez(args.out, centers=found.centers.numpy(), index=found.index.numpy())
    print(f"mean squared distance {found.errors[0]:.4f} first, {found.errors[-1]:.4f} last; wrote {args.out}")


if __name__ == "__main__":
    main()
