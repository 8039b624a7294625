"""Adam on the Lie algebra."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ndm_fast.ops import backends, checks, library
from ndm_fast.ops.arrays import Array

_MODULES = {
    "reference": "ops.plain",
    "cpu": "ops.cpu.step",
    "triton": "kernels.lie_update",
    "cuda": "ops.cuda",
}


def lie_update(
    product: Array | None,
    first: Tensor,
    second: Tensor,
    scale: float | Tensor,
    guard: float | Tensor,
    betas: Sequence[float],
    *,
    half: bool = False,
    backend: str | None = None,
) -> Tensor:
    """[d, d] skew update of a rotation by Adam; formulas: ``geometry.reference.lie_update``.

    Args:
        product: [d, d] ``R'G``, fp32, fp16 or bf16; None leaves the moments as they are.
        first, second: [d, d] fp32, contiguous; moved on in place.
        scale, guard: two numbers, or two [] fp32 tensors on the device, whose values a CUDA graph reads at
            its replay.
        betas: decay of both moments, from 0 to below 1.
        half: bf16 instead of fp32 for the update.
        backend: see ``ndm_fast.ops.backends``.

    Raises:
        InputError (a ValueError): naming the argument, or a backend that cannot run.
    """
    product = checks.check_moments(product, first, second)
    checks.check_factors(scale, guard, first)
    fast, slow = checks.check_betas(betas)
    chosen = backends.choose(first.device, backend).name
    rest = ([fast, slow], bool(half), chosen)
    if isinstance(scale, Tensor):  # no library op takes either kind
        return _lie_update_on_device(product, first, second, scale, guard, *rest)
    return _lie_update(product, first, second, float(scale), float(guard), *rest)


def direct_update() -> library.Direct:
    """For a loop: :func:`lie_update` of tensors, all seven arguments by name."""

    def check(
        product: Tensor | None, first: Tensor, second: Tensor, scale: Any, guard: Any, betas: Any, half: bool
    ) -> str:
        checks.check_moments(product, first, second)
        checks.check_factors(scale, guard, first)
        checks.check_betas(betas)
        return backends.choose(first.device).name

    return library.Direct(_MODULES, "lie_update", check)


@library.op(_MODULES, mutates=("first", "second"))
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
    return torch.empty_like(first, dtype=torch.bfloat16 if half else torch.float32)


@library.op(_MODULES, function="lie_update", mutates=("first", "second"))
def _lie_update_on_device(
    product: Tensor | None,
    first: Tensor,
    second: Tensor,
    scale: Tensor,
    guard: Tensor,
    betas: list[float],
    half: bool,
    backend: str,
) -> Tensor:
    return torch.empty_like(first, dtype=torch.bfloat16 if half else torch.float32)
