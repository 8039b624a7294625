"""Rows that are never trained on: every rotation is measured by the same ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ndm_fast.activations.rows import Stream, take_rows
from ndm_fast.config import TrainConfig
from ndm_fast.geometry.precision import full_fp32
from ndm_fast.ranks import Group
from ndm_fast.seeds import Draw, seeded
from ndm_fast.train.merge.mutual_information import subspace_variances
from ndm_fast.train.steps import Steps

_LEAST_VARIANCE = 1e-12
"""Of the largest, at which a direction counts as if it varied."""


def hold_out(stream: Stream, train: TrainConfig) -> tuple[Tensor, int]:
    """[queries + keys, d] the first rows of a stream, shuffled; and the batch that comes after them.

    Raises:
        InputError: the stream is too short.
    """
    rows, batches = take_rows(stream.batches(), train.heldout_queries + train.heldout_keys)
    return rows[torch.randperm(len(rows), generator=seeded(train.seed, Draw.HELD_OUT))], batches


class HeldOut:
    """Held-out queries and keys.

    Args:
        rows: [queries + keys, d] as a pool stores them, the same on every rank.
        queries: how many of them are queries.
        group: the ranks that measure together.
        scale: stored activations over the true ones.
    """

    def __init__(self, rows: Tensor, queries: int, group: Group, scale: float) -> None:
        self.rows = rows
        self.queries, self.keys = rows[:queries], rows[queries:]
        self._group, self._scale = group, scale
        self._covariance: Tensor | None = None

    def distance(self, steps: Steps, rotation: Tensor) -> Tensor:
        """[S] mean distance of the queries to their neighbors among the keys; geometric for logarithms."""
        queries, keys = self._group.queries.share(self.queries), self._group.keys.share(self.keys)
        distance = steps.search(queries, keys, rotation).distance
        return steps.mean_distance(distance, len(self.queries)) / steps.distance_scale

    def deviations(self, rotation: Tensor) -> Tensor:
        """[d] standard deviations along the columns of a rotation, as stored; never 0."""
        if self._covariance is None:
            self._covariance = torch.cov(self.rows.float().T)
        with full_fp32():
            variances = ((self._covariance @ rotation) * rotation).sum(0)
        return variances.clamp_min(variances.max() * _LEAST_VARIANCE).sqrt()

    def variances(self, rotation: Tensor, widths: Sequence[int]) -> Tensor:
        """[S] fp64 variance of the activations in each subspace."""
        return subspace_variances(self.rows, rotation, widths) / self._scale**2
