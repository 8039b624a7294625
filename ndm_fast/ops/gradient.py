"""Loss and gradient for given neighbors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ndm_fast.geometry.objective import Objective
from ndm_fast.ops import backends, checks, library


def loss_and_gradient(
    queries: Tensor,
    keys: Tensor,
    index: Tensor,
    rotation: Tensor,
    widths: Sequence[int],
    metric: str = "euclidean",
    counted: Tensor | None = None,
    *,
    log_floor: Tensor | None = None,
    backend: str | None = None,
    check_index: bool = True,
) -> Objective:
    """Loss and gradient for given neighbors, as ``ndm_fast.geometry.objective.loss_and_gradient`` has them.

    Args:
        queries: [Q, d] and keys: [K, d], fp32, fp16 or bf16.
        index: [S, Q] int64, the row of ``keys`` that is nearest; from 0 to K - 1, also where not counted.
        rotation: [d, d] fp32.
        widths: widths of the S subspaces; they sum to d.
        metric: ``"euclidean"`` or ``"cosine"``.
        counted: [S, Q] bool, the neighbors that contribute to the means over Q; default all.
        log_floor: [S] fp32 distances from 0 up. Where given, the loss is of logarithms, weighted by width:
            ``log sqrt(|r|^2 + log_floor^2)``. Euclidean only.
        backend: see ``ndm_fast.ops.backends``.
        check_index: look at the values of ``index``. On a GPU this waits for the device, and it breaks the
            graph of ``torch.compile``. Switch it off only where the index comes from a search among these
            keys: a row that is not there reads foreign memory.

    Returns:
        ``Objective(by_subspace [S], gradient [d, d])``, fp32. A row that is NaN gives NaN.

    Raises:
        InputError (a ValueError): naming the argument, for a wrong shape, dtype, device or row, or a backend
            that cannot run.
    """
    rotation, widths = checks.check_rows(queries, keys, rotation, widths, check_finite=False)
    checks.check_metric(metric)
    checks.check_neighbors(index, counted, len(widths), queries, keys, check_index=check_index)
    checks.check_log_floor(log_floor, metric, len(widths), queries)
    chosen = backends.choose(queries.device, backend).name
    given = (queries, keys, index, rotation, widths, metric, counted, log_floor)
    return Objective(*_loss_and_gradient(*given, chosen))


@library.op(
    {"reference": "ops.plain", "cpu": "ops.cpu.step", "triton": "kernels.gradient", "cuda": "ops.cuda"}
)
def _loss_and_gradient(
    queries: Tensor,
    keys: Tensor,
    index: Tensor,
    rotation: Tensor,
    widths: list[int],
    metric: str,
    counted: Tensor | None,
    log_floor: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return rotation.new_empty(len(widths)), torch.empty_like(rotation, memory_format=torch.contiguous_format)
