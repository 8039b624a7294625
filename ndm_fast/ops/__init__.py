"""The door to compiled code: every op checks its arguments, chooses a backend and runs there.

Shapes, names and what each op means: ``ndm_fast.geometry.reference``. Backends: ``ndm_fast.ops.backends``.
"""

from ndm_fast.ops.checks import check_search
from ndm_fast.ops.gradient import loss_and_gradient
from ndm_fast.ops.ksg import ksg_counts, ksg_radius, ksg_radius_and_counts
from ndm_fast.ops.lie_update import lie_update
from ndm_fast.ops.nearest import nearest_index, nearest_neighbors

__all__ = [
    "check_search",
    "ksg_counts",
    "ksg_radius",
    "ksg_radius_and_counts",
    "lie_update",
    "loss_and_gradient",
    "nearest_index",
    "nearest_neighbors",
]
