"""Triton kernels of a training step beside the search: loss with gradient, and Adam on the Lie algebra.

Neither reads anything back from the device, and both give the same bits at every run. triton is imported at
the first call, never with the package.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ndm_fast import gpu_frame, gpu_search, objective
from ndm_fast.errors import InputError
from ndm_fast.objective import Objective

if TYPE_CHECKING:
    from ndm_fast.kernels.tuning import Gradient


def loss_and_gradient(
    queries: Tensor,
    keys: Tensor,
    index: Tensor,
    rotation: Tensor,
    widths: Sequence[int],
    metric: str,
    counted: Tensor | None = None,
    *,
    products: str = "ieee",
    shape: Gradient | None = None,
) -> Objective:
    """Loss and gradient for given neighbours, as :func:`ndm_fast.objective.loss_and_gradient` has them.

    Euclidean only: the cosine is left to that function's torch code. The first call for new widths copies a
    small table to the device; make it before a CUDA graph is captured.

    Args:
        queries: [Q, d]; keys: [K, d]; each fp32, fp16 or bf16.
        index: [S, Q] int64, the row of ``keys`` that is nearest; not checked.
        rotation: [d, d] fp32; it may be off from orthogonal.
        widths: S widths that sum to d.
        counted: [S, Q] bool, the neighbours that contribute; default all. Others are not read.
        products: ``"ieee"`` for fp32 products, ``"tf32x3"`` for products on the matrix units of numbers split
            into two tf32 each, good to 2^-21.
        shape: of the kernels' tiles; default by ``kernels/tuning.py``.

    Returns:
        ``Objective(by_subspace [S] fp32, gradient [d, d] fp32)``. Without any distance, no gradient; a
        coordinate that is NaN makes its row of the gradient NaN.
    """
    if metric == "cosine":
        return objective.loss_and_gradient(queries, keys, index, rotation, widths, metric, counted)
    from ndm_fast.kernels import gradient, tuning

    queries, keys, rotation = (gpu_search.unit_columns(rows) for rows in (queries, keys, rotation))
    (count, width), subspaces = queries.shape, len(widths)
    shape = shape or tuning.gradient_shape(widths, count)
    pieces = _pieces(tuple(widths), shape.columns, queries.device)
    projected = torch.empty(count, width, device=queries.device)
    squares = torch.empty(len(pieces.table), count, device=queries.device)
    losses = torch.empty(subspaces, device=queries.device)
    result = torch.empty(width, width, device=queries.device)
    mask = index if counted is None else counted
    rows = (queries, queries.stride(0), count, keys, keys.stride(0))
    neighbours = (index, *index.stride(), mask, *mask.stride(), pieces.table)
    options = {"COLUMNS": shape.columns, "COUNTED": counted is not None, "DOT": products}
    options |= {"num_warps": shape.warps, "num_stages": 2, **tuning.OPTIONS}
    project = {"QUERY_BLOCK": shape.project_queries, "DEPTH_BLOCK": shape.depth, **options}
    total = {"PARTS": pieces.parts, "ROWS": shape.rows, "QUERY_BLOCK": shape.sum_queries, **options}
    with gpu_frame.device_of(queries):
        gradient.project_kernel[(-(-count // shape.project_queries), len(pieces.table))](
            *rows, *neighbours, rotation, rotation.stride(0), width, projected, squares, **project
        )
        gradient.gradient_kernel[(-(-width // shape.rows), len(pieces.table))](
            *(*rows, *neighbours, projected, squares, width, losses, result),
            *(1 / count, 1 / (subspaces * count)),
            **total,
        )
    return Objective(losses, result)


def lie_update(
    product: Tensor | None,
    first: Tensor,
    second: Tensor,
    factors: Tensor | tuple[float | Tensor, float | Tensor],
    fast: float,
    slow: float,
    half: bool = False,
) -> Tensor:
    """Adam on the Lie algebra: moments moved on in place, and the update they ask for (design section 5).

    With ``A = product - product'``: ``first <- first + (1 - fast)(A - first)``,
    ``second <- slow second + (1 - slow) A^2``, and the update is ``-scale first / (sqrt(second) + guard)``.
    Of the moments only the upper triangles are read; the lower ones follow, so that skewness is exact.

    Args:
        product: [d, d] fp32 or bf16 ``R'G``; None leaves the moments as they are.
        first, second: [d, d] fp32 contiguous moments, skew and symmetric; changed in place.
        factors: scale and guard; two numbers, or fp32 on the device, [2] or two of one element each: then a
            CUDA graph takes what they hold at its replay.
        fast, slow: decay of the first and of the second moment.
        half: bf16 instead of fp32 for the update.

    Returns:
        [d, d] skew update.

    Raises:
        InputError: moments that are not contiguous fp32.
    """
    from ndm_fast.kernels import lie_update as kernels
    from ndm_fast.kernels import tuning

    for name, moment in (("first", first), ("second", second)):
        if moment.dtype != torch.float32 or not moment.is_contiguous():
            raise InputError(f"{name} is changed in place: it must be contiguous fp32")
    width = len(first)
    update = torch.empty_like(first, dtype=torch.bfloat16 if half else torch.float32)
    tiles = -(-width // tuning.LIE_BLOCK)
    scale, guard = factors
    options = {"TAKE": product is not None, "ON_DEVICE": isinstance(scale, Tensor)}
    with gpu_frame.device_of(first):
        kernels.lie_update_kernel[(tiles, tiles)](
            first if product is None else product.contiguous(),
            *(first, second, update, scale, guard, width, 1 - fast, slow, 1 - slow),
            **{"BLOCK": tuning.LIE_BLOCK, "num_warps": 4, **options, **tuning.OPTIONS},
        )
    return update


class _Pieces(NamedTuple):
    """Subspaces cut into what one block of the gradient's kernels takes."""

    table: Tensor
    """[N, 5] int32: subspace, first column, columns, first piece of that subspace, how many it has."""
    parts: int
    """Power of two that no subspace has more pieces than."""


@lru_cache(maxsize=64)
def _pieces(widths: tuple[int, ...], columns: int, device: torch.device) -> _Pieces:
    rows: list[tuple[int, ...]] = []
    offset = 0
    for subspace, width in enumerate(widths):
        first, count = len(rows), -(-width // columns)
        for start in range(0, width, columns):
            rows.append((subspace, offset + start, min(columns, width - start), first, count))
        offset += width
    most = max(row[4] for row in rows)
    return _Pieces(torch.tensor(rows, dtype=torch.int32, device=device), 1 << (most - 1).bit_length())
