"""Matrix products in fp32 for what is not differentiated: of rows with a rotation, and of rotations."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from ndm_fast.geometry import centring
from ndm_fast.geometry.precision import full_fp32
from ndm_fast.ops import backends
from ndm_fast.ops.cpu import product as compiled


@torch.no_grad()
def rotate_centred(
    rows: Tensor, rotation: Tensor, origin: Tensor | None = None, *, norms: Tensor | None = None
) -> Tensor:
    """As ``geometry.centring.rotate_centred``, by the compiled product where that is faster."""
    run = compiled if _on_cpu(rows) else centring
    return run.rotate_centred(rows, rotation, origin, norms=norms)


@torch.no_grad()
def product(
    left: Tensor,
    right: Tensor,
    *,
    transposed: bool = False,
    scale: float = 1.0,
    base: Tensor | None = None,
    factor: float = 1.0,
    exact: bool = True,
) -> Tensor:
    """[N, c] fp32 ``factor * base + scale * left @ right``.

    Args:
        left: [N, d] fp32, or ``transposed`` [d, N].
        right: [d, c] fp32.
        base: [N, c] fp32, or None for 0.
        exact: in fp32 proper, even where the program lets torch round factors (tf32, bf16).
    """
    rows = left.T if transposed else left
    if _on_cpu(left) and compiled.pays(len(rows), *right.shape):
        return compiled.product(left, right, transposed=transposed, scale=scale, base=base, factor=factor)
    with full_fp32() if exact else contextlib.nullcontext():
        if base is not None:
            return torch.addmm(base, rows, right, beta=factor, alpha=scale)
        found = rows @ right
        return found if scale == 1 else found.mul_(scale)


def _on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and backends.choose(tensor.device).name == "cpu"
