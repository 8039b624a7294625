"""Stored rows in rotated coordinates, in shards, as ``search.py`` reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Shard(NamedTuple):
    """Rows in rotated coordinates, less the origin, with what a search needs to know of them."""

    rows: Tensor
    """[n, d] fp32, fp16 or bf16."""
    squares: Tensor
    """[S, n] fp32 squared norm of each row's part in each subspace, as stored."""
    inverse_norms: Tensor
    """[S, n] fp32 one over the norm of each part with the origin added back; 0 where that is 0."""


class RotatedRows:
    """Shards of rows, searched as one.

    Args:
        shards: at least one, of the same width.
        origin: [d] fp32, what was subtracted from the rotated rows before they were stored; near their mean,
            so that the numbers stored are small.
        widths: of the S subspaces, in the order of the columns.
    """

    def __init__(self, shards: Sequence[Shard], origin: Tensor, widths: Sequence[int]) -> None:
        self.shards = tuple(shards)
        self.origin = origin
        self.widths = tuple(widths)
        self.columns = [slice(stop - width, stop) for stop, width in zip(_sums(widths), widths, strict=True)]
        self._stops = torch.tensor(_sums([len(shard.rows) for shard in shards]))

    def __len__(self) -> int:
        return int(self._stops[-1])

    def gather(self, index: Tensor, columns: slice = slice(None)) -> Tensor:
        """[n, p] float64 stored rows (less the origin), for their numbers ``index``, [n] int64."""
        shard_of = torch.bucketize(index, self._stops, right=True)
        found = torch.empty(len(index), self.origin[columns].shape[0], dtype=torch.float64)
        for number in shard_of.unique().tolist():
            here = shard_of == number
            rows = self.shards[number].rows
            found[here] = rows[index[here] - (int(self._stops[number]) - len(rows)), columns].double()
        return found


def _sums(sizes: Sequence[int]) -> list[int]:
    return [sum(sizes[: i + 1]) for i in range(len(sizes))]
