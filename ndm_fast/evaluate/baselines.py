"""Partitions that nothing was learnt for, to compare with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ndm_fast.errors import InputError
from ndm_fast.partition import SubspacePartition
from ndm_fast.pool import seeded
from ndm_fast.rotation import principal_components, random_rotation

BASELINES = ("identity", "random", "pca")


def baseline_partition(
    kind: str, widths: Sequence[int], activations: Tensor, seed: int = 0
) -> SubspacePartition:
    """A partition with the same widths whose rotation was not trained.

    Args:
        kind: ``"identity"`` (the model's own coordinates), ``"random"`` (uniform on SO(d)), or ``"pca"``
            (principal components, variance descending).
        activations: [N, d], for ``"pca"``.
    """
    width = sum(widths)
    if kind == "identity":
        rotation = torch.eye(width)
    elif kind == "random":
        rotation = random_rotation(width, seeded(seed, 4))
    elif kind == "pca":
        rotation = principal_components(activations)
    else:
        raise InputError(f"unknown baseline {kind!r}: take one of {', '.join(BASELINES)}")
    return SubspacePartition(rotation, widths, {"baseline": kind})
