"""Rows that repeat, bit for bit: found by hashes, so that ranks and backends agree on them.

A model's first layer has as many different activations as tokens, and a discrete variable a few values. The
estimate of mutual information needs to know: equal rows have distance 0, where a density has no neighbor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ndm_fast.ranks import Ranks

_FEW = 24
"""Columns by which rows are compared first: where these all differ, and mostly they do, so do the rows."""

_BLOCK_ELEMENTS = 1 << 20


def made_equal(rows: list[Tensor], rotated: list[Tensor]) -> list[Tensor]:
    """``rotated``, parts of [N, d], with equal numbers where ``rows``, parts of the same sizes, are equal.

    A matrix product may round equal rows differently, by where they lie. Without equal rows this returns
    ``rotated`` itself.
    """
    if len({part.dtype for part in rows}) > 1:
        rows = [part.float() for part in rows]
    step = -(-rows[0].shape[1] // _FEW)
    if not _repeats(_whole_hashes([part[:, ::step] for part in rows])):
        return rotated
    hashes = _whole_hashes(rows)
    if not _repeats(hashes):
        return rotated
    order = hashes.sort(stable=True)
    fresh = torch.ones_like(hashes, dtype=torch.bool)
    fresh[1:] = order.values[1:] != order.values[:-1]
    first = torch.empty_like(order.indices)
    first[order.indices] = order.indices[fresh][fresh.cumsum(0) - 1]
    return list(torch.cat(rotated)[first].split([len(part) for part in rotated]))


def tied_counts(
    queries: Tensor, keys: Tensor, widths: Sequence[int], pairs: Tensor, ranks: Ranks
) -> tuple[Tensor, Tensor]:
    """Keys of all ranks that equal a query: in both subspaces of a pair, [P, Q], and in each, [P, 2, Q].

    Args:
        queries: [Q, d] and keys: [K, d], fp32, rotated; pairs: [P, 2] int64 numbers of subspaces.
    """
    here, there = (_hashes(rows, widths) for rows in (queries, keys))
    alone = [_equal(here[:, s], there[:, s]) for s in range(len(widths))]
    both = [_equal(here[:, a] + here[:, b], there[:, a] + there[:, b]) for a, b in pairs.tolist()]
    each = torch.stack(alone)[pairs]
    return ranks.sum(torch.stack(both)), ranks.sum(each)


def _hashes(rows: Tensor, widths: Sequence[int]) -> Tensor:
    """[N, S] int64 hash of every row in every subspace, by its bits; those of subspaces may be added.

    Columns are weighted by random odd numbers, always the same, and high bits mixed into low ones.
    """
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(-(2**62), 2**62, (rows.shape[1],), generator=generator)
    weights = (2 * weights + 1).to(rows.device)
    bits = torch.int32 if rows.dtype == torch.float32 else torch.int16
    owner = torch.arange(len(widths)).repeat_interleave(torch.tensor(widths)).to(rows.device)
    found = torch.zeros(len(rows), len(widths), dtype=torch.int64, device=rows.device)
    size = max(1, _BLOCK_ELEMENTS // rows.shape[1])
    for start in range(0, len(rows), size):
        block = (rows[start : start + size] + 0.0).contiguous()  # -0 becomes 0
        mixed = block.view(bits).long() * weights
        mixed = (mixed ^ (mixed >> 32)) * weights
        found[start : start + size].index_add_(1, owner, mixed)
    return found


def _whole_hashes(parts: list[Tensor]) -> Tensor:
    """[N] int64 of whole rows."""
    return torch.cat([_hashes(part, [part.shape[1]])[:, 0] for part in parts])


def _repeats(hashes: Tensor) -> bool:
    values = hashes.sort().values
    return bool((values[1:] == values[:-1]).any())


def _equal(queries: Tensor, keys: Tensor) -> Tensor:
    """[Q] int64 number of keys with a query's hash."""
    keys = keys.sort().values
    return torch.searchsorted(keys, queries.contiguous(), right=True) - torch.searchsorted(
        keys, queries.contiguous()
    )
