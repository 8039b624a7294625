"""Mutual information between subspaces: the nearest-neighbor estimate of Kraskov et al. with k = 1."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from operator import index as as_index

import torch
from torch import Tensor

from ndm_fast.errors import InputError
from ndm_fast.geometry.centring import sample_mean
from ndm_fast.ops.arrays import Array
from ndm_fast.ops.checks import check_finite, check_rows
from ndm_fast.ops.product import rotate_centred
from ndm_fast.ranks import Group, Ranks
from ndm_fast.train.merge.ties import made_equal, tied_counts
from ndm_fast.train.over_ranks import ksg_radius_and_counts

_BLOCK_ELEMENTS = 1 << 20
"""Elements whose squares are summed at once: 4 MB, which stay in a cache."""

_ROUNDED_MEAN = 1e-5
"""More than a mean in fp32 is off by, of its size."""


def subspace_variances(activations: Tensor, rotation: Tensor, widths: Sequence[int]) -> Tensor:
    """[S] fp64 total variance in each subspace, from [N, d] activations."""
    activations = activations.double()
    centred = activations - activations.mean(0)
    covariance = centred.T @ centred / max(1, len(centred) - 1)
    by_column = ((covariance @ rotation.double()) * rotation.double()).sum(0)
    return torch.stack([part.sum() for part in by_column.split(list(widths))]).clamp_min(0)


def mutual_information(
    queries: Array,
    keys: Array,
    rotation: Array,
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

    A query with equals among the keys has radius 0. Its n_a and n_b are then the keys that equal it in a
    subspace, and ``psi(1)`` becomes ``psi(k + 1)``, with k that equal it in both (Gao, Kannan, Oh &
    Viswanath 2017). So rows of n different values share at most about ``ln n``.

    Args:
        queries: [Q, d], none of them among the keys; fp32, fp16 or bf16, finite.
        keys: [K, d] likewise; at least two.
        rotation: [d, d] fp32. widths: S widths that sum to d.
        pairs: pairs of two different subspaces to estimate; default all. Others stay 0.
        backend: see ``ndm_fast.ops.backends``.
        group: the ranks that estimate together; ``keys`` are then those held here. All get the same result.

    Raises:
        InputError (a ValueError): naming the argument, or a backend that cannot run.
    """
    queries, keys, rotation, widths = check_rows(queries, keys, rotation, widths)
    check_finite(queries, keys, rotation)
    chosen = _checked_pairs(pairs, len(widths))
    group = group or Group()
    total = group.keys.sum(torch.tensor(len(keys)))
    if int(total) < 2:
        raise InputError("keys has one row, and no variance: give at least two")
    result = torch.zeros(len(widths), len(widths), dtype=torch.float64)
    if not chosen:
        return result
    count = len(queries)
    queries = group.queries.share(queries)
    rotated_queries, rotated_keys = _rotated(queries, keys, rotation, group.keys)
    variances = torch.stack([part.sum() for part in _variance(rotated_keys, group.keys).split(widths)])
    which = torch.tensor(chosen, device=queries.device)
    arguments = (rotated_queries, rotated_keys, rotation, widths, variances, which)
    radius, counts = ksg_radius_and_counts(group.keys, *arguments, backend)
    inside = torch.digamma(counts.double() + 1).sum((1, 2))
    if bool((radius == 0).any()):
        both, each = tied_counts(rotated_queries, rotated_keys, widths, which, group.keys)
        inside = _inside(counts, radius == 0, both, each)
    inside = group.queries.sum(inside).cpu() / count
    total = total.double() + 1
    estimates = torch.digamma(torch.ones_like(total)) + torch.digamma(total) - inside
    for (a, b), estimate in zip(chosen, estimates, strict=True):
        result[a, b] = result[b, a] = estimate
    return result


def _checked_pairs(pairs: Sequence[tuple[int, int]] | None, subspaces: int) -> list[tuple[int, int]]:
    if pairs is None:
        return list(combinations(range(subspaces), 2))
    try:
        chosen = [(as_index(a), as_index(b)) for a, b in pairs]
    except (TypeError, ValueError):
        raise InputError("pairs are not pairs of ints: give two numbers of subspaces each") from None
    for pair in chosen:
        if pair[0] == pair[1] or min(pair) < 0 or max(pair) >= subspaces:
            raise InputError(f"pairs name {pair}: give two different numbers from 0 to {subspaces - 1}")
    return chosen


def _rotated(queries: Tensor, keys: Tensor, rotation: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """fp32 rows minus a common origin, rotated; equal where the rows are equal."""
    origin = ranks.sum(sample_mean(keys)) / ranks.size
    parts = [rotate_centred(rows, rotation, origin) for rows in (queries, keys)]
    rotated_queries, rotated_keys = made_equal([queries, keys], parts)
    return rotated_queries, rotated_keys


def _inside(counts: Tensor, tied: Tensor, both: Tensor, each: Tensor) -> Tensor:
    """[P] sums over queries of what the estimate subtracts.

    Args:
        counts: [P, 2, Q] keys below the radius. tied: [P, Q] where that is 0; there counts, in each subspace
            [P, 2, Q] and in both [P, Q], of keys that equal the query.
    """
    apart = torch.digamma(counts.double() + 1).sum(1)
    equal = torch.digamma(each.double() + 1).sum(1) - torch.digamma(both.double() + 1)
    return torch.where(tied, equal + torch.digamma(torch.ones_like(equal)), apart).sum(1)


def _variance(rows: Tensor, ranks: Ranks) -> Tensor:
    """[d] fp64 variance of each column over the rows of all ranks (Chan, Golub & LeVeque 1979)."""
    own = rows.mean(0)
    squares = _squares_around(own, rows)
    if ranks.size == 1:
        return squares / (len(rows) - 1)
    total = ranks.sum(torch.tensor(len(rows)))
    mean = ranks.sum(rows.sum(0)) / total
    return ranks.sum(squares + len(rows) * (own - mean).square()) / (total - 1)


def _squares_around(mean: Tensor, rows: Tensor) -> Tensor:
    """[d] fp64 sums of squares, block by block: torch's ``var`` over rows is slow on a CPU."""
    size = max(1, _BLOCK_ELEMENTS // rows.shape[1])
    buffer = torch.empty(min(size, len(rows)), rows.shape[1], device=rows.device)
    total = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
    for block in rows.split(size):
        around = torch.sub(block, mean, out=buffer[: len(block)])
        total += around.square_().sum(0)
    constant = total <= len(rows) * (_ROUNDED_MEAN * mean.double()).square()
    if bool(constant.any()):  # what is left there may be the rounding of the mean alone
        total[constant] = rows[:, constant].double().var(0, correction=0) * len(rows)
    return total
