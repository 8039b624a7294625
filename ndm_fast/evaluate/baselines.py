"""Partitions that nothing was learnt for, to compare with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ndm_fast.errors import InputError
from ndm_fast.geometry.orthogonal import principal_components, random_rotation
from ndm_fast.partition import SubspacePartition
from ndm_fast.seeds import Draw, seeded

BASELINES = ("identity", "random", "pca", "pca_ascending", "pca_descending")
"""Names that are accepted; ``"pca"`` is short for ``"pca_descending"``."""

STANDARD_BASELINES = ("identity", "random", "pca_ascending", "pca_descending")
"""The paper's four."""


def baseline_partition(
    kind: str, widths: Sequence[int], activations: Tensor, seed: int = 0
) -> SubspacePartition:
    """A partition with the same widths whose rotation was not trained.

    Args:
        kind: ``"identity"`` (the model's own coordinates), ``"random"`` (uniform on SO(d)), or principal
            components: ``"pca_descending"`` gives the directions of most variance to the first subspace,
            ``"pca_ascending"`` to the last.
        activations: [N, d], for principal components.

    Raises:
        InputError: unknown kind.
    """
    check_baselines([kind])
    if kind == "identity":
        rotation = torch.eye(sum(widths))
    elif kind == "random":
        rotation = random_rotation(sum(widths), seeded(seed, Draw.BASELINE))
    else:
        rotation = principal_components(activations)
        if kind == "pca_ascending":
            rotation = rotation.flip(1)
    return SubspacePartition(rotation.to(activations.device), widths, {"baseline": kind})


def check_baselines(kinds: Sequence[str]) -> None:
    """Refuse names that are no baseline."""
    unknown = [kind for kind in kinds if kind not in BASELINES]
    if unknown:
        raise InputError(f"unknown baseline {unknown[0]!r}: take one of {', '.join(BASELINES)}")
