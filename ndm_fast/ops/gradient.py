"""Loss and gradient for given neighbors: choose a backend, run it as a ``torch.library`` op.

``cpu`` has it in C++, ``triton`` and ``cuda`` as Triton kernels; the cosine's is torch code everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ndm_fast.geometry import objective
from ndm_fast.geometry.objective import Objective
from ndm_fast.ops import backends
from ndm_fast.ops.cpu import step


def loss_and_gradient(
    queries: Tensor,
    keys: Tensor,
    index: Tensor,
    rotation: Tensor,
    widths: Sequence[int],
    metric: str = "euclidean",
    counted: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Objective:
    """Loss and gradient for given neighbors, as ``ndm_fast.geometry.objective.loss_and_gradient`` has them.

    Args:
        queries: [Q, d] and keys: [K, d], fp32, fp16 or bf16.
        index: [S, Q] int64, the row of ``keys`` that is nearest.
        rotation: [d, d] fp32.
        widths: widths of the S subspaces; they sum to d.
        metric: ``"euclidean"`` or ``"cosine"``.
        counted: [S, Q] bool, the neighbors that contribute to the means over Q; default all.
        backend: see ``ndm_fast.ops.backends``.

    Returns:
        ``Objective(by_subspace [S], gradient [d, d])``, fp32.

    Raises:
        InputError (a ValueError): the backend cannot run. ValueError: an argument of a wrong shape or dtype.
    """
    chosen = backends.choose(queries.device, backend).name
    return Objective(
        *_loss_and_gradient(queries, keys, index, rotation, list(widths), metric, counted, chosen)
    )


@torch.library.custom_op("ndm_fast::loss_and_gradient", mutates_args=())
def _loss_and_gradient(
    queries: Tensor,
    keys: Tensor,
    index: Tensor,
    rotation: Tensor,
    widths: list[int],
    metric: str,
    counted: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if backend == "cpu" and metric == "euclidean":
        return step.mean_distance_gradient(queries, keys, index, rotation, widths, counted)
    if backends.has_triton(backend, queries.device):
        triton = backends.load("kernels.gradient")
        return triton.loss_and_gradient(queries, keys, index, rotation, widths, metric, counted)
    return objective.loss_and_gradient(queries, keys, index, rotation, widths, metric, counted)


@_loss_and_gradient.register_fake
def _(
    queries: Tensor,
    keys: Tensor,
    index: Tensor,
    rotation: Tensor,
    widths: list[int],
    metric: str,
    counted: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return rotation.new_empty(len(widths)), torch.empty_like(rotation)
