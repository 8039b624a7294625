"""Public ops of an optimiser step: the neighbours, the loss with its gradient, and Adam on the Lie algebra.

Beside ``ndm_fast.ops``, whose backends they share: ``cpu`` has them in C++, ``triton`` and ``cuda`` as Triton
kernels; the gradient of the cosine is torch code everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ndm_fast import backends, cpu_step, objective, ops, reference, triton_ops, triton_update
from ndm_fast.centring import rotate_centred, sample_mean
from ndm_fast.objective import Objective


def nearest_index(
    queries: Tensor,
    keys: Tensor,
    rotation: Tensor,
    widths: Sequence[int],
    metric: str = "euclidean",
    precision: str = "fp32",
    *,
    backend: str | None = None,
) -> Tensor:
    """[S, Q] int64 rows of the keys that are nearest: ``ndm_fast.ops.nearest_neighbors`` without distances.

    A step has no use for exact distances, which take longer than the search on a CPU, and up to a fifth of it
    on a GPU. Arguments, errors and tolerances as there, up to the rounding of the rotation; nothing looks for
    NaN and Inf.
    """
    ops.check_search(queries, keys, rotation, widths, metric, precision, False)
    chosen = backends.choose(queries.device, backend).name
    return _nearest_index(queries, keys, rotation, list(widths), metric, precision, chosen)


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
    """Loss and gradient for given neighbours, as ``ndm_fast.objective.loss_and_gradient`` has them.

    Args:
        queries: [Q, d] and keys: [K, d], fp32, fp16 or bf16.
        index: [S, Q] int64, the row of ``keys`` that is nearest.
        rotation: [d, d] fp32.
        widths: widths of the S subspaces; they sum to d.
        metric: ``"euclidean"`` or ``"cosine"``.
        counted: [S, Q] bool, the neighbours that contribute to the means over Q; default all.
        backend: see ``ndm_fast.backends``.

    Returns:
        ``Objective(by_subspace [S], gradient [d, d])``, fp32.

    Raises:
        InputError (a ValueError): the backend cannot run. ValueError: an argument of a wrong shape or dtype.
    """
    chosen = backends.choose(queries.device, backend).name
    return Objective(
        *_loss_and_gradient(queries, keys, index, rotation, list(widths), metric, counted, chosen)
    )


def lie_update(
    product: Tensor | None,
    first: Tensor,
    second: Tensor,
    scale: float | Tensor,
    guard: float | Tensor,
    betas: tuple[float, float],
    *,
    half: bool = False,
    backend: str | None = None,
) -> Tensor:
    """[d, d] skew update of a rotation by Adam; see ``ndm_fast.reference.lie_update`` for the arguments.

    ``first`` and ``second``, [d, d] fp32 and contiguous, move on in place. ``scale`` and ``guard`` may be []
    tensors on the device, whose values a CUDA graph reads at its replay.
    """
    chosen = backends.choose(first.device, backend).name
    if isinstance(scale, Tensor) or isinstance(guard, Tensor):  # no library op takes either kind
        if _has_triton(chosen, first.device):
            return triton_update.lie_update(product, first, second, (scale, guard), *betas, half)
        return reference.lie_update(product, first, second, scale, guard, betas, half)
    return _lie_update(product, first, second, scale, guard, list(betas), half, chosen)


@torch.library.custom_op("ndm_fast::nearest_index", mutates_args=())
def _nearest_index(
    queries: Tensor,
    keys: Tensor,
    rotation: Tensor,
    widths: list[int],
    metric: str,
    precision: str,
    backend: str,
) -> Tensor:
    options: dict[str, Any] = {"precision": precision, "backend": backend, "check_finite": False}
    if backend == "triton" and precision == "bf16":
        return triton_ops.nearest_index(queries, keys, rotation, widths, metric=metric)
    if backend in ("cpu", "reference") and metric == "euclidean":
        origin = sample_mean(keys)
        queries, keys = (rotate_centred(rows, rotation, origin) for rows in (queries, keys))
        options |= {"keys_rotated": True, "queries_rotated": True}
    return ops.nearest_neighbors(queries, keys, rotation, widths, metric=metric, **options).index


@_nearest_index.register_fake
def _(
    queries: Tensor,
    keys: Tensor,
    rotation: Tensor,
    widths: list[int],
    metric: str,
    precision: str,
    backend: str,
) -> Tensor:
    return queries.new_empty((len(widths), len(queries)), dtype=torch.int64)


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
        return cpu_step.mean_distance_gradient(queries, keys, index, rotation, widths, counted)
    if _has_triton(backend, queries.device):
        return triton_update.loss_and_gradient(queries, keys, index, rotation, widths, metric, counted)
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


@torch.library.custom_op("ndm_fast::lie_update", mutates_args=("first", "second"))
def _lie_update(
    product: Tensor | None,
    first: Tensor,
    second: Tensor,
    scale: float,
    guard: float,
    betas: list[float],
    half: bool,
    backend: str,
) -> Tensor:
    fast, slow = betas
    if _has_triton(backend, first.device):
        return triton_update.lie_update(product, first, second, (scale, guard), fast, slow, half)
    module = cpu_step if backend == "cpu" else reference
    return module.lie_update(product, first, second, scale, guard, (fast, slow), half)


@_lie_update.register_fake
def _(
    product: Tensor | None,
    first: Tensor,
    second: Tensor,
    scale: float,
    guard: float,
    betas: list[float],
    half: bool,
    backend: str,
) -> Tensor:
    return torch.empty_like(first, dtype=torch.bfloat16 if half else torch.float32)


def _has_triton(backend: str, device: torch.device) -> bool:
    """Whether the step runs on Triton's kernels; the CUDA C++ extension holds the search alone."""
    return backend in ("triton", "cuda") and triton_ops.why_unavailable(device) is None
