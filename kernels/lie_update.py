"""Adam on the Lie algebra in one pass (docs/method.md): the elementwise part of a step on SO(d).

With ``P = R'G``, of which the tangent ``A = P - P'`` is skew:

    first <- first + (1 - fast) (A - first)        second <- slow second + (1 - slow) A^2
    update = -scale first / (sqrt(second) + guard)

First moment and update are skew, the second moment is symmetric. So a block takes a tile and its mirror: it
reads both tiles of P, the upper one of the moments, and writes the upper result and its (negative) transpose.
That makes skewness exact, bit for bit, and saves a quarter of the bytes.

Limit: memory. 20 bytes an entry (18 with the update in bf16): 12, 47 and 106 MB for GPT-2, Qwen and Gemma, at
the 4.3 TB/s that copies reach on an H200 2.7, 11 and 25 us. The first two fit its L2 cache (60 MB) and may
beat that. The passes of torch that it replaces move four times as much.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import device_of


# A CUDA graph reads its steps' factors from the rows of one tensor, aligned by turns: one kernel for all.
@triton.jit(do_not_specialize_on_alignment=["scale", "guard"])
def lie_update_kernel(
    product,  # [d, d] fp32 or bf16, TAKE only
    first,  # [d, d] fp32 skew
    second,  # [d, d] fp32 symmetric
    update,  # [d, d] fp32 or bf16
    scale,  # a number, or (ON_DEVICE) [1] fp32
    guard,
    width,
    toward,  # 1 - fast
    slow,
    fresh,  # 1 - slow
    BLOCK: tl.constexpr,
    TAKE: tl.constexpr,
    ON_DEVICE: tl.constexpr,
):
    """Grid (tiles, tiles), of which those on and above the diagonal work. Moments move where TAKE."""
    i, j = tl.program_id(0), tl.program_id(1)
    if i <= j:
        rows, columns = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
        at = rows[:, None] * width + columns[None, :]
        mirror = columns[:, None] * width + rows[None, :]
        mask = (rows < width)[:, None] & (columns < width)[None, :]
        opposite = (columns < width)[:, None] & (rows < width)[None, :]
        # On the diagonal the tile is its own mirror, and is written once.
        beyond = (columns < tl.where(i < j, width, 0))[:, None] & (rows < width)[None, :]
        moment = tl.load(first + at, mask=mask, other=0.0)
        square = tl.load(second + at, mask=mask, other=0.0)
        if TAKE:
            tangent = tl.load(product + at, mask=mask, other=0.0).to(tl.float32)
            tangent -= tl.trans(tl.load(product + mirror, mask=opposite, other=0.0).to(tl.float32))
            moment += toward * (tangent - moment)
            square = slow * square + fresh * (tangent * tangent)
            tl.store(first + at, moment, mask=mask)
            tl.store(first + mirror, -tl.trans(moment), mask=beyond)
            tl.store(second + at, square, mask=mask)
            tl.store(second + mirror, tl.trans(square), mask=beyond)
        factor = tl.load(scale) if ON_DEVICE else scale
        least = tl.load(guard) if ON_DEVICE else guard
        step = tl.div_rn(-factor * moment, tl.sqrt_rn(square) + least)
        # Negated before it is rounded: Triton's interpreter negates the bits of bf16.
        tl.store(update + at, step.to(update.dtype.element_ty), mask=mask)
        tl.store(update + mirror, (-tl.trans(step)).to(update.dtype.element_ty), mask=beyond)


def lie_update(
    product: Tensor | None,
    first: Tensor,
    second: Tensor,
    scale: float | Tensor,
    guard: float | Tensor,
    betas: Sequence[float],
    half: bool = False,
) -> Tensor:
    """Adam on the Lie algebra: moments moved on in place, and the update they ask for (docs/method.md).

    With ``A = product - product'``: ``first <- first + (1 - fast)(A - first)``,
    ``second <- slow second + (1 - slow) A^2``, and the update is ``-scale first / (sqrt(second) + guard)``.
    Of the moments only the upper triangles are read; the lower ones follow, so that skewness is exact.

    Args:
        product: [d, d] fp32 or bf16 ``R'G``; None leaves the moments as they are.
        first, second: [d, d] fp32 contiguous moments, skew and symmetric; changed in place.
        scale, guard: two numbers, or two tensors of one fp32 element on the device: then a CUDA graph takes
            what they hold at its replay.
        betas: decay of the first and of the second moment.
        half: bf16 instead of fp32 for the update.

    Returns:
        [d, d] skew update.
    """
    from . import tuning

    fast, slow = betas
    width = len(first)
    update = torch.empty_like(first, dtype=torch.bfloat16 if half else torch.float32)
    tiles = -(-width // tuning.LIE_BLOCK)
    options = {"TAKE": product is not None, "ON_DEVICE": isinstance(scale, Tensor)}
    with device_of(first):
        lie_update_kernel[(tiles, tiles)](
            first if product is None else product.contiguous(),
            *(first, second, update, scale, guard, width, 1 - fast, slow, 1 - slow),
            **{"BLOCK": tuning.LIE_BLOCK, "num_warps": 4, **options, **tuning.OPTIONS},
        )
    return update
