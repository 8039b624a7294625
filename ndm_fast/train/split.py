"""NDM from the top: begin with one space, split it where two parts share little, and go on in the parts."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ndm_fast.config import MergeConfig, TrainConfig
from ndm_fast.errors import InputError
from ndm_fast.geometry.orthogonal import random_rotation
from ndm_fast.partition import SubspacePartition
from ndm_fast.seeds import seeded
from ndm_fast.train.merge.mutual_information import mutual_information
from ndm_fast.train.restarts import train_on
from ndm_fast.train.trainer import Observer

_FRACTIONS = (0.5, 0.25)
"""Shares of a space that are tried as the smaller part, beside one unit."""

_MORE_STARTS, _RANDOM = 2, 16
"""Random starts beside the space's own coordinates; what the random numbers are for."""


def split_space(
    activations: Tensor, train: TrainConfig, merge: MergeConfig, observer: Observer | None = None
) -> SubspacePartition:
    """A partition found by splitting the whole space, widths descending.

    For a space of width p some splits into two parts are tried, from three rotations each, trained for
    ``split_steps``, and the parts' mutual information over p is estimated. The split of the least is
    kept where it lies below ``merge_threshold``, and both parts are split in turn; parts of ``unit_size`` or
    less stay whole.

    Args:
        activations: [N, d], those that training and held-out rows are taken from.
        observer: gets a ``"split"`` event for every space that was looked at.

    Raises:
        InputError: a threshold that is no number.
    """
    if isinstance(merge.merge_threshold, str):
        raise InputError(
            "mode split needs a number as merge_threshold: information from which parts stay whole"
        )
    observer = observer or Observer()
    width = activations.shape[1]
    waiting, whole = [torch.eye(width, device=activations.device)], []
    while waiting:
        basis = waiting.pop(0)
        tried = [
            _try_split(activations @ basis, smaller, train, merge, start)
            for smaller in _candidates(basis.shape[1], train.unit_size)
            for start in _starts(basis.shape[1], train.seed)
        ]
        least = min((score for _, score in tried), default=float("inf"))
        accepted = least < merge.merge_threshold
        record = {"event": "split", "width": basis.shape[1], "accepted": accepted}
        observer.event({**record, "tried": [{"widths": list(p.widths), "score": s} for p, s in tried]})
        if not accepted:
            whole.append(basis)
            continue
        best = next(found for found, score in tried if score == least)
        waiting += [basis @ best.basis(part) for part in range(2)]
    whole.sort(key=lambda part: -part.shape[1])
    # Products of many rotations in fp32 drift a little from orthogonal.
    u, _, v = torch.linalg.svd(torch.cat(whole, 1).double())
    return SubspacePartition(u @ v, [part.shape[1] for part in whole])


def _candidates(width: int, unit: int) -> list[int]:
    """Widths of the smaller part, multiples of the unit."""
    if width <= unit:
        return []
    sizes = {max(unit, round(width * share / unit) * unit) for share in _FRACTIONS} | {unit}
    return sorted({min(size, width - size) for size in sizes if size < width})


def _starts(width: int, seed: int) -> list[Tensor]:
    """[p, p] rotations to start from: one alone is often a local minimum away from the best split."""
    return [
        torch.eye(width),
        *(random_rotation(width, seeded(seed, _RANDOM, n)) for n in range(_MORE_STARTS)),
    ]


def _try_split(
    rows: Tensor, smaller: int, train: TrainConfig, merge: MergeConfig, rotation: Tensor
) -> tuple[SubspacePartition, float]:
    """A trained split of [N, p] rows, and what its parts share, nats per dimension."""
    width = rows.shape[1]
    steps = train.split_steps
    settings = dataclasses.replace(
        train, max_steps=steps, eval_every=steps, checkpoint_every=steps, escape_tries=0
    )
    start = SubspacePartition(rotation.to(rows.device), (width - smaller, smaller))
    found = train_on(start, rows, settings).partition
    queries, keys = rows[: merge.mi_queries], rows[merge.mi_queries :][: merge.mi_keys]
    shared = mutual_information(queries, keys, found.rotation, found.widths)
    return found, float(shared[0, 1]) / width
