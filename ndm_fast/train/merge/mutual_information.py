"""Mutual information between subspaces: the nearest-neighbor estimate of Kraskov et al. with k = 1."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from ndm_fast.geometry.centring import rotate_centred, sample_mean
from ndm_fast.ranks import Group, Ranks
from ndm_fast.train.over_ranks import ksg_counts


def subspace_variances(activations: Tensor, rotation: Tensor, widths: Sequence[int]) -> Tensor:
    """[S] fp64 total variance in each subspace, from [N, d] activations."""
    activations = activations.double()
    centred = activations - activations.mean(0)
    covariance = centred.T @ centred / max(1, len(centred) - 1)
    by_column = ((covariance @ rotation.double()) * rotation.double()).sum(0)
    return torch.stack([part.sum() for part in by_column.split(list(widths))]).clamp_min(0)


def mutual_information(
    queries: Tensor,
    keys: Tensor,
    rotation: Tensor,
    widths: Sequence[int],
    *,
    pairs: Sequence[tuple[int, int]] | None = None,
    backend: str | None = None,
    group: Group | None = None,
) -> Tensor:
    """[S, S] fp64 mutual information in nats, symmetric, diagonal 0.

    ``MI = psi(1) + psi(N) - mean(psi(n_a + 1) + psi(n_b + 1))``, N keys and the query itself, counts as in
    ``ops.ksg_counts`` (Kraskov, Stögbauer & Grassberger 2004, algorithm 1). Distances in a subspace are
    divided by the square root of its total variance over the keys.

    Args:
        queries: [Q, d], none of them among the keys.
        keys: [K, d].
        rotation, widths: the partition.
        pairs: pairs to estimate; default all. Others stay 0.
        group: the ranks that estimate together; ``keys`` are then those held here. All get the same result.
    """
    chosen = list(combinations(range(len(widths)), 2)) if pairs is None else list(pairs)
    result = torch.zeros(len(widths), len(widths), dtype=torch.float64)
    if not chosen:
        return result
    group = group or Group()
    count = len(queries)
    queries = group.queries.share(queries)
    origin = group.keys.sum(sample_mean(keys)) / group.keys.size
    rotated_queries, rotated_keys = (rotate_centred(rows, rotation, origin) for rows in (queries, keys))
    variances = torch.stack([part.sum() for part in _variance(rotated_keys, group.keys).split(list(widths))])
    arguments = (rotated_queries, rotated_keys, rotation, widths, variances)
    which = torch.tensor(chosen, device=queries.device)
    counts = ksg_counts(group.keys, *arguments, which, backend)
    inside = group.queries.sum(torch.digamma(counts.double() + 1).sum((1, 2))).cpu() / count
    total = group.keys.sum(torch.tensor(len(keys))).double() + 1
    estimates = torch.digamma(torch.ones_like(total)) + torch.digamma(total) - inside
    for (a, b), estimate in zip(chosen, estimates, strict=True):
        result[a, b] = result[b, a] = estimate
    return result


def _variance(rows: Tensor, ranks: Ranks) -> Tensor:
    """[d] variance of each column over the rows of all ranks (Chan, Golub & LeVeque 1979)."""
    if ranks.size == 1:
        return rows.var(0)
    total = ranks.sum(torch.tensor(len(rows)))
    mean = ranks.sum(rows.sum(0)) / total
    around = rows.var(0, correction=0) + (rows.mean(0) - mean).square()
    return ranks.sum(around * len(rows)) / (total - 1)
