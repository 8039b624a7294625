"""Compiled products in fp32: the library that torch takes may leave half of the processor idle."""

from __future__ import annotations

import torch
from torch import Tensor

from ndm_fast.geometry import centring
from ndm_fast.geometry.columns import unit_columns
from ndm_fast.ops.cpu.extension import available, extension, isa, rows_of

_LEAST = 1 << 20
"""Products of two numbers in a matrix product, from which the call is worth it."""

_NO_ROWS = (0, 0, 0)


def pays(rows: int, depth: int, columns: int) -> bool:
    """Whether these are faster than torch's: MKL keeps to AVX2 where a processor with AVX-512 is AMD's."""
    if rows * depth * columns < _LEAST or not available() or not isa().startswith("avx512"):
        return False
    return bool(extension().is_amd())


def rotate_centred(
    rows: Tensor, rotation: Tensor, origin: Tensor | None = None, *, norms: Tensor | None = None
) -> Tensor:
    """As ``geometry.centring.rotate_centred``, by :func:`product` where that is faster."""
    if not pays(len(rows), *rotation.shape):
        return centring.rotate_centred(rows, rotation, origin, norms=norms)
    return product(rows, rotation, origin=origin, norms=norms)


def product(
    left: Tensor,
    right: Tensor,
    *,
    transposed: bool = False,
    origin: Tensor | None = None,
    scale: float = 1.0,
    base: Tensor | None = None,
    factor: float = 1.0,
    norms: Tensor | None = None,
) -> Tensor:
    """[N, c] fp32 ``factor * base + scale * (left - origin) @ right``, on the CPU.

    The bits of a row depend on nothing but that row, and not on the number of threads.

    Args:
        left: [N, d] fp32, fp16 or bf16; with ``transposed`` [d, N] fp32, then without origin and norms.
        right: [d, c] fp32.
        origin: [d] fp32, or None for 0.
        base: [N, c] fp32, or None for 0.
        norms: [N] fp32, filled with the norms of ``left - origin``.
    """
    left, right = unit_columns(left), unit_columns(right)
    base = None if base is None else unit_columns(base)
    origin = None if origin is None else origin.detach().contiguous()
    depth, count = left.shape if transposed else (left.shape[1], left.shape[0])
    out = torch.empty(count, right.shape[1])
    extension().product(
        *(isa(), torch.get_num_threads(), count, depth, right.shape[1], rows_of(left), transposed),
        *(0 if origin is None else origin.data_ptr(), scale, rows_of(right)),
        *(_NO_ROWS if base is None else rows_of(base), factor, rows_of(out)),
        0 if norms is None else norms.data_ptr(),
    )
    return out
