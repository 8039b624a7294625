"""How subspaces of two sites compose through a head, and what random subspaces of the same widths would give.

    through head h    ||R_s' N W_v O G R_t||^2 / ||N W_v O G||^2       s of the site below, t of the one above
    through the skip  ||R_s' R_t||^2 / width of s

Shares alone favor wide subspaces. The null is the same share for random rotations: its mean is the share of
the width, its spread tells how far a share of such a matrix strays by chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ndm_fast.evaluate.connections.weights import Factors, read_shares, subspace_sums, write_shares
from ndm_fast.geometry.orthogonal import random_rotation
from ndm_fast.partition import SubspacePartition
from ndm_fast.seeds import Draw, seeded

ROTATIONS = 16
"""Random rotations of the null."""


class Scored(NamedTuple):
    """Shares beside their null."""

    share: Tensor
    """[..., S] (or [..., S, S'])."""
    times: Tensor
    """Share over the null's mean: 1 is chance."""
    deviations: Tensor
    """Share less the null's mean, over the null's standard deviation."""


def scored_reads(acts: Factors, partition: SubspacePartition, *, seed: int = 0) -> Scored:
    """[n, S] shares that matrices read of each subspace, with their null."""
    null = (read_shares(acts, random) for random in _random(partition.widths, seed))
    return _scored(read_shares(acts, partition), list(null), [partition.widths])


def scored_writes(acts: Factors, partition: SubspacePartition, *, seed: int = 0) -> Scored:
    """[n, S] shares that matrices write into each subspace, with their null."""
    null = (write_shares(acts, random) for random in _random(partition.widths, seed))
    return _scored(write_shares(acts, partition), list(null), [partition.widths])


def scored_through(
    acts: Factors, below: SubspacePartition, above: SubspacePartition, *, seed: int = 0
) -> Scored:
    """[n, S, S'] shares of what matrices take from each subspace into each, with their null."""
    pairs = zip(_random(below.widths, seed), _random(above.widths, seed + 1), strict=True)
    null = [through(acts, one, other) for one, other in pairs]
    return _scored(through(acts, below, above), null, [below.widths, above.widths])


def through(acts: Factors, below: SubspacePartition, above: SubspacePartition) -> Tensor:
    """[n, S, S'] share of each pair of subspaces in what matrices take from below to above."""
    whole = (below.rotation.T.to(acts.left) @ acts.left) @ (acts.right @ above.rotation.to(acts.right))
    rows = subspace_sums(whole.square(), above.widths)
    shares = subspace_sums(rows.mT, below.widths).mT
    return shares / shares.sum((1, 2), keepdim=True)


def kept(below: SubspacePartition, above: SubspacePartition) -> Tensor:
    """[S, S'] share of each subspace below that lies in each above: what the skip connection carries."""
    squares = (below.rotation.T @ above.rotation).square()
    columns = subspace_sums(squares, above.widths)
    return subspace_sums(columns.T, below.widths).T / torch.tensor(below.widths)[:, None]


def _random(widths: Sequence[int], seed: int) -> list[SubspacePartition]:
    generators = (seeded(seed, Draw.CONNECTION_NULL, number) for number in range(ROTATIONS))
    return [SubspacePartition(random_rotation(sum(widths), one), widths) for one in generators]


def _scored(share: Tensor, null: Sequence[Tensor], widths: Sequence[Sequence[int]]) -> Scored:
    """Scores against a null whose subspaces of one width are draws of one distribution."""
    expected = torch.ones(())
    for some in widths:
        expected = expected[..., None] * torch.tensor(some) / sum(some)
    squares = torch.stack([(one - expected).square() for one in null]).mean(0)
    for axis, some in enumerate(widths, start=-len(widths)):
        same = torch.tensor([[a == b for b in some] for a in some]).float()
        squares = (squares.movedim(axis, -1) @ (same / same.sum(1)).T).movedim(-1, axis)
    return Scored(share, share / expected, (share - expected) / squares.sqrt())
