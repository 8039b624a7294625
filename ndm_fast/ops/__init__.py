"""The door to compiled code: every op checks its arguments, chooses a backend and runs there.

Shapes, names and what each op means: ``ndm_fast.geometry.reference``. Backends: ``ndm_fast.ops.backends``.
Checks: ``ndm_fast.ops.checks``; they are the same, with the same message, on every backend. The ops under
``torch.ops.ndm_fast``, by which torch traces them, check no shapes: call the functions of this package.

Forking a process that has used an op with two or more threads hangs in the child at its next op, as it does
with torch's own CPU ops: the child has no threads but believes it has. Start workers by ``spawn`` or
``forkserver``, or fork before the first op, or call ``torch.set_num_threads(1)`` before it.
"""

from ndm_fast.ops.gradient import loss_and_gradient
from ndm_fast.ops.k_nearest import k_nearest_neighbors
from ndm_fast.ops.ksg import ksg_counts, ksg_radius, ksg_radius_and_counts
from ndm_fast.ops.lie_update import lie_update
from ndm_fast.ops.nearest import nearest_index, nearest_neighbors

__all__ = [
    "k_nearest_neighbors",
    "ksg_counts",
    "ksg_radius",
    "ksg_radius_and_counts",
    "lie_update",
    "loss_and_gradient",
    "nearest_index",
    "nearest_neighbors",
]
