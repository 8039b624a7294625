"""Nearest neighbors inside subspaces, and what training on them needs, in Triton.

Arguments are not checked.
"""

from .geometry.reference import Neighbors
from .kernels.gradient import loss_and_gradient
from .kernels.ksg import ksg_counts, ksg_radius
from .kernels.lie_update import lie_update
from .kernels.search import nearest_index, nearest_neighbors

__all__ = [
    "Neighbors",
    "ksg_counts",
    "ksg_radius",
    "lie_update",
    "loss_and_gradient",
    "nearest_index",
    "nearest_neighbors",
]
