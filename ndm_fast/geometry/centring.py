"""Rotation of many rows about a common origin, block by block.

A common offset leaves euclidean distances alone; one near the mean makes the numbers small, and with them the
rounding errors (docs/method.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ndm_fast.geometry.precision import full_fp32

_ORIGIN_ROWS = 1024
"""Rows that the mean is taken of."""


_BLOCK_ELEMENTS = 1 << 21
"""Elements of a block of rows rotated at once: 8 MB. Blocks that fit in cache lose to BLAS's own barriers."""


def sample_mean(rows: Tensor) -> Tensor:
    """[d] fp32 mean of about a thousand of the rows: a good origin, cheap to find."""
    return rows[:: max(1, len(rows) // _ORIGIN_ROWS)].mean(0, dtype=torch.float32)


def inverse_variances(variances: Tensor) -> Tensor:
    """[S] finite fp32 factors of squared distances, 0 for a subspace without variance."""
    variances = variances.detach().double()
    return torch.where(variances > 0, 1 / variances, 0).clamp_max(torch.finfo(torch.float32).max).float()


@torch.no_grad()
def rotate_centred(
    rows: Tensor, rotation: Tensor, origin: Tensor | None = None, *, norms: Tensor | None = None
) -> Tensor:
    """[N, c] fp32 ``(rows - origin) @ rotation``; memory beyond the result: one block of rows.

    Args:
        rows: [N, d] fp32, fp16 or bf16.
        rotation: [d, c] fp32, all of a rotation's columns or some.
        origin: [d] fp32, or None for 0.
        norms: [N] fp32, filled with the norms of the centred rows.
    """
    out = torch.empty(len(rows), rotation.shape[1], device=rows.device)
    size = min(len(rows), max(512, _BLOCK_ELEMENTS // rows.shape[1]))
    buffer = torch.empty(size, rows.shape[1], device=rows.device)
    for start in range(0, len(rows), max(1, size)):
        part = rows[start : start + size]
        block = buffer[: len(part)]
        if origin is None:
            block.copy_(part)
        else:
            torch.sub(part, origin, out=block)
        with full_fp32():
            torch.mm(block, rotation, out=out[start : start + size])
        if norms is not None:
            torch.linalg.vector_norm(block, dim=1, out=norms[start : start + size])
    return out
