"""Adam on the Lie algebra, as an op: choose a backend, run it as a ``torch.library`` op."""

from __future__ import annotations

import torch
from torch import Tensor

from ndm_fast.geometry import reference
from ndm_fast.ops import backends
from ndm_fast.ops.cpu import step


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
    """[d, d] skew update of a rotation by Adam; see ``geometry.reference.lie_update`` for the arguments.

    ``first`` and ``second``, [d, d] fp32 and contiguous, move on in place. ``scale`` and ``guard`` may be []
    tensors on the device, whose values a CUDA graph reads at its replay.
    """
    chosen = backends.choose(first.device, backend).name
    if isinstance(scale, Tensor) or isinstance(guard, Tensor):  # no library op takes either kind
        if backends.has_triton(chosen, first.device):
            return backends.load("kernels.lie_update").lie_update(
                product, first, second, (scale, guard), *betas, half
            )
        return reference.lie_update(product, first, second, scale, guard, betas, half)
    return _lie_update(product, first, second, scale, guard, list(betas), half, chosen)


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
    if backends.has_triton(backend, first.device):
        return backends.load("kernels.lie_update").lie_update(
            product, first, second, (scale, guard), fast, slow, half
        )
    module = step if backend == "cpu" else reference
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
