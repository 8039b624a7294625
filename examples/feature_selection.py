"""Which features say most about a target? Chosen by mutual information, with the package's KSG ops.

    python examples/feature_selection.py                         # planted: five of twelve features matter
    python examples/feature_selection.py table.npy --choose 5    # [N, features + 1], the target last

Information sees what a correlation does not, such as a square. The estimate is that of Kraskov, Stögbauer and
Grassberger (2004). A feature that repeats one already chosen says nothing new. So each choice is the feature
whose information about the target, less its mean information about those chosen, is largest (mRMR: Peng, Long
and Ding 2005).
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch import Tensor

from ndm_fast.ops import ksg_radius_and_counts


def information(queries: Tensor, keys: Tensor, pairs: Tensor) -> Tensor:
    """[P] nats that pairs [P, 2] of columns share, from rows [Q, d] and others [K, d]."""
    mean, variances = keys.mean(0), keys.var(0)
    widths = [1] * keys.shape[1]  # every column is a subspace
    given = (queries - mean, keys - mean, None, widths, variances, pairs)
    _, counts = ksg_radius_and_counts(*given, rotated=True)
    ends = torch.digamma(torch.tensor([1.0, len(keys) + 1.0]).double()).sum()
    return ends - torch.digamma(counts.double() + 1).sum(1).mean(1)


def choose(rows: Tensor, count: int) -> tuple[list[int], Tensor]:
    """Columns chosen, best first, and [d - 1] nats each column shares with the last one, the target.

    The estimates scatter by about ``1.7 / sqrt(N)`` nats (measured on noise), so little may be nothing.
    """
    asked, others = rows[torch.randperm(len(rows))].tensor_split(2)
    target = rows.shape[1] - 1
    relevance = information(asked, others, torch.tensor([[column, target] for column in range(target)]))
    chosen, redundancy = [int(relevance.argmax())], torch.zeros(target).double()
    while len(chosen) < count:
        with_last = torch.tensor([[column, chosen[-1]] for column in range(target)])
        redundancy += information(asked, others, with_last)
        score = relevance - redundancy / len(chosen)
        score[chosen] = -torch.inf
        chosen.append(int(score.argmax()))
    return chosen, relevance


NAMES = ["line", "square", "sine", "sign", "line again", *[f"noise {n}" for n in range(7)]]


def planted(rows: int) -> Tensor:
    """[rows, 13]: a target that is made of four features, one of which comes twice, among seven of noise."""
    features = torch.randn(rows, 12)
    line, square, sine, sign = features[:, :4].unbind(1)
    features[:, 4] = line + 0.3 * torch.randn(rows)
    target = line + square.square() + 1.5 * torch.sin(2 * sine) + sign.sign() + 0.1 * torch.randn(rows)
    return torch.cat([features, target[:, None]], 1)


def toy() -> list[int]:
    rows = planted(16_000)
    chosen, relevance = choose(rows, 4)
    correlation = torch.corrcoef(rows.T)[-1, :-1].abs()
    for column in relevance.argsort(descending=True).tolist():
        mark = f"chosen {chosen.index(column) + 1}" if column in chosen else ""
        said = f"{relevance[column]:7.3f} nats, correlation {correlation[column]:.2f}"
        print(f"{NAMES[column]:12}{said}  {mark}".rstrip())
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description="choose features; without rows, on a planted table")
    parser.add_argument("rows", nargs="?", help=".npy file of [N, features + 1] rows, the target last")
    parser.add_argument("--choose", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.rows is None:
        toy()
        return
    rows = torch.from_numpy(np.load(args.rows)).float()
    chosen, relevance = choose(rows, args.choose)
    for column in chosen:
        print(f"column {column}: {relevance[column]:.3f} nats about the target")


if __name__ == "__main__":
    main()
