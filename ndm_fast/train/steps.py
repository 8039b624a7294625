"""What happens between two searches: neighbors, then a gradient and a turn for every batch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ndm_fast.config import TrainConfig
from ndm_fast.geometry.objective import Objective, loss_weights
from ndm_fast.geometry.reference import Neighbors
from ndm_fast.ops.gradient import direct_gradient
from ndm_fast.ops.nearest import direct_index
from ndm_fast.ranks import Group
from ndm_fast.train.cuda_graph import GraphedSearch, GraphedSteps
from ndm_fast.train.over_ranks import nearest_neighbors
from ndm_fast.train.rotation.base import Rotation, Turn

_FLOOR = 0.05
"""Share of a subspace's mean distance below which a logarithm stops to fall: exact copies have no say."""


class Steps:
    """Takes optimiser steps on a rotation, for one partition; a merge makes another one.

    Args:
        config: queries of a step, metric, precision, clip.
        group: the ranks that train together.
        widths: of the S subspaces.
        rotation: what the steps move.
        scale: stored activations over true ones.
        cuda_graph: replay a search as one CUDA graph, and the steps after it as another.
    """

    def __init__(
        self,
        config: TrainConfig,
        group: Group,
        widths: Sequence[int],
        rotation: Rotation,
        scale: float,
        *,
        cuda_graph: bool = False,
    ) -> None:
        self._config = config
        self._group = group
        self._widths = tuple(widths)
        self._rotation = rotation
        self._largest = config.grad_clip * scale
        self.distance_scale = 1.0 if config.metric == "cosine" else scale
        """Stored distances over the true ones; a cosine has no scale."""
        self._logarithmic = config.objective == "log"
        by_width = self._logarithmic or config.metric == "cosine"
        self.weights = loss_weights(widths, by_width=by_width, device=rotation.working.device).float()
        """[S] what a mean over a subspace counts in the loss."""
        self._gradient, self._index = direct_gradient(), direct_index()
        self._graph = GraphedSteps(self._take_each, rotation) if cuda_graph else None
        self._neighbors = GraphedSearch(self._find) if cuda_graph else self._find

    @property
    def batch_size(self) -> int:
        """Queries of this rank in a step."""
        return self._config.queries // self._group.queries.size

    def neighbors(self, queries: Tensor, keys: Tensor, rotation: Tensor) -> Tensor:
        """[S, Q] rows of the keys that are nearest, up to the rounding of the rotation.

        Valid until the next call.
        """
        return self._neighbors(queries, keys, rotation)

    def _find(self, queries: Tensor, keys: Tensor, rotation: Tensor) -> Tensor:
        if self._group.keys.size > 1:
            return self.search(queries, keys, rotation).index
        config = self._config
        found: Tensor = self._index(
            queries=queries,
            keys=keys,
            rotation=rotation,
            widths=self._widths,
            metric=config.metric,
            precision=config.precision,
        )
        return found

    def search(self, queries: Tensor, keys: Tensor, rotation: Tensor) -> Neighbors:
        """Neighbors of this rank's queries among the keys of all ranks, with exact distances."""
        config = self._config
        return nearest_neighbors(
            self._group.keys, queries, keys, rotation, self._widths, config.metric, config.precision
        )

    def objective(
        self, queries: Tensor, keys: Tensor, index: Tensor, rotation: Tensor, log_floor: Tensor | None = None
    ) -> Objective:
        """Loss and gradient over the queries and neighbors of all ranks; with a floor, of logarithms."""
        places, here = self._group.keys.owned(index)
        # The index comes from a search among these keys, and looking at it would make the host wait.
        part = self._gradient(
            queries=queries,
            keys=keys,
            index=places,
            rotation=rotation,
            widths=self._widths,
            metric=self._config.metric,
            counted=here,
            log_floor=log_floor,
        )
        return Objective(*(self._group.combine(each) for each in part))

    def mean_distance(self, distance: Tensor, count: int) -> Tensor:
        """[S] means of [S, Q] distances of this rank, over ``count`` of all ranks; geometric for logs."""
        mean = self._group.queries.sum(distance.sum(1)) / count
        if not self._logarithmic:
            return mean
        squared = distance.square() + (_FLOOR * mean).square()[:, None]
        return (self._group.queries.sum(squared.log().sum(1)) / (2 * count)).exp()

    def loss(self, by_subspace: Tensor) -> float:
        """One distance from [S] means; for logarithms their geometric mean, by width."""
        means = by_subspace.float()
        return float((self.weights @ means.log()).exp() if self._logarithmic else self.weights @ means)

    def shown(self, loss: Tensor) -> float:
        """A loss of :meth:`take_steps` as a distance between true activations; a cosine as it is."""
        return (math.exp(float(loss)) if self._logarithmic else float(loss)) / self.distance_scale

    def stale_gap(self, queries: Tensor, keys: Tensor, index: Tensor, rotation: Tensor) -> float:
        """How much farther than the true neighbors those of the index are, relative to the loss.

        Args:
            queries: [Q, d] one batch of this rank; keys: [K, d]; index: [S, Q].
        """
        floor = self._floor(queries, keys, index)
        stale = self.objective(queries, keys, index, rotation, floor).by_subspace
        stale = stale.exp() if self._logarithmic else stale
        fresh = self.mean_distance(self.search(queries, keys, rotation).distance, self._config.queries)
        return self.loss(stale) / max(self.loss(fresh), torch.finfo(torch.float32).tiny) - 1

    def take_steps(self, queries: Tensor, keys: Tensor, index: Tensor, turns: Sequence[Turn]) -> Tensor:
        """[m] losses of m steps, which is device work alone.

        Args:
            queries: [m Q, d] of this rank; keys: [K, d]; index: [S, m Q] rows of the keys that are near.
            turns: what the rotation's ``next_turn`` gave for each of them.
        """
        return (self._graph or self._take_each)(queries, keys, index, turns)

    def _take_each(self, queries: Tensor, keys: Tensor, index: Tensor, turns: Sequence[Turn]) -> Tensor:
        losses, first = [], slice(0, self.batch_size)
        floor = self._floor(queries[first], keys, index[:, first])
        for batch, turn in enumerate(turns):
            rows = slice(batch * self.batch_size, (batch + 1) * self.batch_size)
            objective = self.objective(queries[rows], keys, index[:, rows], self._rotation.working, floor)
            self._rotation.turn(clipped(objective.gradient, self._largest), turn)
            losses.append(self.weights @ objective.by_subspace)
        return torch.stack(losses)

    def _floor(self, queries: Tensor, keys: Tensor, index: Tensor) -> Tensor | None:
        """[S] where the logarithm stops to fall, from one batch; None where the loss is the distance."""
        if not self._logarithmic:
            return None
        return _FLOOR * self.objective(queries, keys, index, self._rotation.working).by_subspace


def clipped(gradient: Tensor, largest: float) -> Tensor:
    """The gradient, scaled down where its norm is above ``largest``; no host sync."""
    norm = torch.linalg.vector_norm(gradient)
    return gradient * (largest / norm.clamp_min(largest))
