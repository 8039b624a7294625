"""Optimisers on SO(d): the rotation moves by Adam, and stays orthogonal."""

from __future__ import annotations

from torch import Tensor

from ndm_fast.train.rotation.base import Rotation
from ndm_fast.train.rotation.exp import ExpRotation
from ndm_fast.train.rotation.lie import LieRotation


def make_rotation(kind: str, start: Tensor, betas: tuple[float, float]) -> Rotation:
    """The optimiser by name, ``"lie"``, ``"lazy"`` or ``"exp"``, starting from an orthogonal matrix."""
    from ndm_fast.train.rotation.lazy import LazyRotation  # it builds on this module

    kinds: dict[str, type[Rotation]] = {"lie": LieRotation, "lazy": LazyRotation, "exp": ExpRotation}
    return kinds[kind](start, betas)
