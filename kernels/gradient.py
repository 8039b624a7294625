"""Loss and gradient for given neighbors, euclidean (docs/method.md), in three kernels.

With ``delta = q - n_s(q)`` and ``r = delta R_s``:

    loss_s = 1/Q sum_q |r|        dL/dR_s = 1/(S Q) sum_q delta' r / |r|

or, where ``LOG``, of the logarithm with a floor ``f_s``: ``loss_s = 1/Q sum_q log sqrt(|r|^2 + f_s^2)``,
``dL/dR_s = p_s/(d Q) sum_q delta' r / (|r|^2 + f_s^2)``.

``project_kernel`` writes r, in parts of the depth, or 32 subspaces would not fill 132 multiprocessors;
``units_kernel`` sums the parts and writes ``r / |r|`` and the distances; ``gradient_kernel`` makes tiles of
the gradient, each summed over all queries by one block, in order. There are no atomics, so two runs agree bit
for bit. Neighbors are gathered by the first and the last, never stored: the second time they come from the L2
cache, where they fit it (GPT-2 5 MB, Gemma 19 MB in half precision; H200 50 MB). Differences and sums are
in fp32: one coordinate of 1e3 would round off in half precision all that the others say.

A block takes a piece: up to ``MAIN + REST`` columns of one subspace, all of them where it can, since each
piece gathers the neighbors anew. A table says where each lies, so one launch serves any widths.

Limit: bytes. Neighbors and rotation are read, and the gradient written (Gemma 19 + 21 + 21 MB, 15 us at
the 4.2 TB/s of an H200); ``4 Q d^2`` operations (2.7 GFLOP) are 54 us at the 50 TFLOP/s of fp32, three
times in fp16 12 us at 700.
docs/kernels-gpu.md has the predicted times.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..geometry import objective
from ..geometry.columns import unit_columns
from ..geometry.objective import Objective
from .gradient_kernels import gradient_kernel, project_kernel, units_kernel
from .launch import capability, device_of

if TYPE_CHECKING:
    from .gradient_tuning import Gradient


def loss_and_gradient(
    queries: Tensor,
    keys: Tensor,
    index: Tensor,
    rotation: Tensor,
    widths: Sequence[int],
    metric: str,
    counted: Tensor | None = None,
    log_floor: Tensor | None = None,
    *,
    products: str = "ieee",
    shape: Gradient | None = None,
    columns: tuple[int, int] | None = None,
) -> Objective:
    """Loss and gradient for given neighbors, as ``geometry.objective.loss_and_gradient`` has them.

    Euclidean only: the cosine is left to that function's torch code. The first call for new widths copies a
    small table to the device; make it before a CUDA graph is captured.

    Args:
        queries: [Q, d]; keys: [K, d]; each fp32, fp16 or bf16.
        index: [S, Q] int64, the row of ``keys`` that is nearest; not checked.
        rotation: [d, d] fp32; it may be off from orthogonal.
        widths: S widths that sum to d.
        counted: [S, Q] bool, the neighbors that contribute; default all. Others are not read.
        log_floor: [S] fp32, for the loss of logarithms.
        products: ``"ieee"`` for fp32 products; ``"fp16x3"`` or ``"tf32x3"`` for products on the matrix units
            of numbers split into two fp16, or tf32, each, good to 2^-21 (GPT-2 on an H200: 29, 23 and 29 us).
            With fp16 entries of ``rotation`` are good to 2^-31, and one beyond 1000 makes NaN; differences of
            fp16 rows are good to 2^-24. The form of fp16x3 has changed since it ran on a card.
        shape: of the kernels' tiles; default by ``kernels/gradient_tuning.py``.
        columns: of a block, in two powers of two of which the second may be 0; default likewise.

    Returns:
        ``Objective(by_subspace [S] fp32, gradient [d, d] fp32)``. Without any distance, no gradient; a
        coordinate that is NaN makes its row of the gradient NaN.
    """
    if metric == "cosine":
        return objective.loss_and_gradient(queries, keys, index, rotation, widths, metric, counted, log_floor)
    from . import gradient_tuning, tuning

    queries, keys, rotation = (unit_columns(rows) for rows in (queries, keys, rotation))
    (count, width), subspaces = queries.shape, len(widths)
    shape = shape or gradient_tuning.shape_of(capability(queries.device), products)
    columns = columns or gradient_tuning.columns_of(widths, products)
    cut = _pieces(tuple(widths), columns, queries.device)
    split = gradient_tuning.splits_of(shape, count, width, len(cut.table))
    halves = products == "fp16x3"
    projected = torch.empty(split, count, width, device=queries.device)
    units = torch.empty((2, count, width) if halves else (count, width), device=queries.device,
                        dtype=torch.float16 if halves else torch.float32)  # fmt: skip
    distances, weights = torch.empty(2, subspaces, count, device=queries.device)
    losses = torch.empty(subspaces, device=queries.device)
    result = torch.empty(width, width, device=queries.device)
    mask = index if counted is None else counted
    rows = (queries, queries.stride(0), count, keys, keys.stride(0), index, *index.stride())
    neighbors = (*rows, mask, *mask.stride(), cut.table)
    common: dict[str, Any] = {"COUNTED": counted is not None, "DOT": products, "ALIGNED": cut.aligned}
    common |= tuning.OPTIONS
    tiles = dict(zip(("MAIN", "REST"), columns, strict=True)) | common
    log, unit = {"LOG": log_floor is not None}, gradient_tuning.units_of(widths, split)
    half = queries.dtype == keys.dtype == torch.float16
    with device_of(queries):
        project_kernel[(-(-count // shape.project_queries), split, len(cut.table))](
            *neighbors,
            rotation,
            rotation.stride(0),
            width,
            projected,
            HALF=half,
            **(tiles | shape.project(split)),
        )
        units_kernel[(-(-count // unit["QUERY_BLOCK"]), subspaces)](
            *(count, width, mask, *mask.stride(), cut.subspaces, losses if log_floor is None else log_floor),
            *(width * count, projected, units, distances, weights),
            **(common | log | unit),
        )
        gradient_kernel[(-(-width // shape.rows), len(cut.table))](
            *(*neighbors, width * count, units, distances, weights, width, losses, result),
            *(1 / count, 1 / (count * (subspaces if log_floor is None else width)), cut.sizes),
            HALF=half and log_floor is None,
            **(tiles | log | shape.total()),
        )
    return Objective(losses, result)


class _Pieces(NamedTuple):
    """Subspaces cut into what one block of the gradient's kernels takes."""

    table: Tensor
    """[N, 4] int32: subspace, first column, columns, whether it is the first piece of the subspace."""
    subspaces: Tensor
    """[S, 2] int32: first column, width."""
    sizes: Tensor
    """[S] fp32 widths of the subspaces."""
    aligned: int
    """Power of two, up to 16, of which all first columns and numbers of columns are multiples."""


@lru_cache(maxsize=64)
def _pieces(widths: tuple[int, ...], columns: tuple[int, int], device: torch.device) -> _Pieces:
    rows: list[tuple[int, ...]] = []
    subspaces: list[tuple[int, ...]] = []
    offset, most = 0, sum(columns)
    for subspace, width in enumerate(widths):
        for start in range(0, width, most):
            rows.append((subspace, offset + start, min(most, width - start), start == 0))
        subspaces.append((offset, width))
        offset += width
    return _Pieces(
        torch.tensor(rows, dtype=torch.int32, device=device),
        torch.tensor(subspaces, dtype=torch.int32, device=device),
        torch.tensor(widths, dtype=torch.float32, device=device),
        math.gcd(16, *(number for row in rows for number in row[1:3])),
    )
