"""Several random starts, of which the best goes on: the plain way out of local minima."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from torch import Tensor
from tqdm import tqdm

from ndm_fast.activations.rows import TensorStream
from ndm_fast.config import MergeConfig, RunSettings, TrainConfig
from ndm_fast.geometry.orthogonal import random_rotation
from ndm_fast.partition import SubspacePartition
from ndm_fast.seeds import Draw, seeded
from ndm_fast.train.trainer import Trainer

_BATCH = 512


class Trained(NamedTuple):
    """A partition and its held-out loss."""

    partition: SubspacePartition
    loss: float


def train_on(
    start: SubspacePartition,
    activations: Tensor,
    train: TrainConfig,
    merge: MergeConfig | None = None,
    settings: RunSettings | None = None,
    *,
    batch: int = _BATCH,
) -> Trained:
    """Train on from a partition, by way of activations in its coordinates.

    Args:
        activations: [N, d]; used over and over if the steps need more.
        train: its start and widths do not count.
        batch: rows of a batch; held-out rows and each filling of the pool end inside one, whose rest is lost.
    """
    needed = train.heldout_queries + train.heldout_keys + train.pool_rows + train.max_steps * train.queries
    passes = 2 + 2 * needed // len(activations)  # what is left of a batch or of the text is not used
    train = dataclasses.replace(train, start="identity", initial_widths=start.widths)
    stream = TensorStream(start.rotate(activations).split(batch) * passes)
    trainer = Trainer(stream, train, merge, settings)
    found = trainer.run()
    rotation = start.rotation @ found.rotation
    return Trained(SubspacePartition(rotation, found.widths, start.source), trainer.heldout_loss)


def random_starts(
    activations: Tensor, train: TrainConfig, starts: int, settings: RunSettings | None = None
) -> list[Trained]:
    """As many trainings from random rotations, in the order of their numbers.

    All are held against the same held-out rows, so their losses compare.
    """
    widths = train.widths(activations.shape[1])
    found = []
    for number in tqdm(range(starts), "starts of NDM", disable=None, leave=False):
        rotation = random_rotation(sum(widths), seeded(train.seed, Draw.RESTART, number))
        start = SubspacePartition(rotation.to(activations.device), widths)
        found.append(train_on(start, activations, train, settings=settings))
    return found


def best(tried: list[Trained]) -> Trained:
    """The one of lowest held-out loss."""
    return min(tried, key=lambda one: one.loss)
