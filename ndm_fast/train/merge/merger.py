"""Merging: which subspaces share so much information that they become one."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ndm_fast.activations.pool import ActivationPool
from ndm_fast.config import MergeConfig, TrainConfig
from ndm_fast.partition import SubspacePartition
from ndm_fast.ranks import Group
from ndm_fast.seeds import Draw, seeded
from ndm_fast.train.merge.mutual_information import mutual_information
from ndm_fast.train.merge.pairs import choose_pairs, merge_scores
from ndm_fast.train.merge.tree import merge_tree
from ndm_fast.train.observer import Observer


class Merger:
    """Measures what subspaces share, decides which merge, and merges them (docs/method.md).

    Args:
        config: threshold, and size of the estimate.
        train: seed of the shuffled samples that ``merge_threshold="auto"`` compares with; number of keys.
        queries: [Q, d] held-out rows, as the pool stores them.
        pool: its current window gives the keys.
        group: the ranks that estimate together.
    """

    def __init__(
        self, config: MergeConfig, train: TrainConfig, queries: Tensor, pool: ActivationPool, group: Group
    ) -> None:
        threshold = config.merge_threshold
        self.threshold = None if isinstance(threshold, str) else threshold
        """Scores above it merge; None until ``"auto"`` has found it."""
        self._target, self._seed = config.target_subspaces, train.seed
        self._queries, self._keys = queries[: config.mi_queries], min(config.mi_keys, train.keys)
        self._pool, self._group = pool, group

    def information(self, rotation: Tensor, widths: Sequence[int]) -> Tensor:
        """[S, S] mutual information between subspaces; decisions hang on it, so all ranks have rank 0's."""
        found = mutual_information(self._queries, self._local_keys(), rotation, widths, group=self._group)
        return self._group.all.of_first(found)

    def merge(
        self, partition: SubspacePartition, information: Tensor, step: int, observer: Observer
    ) -> SubspacePartition | None:
        """The partition with the pairs merged that share much information; None where no pair does."""
        if self.threshold is None:
            self.threshold = self._auto_threshold(partition, step, observer)
        scores = merge_scores(information, partition.widths)
        pairs = choose_pairs(scores, self.threshold, target_subspaces=self._target)
        merged = partition.merge(pairs) if pairs else None
        observer.event(
            {
                "event": "merge",
                "step": step,
                "mutual_information": information.tolist(),
                "pairs": pairs,
                "threshold": _finite(self.threshold),
                "widths_before": list(partition.widths),
                "widths": list((merged or partition).widths),
            }
        )
        return merged

    def _auto_threshold(self, partition: SubspacePartition, step: int, observer: Observer) -> float:
        """Found once, at the first check: after merging, what is left would show a widest gap again."""
        keys = self._group.keys.gather(self._local_keys(), 0, self._keys)  # shuffled as a whole
        generator = seeded(self._seed, Draw.MERGE_NULL)
        tree = merge_tree(self._queries, keys, partition.rotation, partition.widths, generator)
        observer.event(
            {
                "event": "merge_tree",
                "step": step,
                "heights": tree.heights,
                "noise": tree.noise,
                "threshold": _finite(tree.threshold),
            }
        )
        return tree.threshold

    def _local_keys(self) -> Tensor:
        return self._pool.peek_keys()[self._group.keys.local(0, self._keys)]


def _finite(number: float) -> float | None:
    """For JSON, which knows no infinity."""
    return number if math.isfinite(number) else None
