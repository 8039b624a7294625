"""Which threshold suits a partition: merge on to a single space on paper, and look where the scores drop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ndm_fast.partition import merged_order
from ndm_fast.train.merge.mutual_information import mutual_information
from ndm_fast.train.merge.pairs import merge_scores

_NULL_DRAWS = 3


class MergeTree(NamedTuple):
    """Merges on paper, from S subspaces down to one."""

    heights: list[float]
    """[S - 1] score of each merge, nats per dimension; none counts as higher than one before it."""
    noise: float
    """Largest score that a pair reaches where its samples are shuffled against each other."""

    @property
    def threshold(self) -> float:
        """Where to cut: in the middle (geometric) of the widest relative gap between scores above the noise.

        Scores below the noise count as the noise. Infinite, so that nothing merges, where none is above it
        or where there is a single merge, which leaves no gap to look at.
        """
        levels = [max(height, self.noise) for height in self.heights]
        gaps = [(high / low, math.sqrt(high * low)) for high, low in pairwise(levels)]
        widest, middle = max(gaps, default=(1.0, math.inf))
        return middle if widest > 1 else math.inf


def merge_tree(
    queries: Tensor, keys: Tensor, rotation: Tensor, widths: Sequence[int], generator: torch.Generator
) -> MergeTree:
    """The tree of merges by highest ``MI / (p_a + p_b)``, information estimated anew after every merge.

    Args:
        queries: [Q, d], not among the keys. keys: [K, d]. rotation, widths: the partition.
        generator: for the shuffled samples of the noise.
    """
    noise = _null_score(queries, keys, rotation, widths, generator)
    parts = list(rotation.split(list(widths), 1))
    sizes = list(widths)
    information = mutual_information(queries, keys, rotation, sizes)
    heights: list[float] = []
    while len(sizes) > 1:
        scores = merge_scores(information, sizes).fill_diagonal_(-math.inf)
        a, b = sorted(divmod(int(scores.argmax()), len(sizes)))
        height = float(scores[a, b])
        heights.append(min(height, heights[-1]) if heights else height)
        order = merged_order(sizes, [(a, b)])
        parts = [torch.cat([parts[s] for s in group], 1) for group in order]
        sizes = [part.shape[1] for part in parts]
        new = next(i for i, group in enumerate(order) if len(group) == 2)
        first = torch.tensor([group[0] for group in order])
        kept = information[first][:, first]
        pairs = [(min(new, s), max(new, s)) for s in range(len(sizes)) if s != new]
        fresh = mutual_information(queries, keys, torch.cat(parts, 1), sizes, pairs=pairs)
        kept[new, :], kept[:, new] = fresh[new, :], fresh[:, new]
        information = kept
    return MergeTree(heights, noise)


def _null_score(
    queries: Tensor, keys: Tensor, rotation: Tensor, widths: Sequence[int], generator: torch.Generator
) -> float:
    """Largest score over pairs and draws where every subspace's coordinates are shuffled over the samples."""
    rows = (torch.cat([queries, keys]) @ rotation.to(queries.dtype)).split(list(widths), 1)
    largest = 0.0
    identity = torch.eye(sum(widths), device=queries.device)
    for _ in range(_NULL_DRAWS):
        mixed = torch.cat(
            [part[torch.randperm(len(part), generator=generator).to(part.device)] for part in rows], 1
        )
        found = mutual_information(mixed[: len(queries)], mixed[len(queries) :], identity, widths)
        largest = max(largest, float(merge_scores(found, widths).triu(1).max()))
    return max(largest, 1e-6)
