"""What the GPU backends share: keys and queries made ready for a sweep in fp16 and a search that decides.

All of it is torch, without a host synchronisation. ``kernels/sweep.py`` says why the numbers made here are
the ones a search needs; glossary as in ``ndm_fast.geometry.reference``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..geometry.centring import sample_mean
from ..geometry.precision import fp32_sums, full_fp32

FP16_MAX = 65504.0


_UNIT = 2.0**-24
"""Unit roundoff of fp32."""


_ROUNDING = {torch.float16: 1.01 * 2.0**-11, torch.bfloat16: 1.01 * 2.0**-8, torch.float32: 1.01 * 2.0**-11}
"""By type of the rotated keys: bound on what rounding, once to fp16 too, moves a point, over its norm."""


_UNDERFLOW = 2.0**-25
"""Half the least fp16 number: what underflow moves a coordinate."""


_SCALE_ROWS = 256


_BLOCK_ELEMENTS = 1 << 26


class KeyFrame(NamedTuple):
    """How keys become the numbers that are compared: ``(rotated - origin) * scale``."""

    raw_origin: Tensor | None
    """[d] fp32 subtracted before the rotation; None for cosine and for keys that came rotated."""
    origin: Tensor
    """[d] fp32 to subtract after it."""
    scales: Tensor
    """[S] fp32 powers of two that bring typical coordinates near 1."""
    typical_norm: Tensor
    """Scalar fp32: median norm, over all columns, of the centred keys."""


class KeyChunk(NamedTuple):
    """Some of the keys, ready to sweep."""

    first: int
    """Number of the first of them."""
    rows: Tensor
    """[n, d] what the sweep reads: rotated keys, or raw ones for the fused form."""
    raw: Tensor
    """[n, d] the keys as they were given."""
    origin: Tensor | None
    """[d] fp32 to subtract from the rotated rows; None where that is done."""
    scales: Tensor
    """[S] fp32 to multiply by then."""
    errors: Tensor
    """[S] fp32 bound on the error of the rotated rows in each subspace, after scaling."""


def key_frame(keys: Tensor, rotation: Tensor, widths: Sequence[int], cosine: bool, rotated: bool) -> KeyFrame:
    """Origin and scales from a sample of the keys; any are right, good ones make rounding errors small."""
    mean = torch.zeros(keys.shape[1], device=keys.device) if cosine else sample_mean(keys)
    mean = torch.where(mean.isfinite(), mean, 0)  # a bad row in the sample must not spoil all others
    some = keys[:: max(1, len(keys) // _SCALE_ROWS)].float() - mean
    typical = torch.linalg.vector_norm(some, dim=1).nanmedian()
    if rotated:
        origin, raw_origin = mean, None
    else:
        with full_fp32():
            some, origin = some @ rotation, mean @ rotation
        raw_origin = None if cosine else mean
    membership = _membership(tuple(widths), keys.device)
    size = some.abs().mean(0) @ membership / membership.sum(0)
    exponent = torch.where((size > 0) & size.isfinite(), -torch.log2(size).round(), 0.0)
    scales = torch.exp2(exponent.clamp(-100, 100))
    return KeyFrame(raw_origin, origin, scales, typical)


def rounded_keys(keys: Tensor, rotation: Tensor, frame: KeyFrame) -> Tensor:
    """[n, d] keys in half precision, rotated by a ``rotation`` in theirs, and centred.

    The origin comes off inside the product, before that is rounded. fp16 that overflows is Inf, which the
    sweep saturates.
    """
    with fp32_sums():
        if frame.raw_origin is None:
            return keys @ rotation
        return torch.addmm(-frame.origin.to(keys.dtype), keys, rotation)


def exact_keys(keys: Tensor, rotation: Tensor, frame: KeyFrame) -> tuple[Tensor, Tensor]:
    """[n, d] fp32 ``(keys - origin) @ rotation`` and the scalar largest norm of ``keys - origin``."""
    rotated = torch.empty(keys.shape, device=keys.device)
    largest = torch.zeros((), device=keys.device)
    size = max(1, _BLOCK_ELEMENTS // keys.shape[1])
    for start in range(0, len(keys), size):
        block = keys[start : start + size].float()
        if frame.raw_origin is not None:
            block = block - frame.raw_origin
        with full_fp32():
            torch.mm(block, rotation, out=rotated[start : start + size])
        largest = torch.maximum(largest, largest_norm(block))
    return rotated, largest


def largest_norm(rows: Tensor) -> Tensor:
    """Scalar: the largest norm of a row that is finite; 0 without one."""
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)
    return torch.where(norms.isfinite(), norms, 0).max()


def rotation_errors(frame: KeyFrame, norm: Tensor, unit: float = _UNIT) -> Tensor:
    """[S] bound, after scaling, on the error of rotating a row of this norm, products with roundoff ``unit``.

    Probabilistic: the d rounding errors have random signs and add to sqrt(d) of one (Higham & Mary 2019),
    times 2 for safety, as in ``ndm_fast.ops.cpu.search``.
    """
    return 2 * unit * math.sqrt(len(frame.origin) + 4) * norm * frame.scales


def underflow_errors(scales: Tensor, widths: Sequence[int]) -> Tensor:
    """[S] bound, after scaling, on what underflow in a stored fp16 copy does to a row."""
    return _UNDERFLOW * math.sqrt(max(widths)) * scales


def rounding_of(dtype: torch.dtype) -> float:
    """Bound on how far rounding moves a key stored as ``dtype`` on its way to fp16, over its norm."""
    return _ROUNDING[dtype]


def underflow_of(width: int) -> float:
    """Bound on how far underflow in fp16 moves a query and a key together."""
    return 2 * _UNDERFLOW * math.sqrt(width)


@lru_cache(maxsize=64)
def _membership(widths: tuple[int, ...], device: torch.device) -> Tensor:
    """[d, S] fp32: 1 where the column belongs to the subspace."""
    columns = [
        [float(owner == s) for s in range(len(widths))] for owner, p in enumerate(widths) for _ in range(p)
    ]
    return torch.tensor(columns, device=device)
