"""Loss and gradient for given neighbors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ndm_fast.geometry.objective import Objective
from ndm_fast.ops import backends, checks, library
from ndm_fast.ops.arrays import Array

_MODULES = {
    "reference": "ops.plain",
    "cpu": "ops.cpu.step",
    "triton": "kernels.gradient",
    "cuda": "ops.cuda",
}


def loss_and_gradient(
    queries: Array,
    keys: Array,
    index: Array,
    rotation: Array,
    widths: Sequence[int],
    metric: str = "euclidean",
    counted: Array | None = None,
    *,
    log_floor: Array | None = None,
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
        check_index: look at the values of ``index``. On a GPU this waits for the device. Switch it off only
            where the index comes from a search among these keys: a row that is not there reads foreign
            memory.

    Returns:
        ``Objective(by_subspace [S], gradient [d, d])``, fp32. A row that is NaN gives NaN.

    Raises:
        InputError (a ValueError): naming the argument, for a wrong shape, dtype, device or row, or a backend
            that cannot run.
    """
    given = _checked(queries, keys, index, rotation, widths, metric, counted, log_floor)
    chosen = backends.choose(given[0].device, backend).name
    return Objective(*_loss_and_gradient(*given, bool(check_index), chosen))


def direct_gradient() -> library.Direct:
    """For a loop: :func:`loss_and_gradient` of tensors, all eight arguments by name; looks at no values."""

    def check(**given: Any) -> str:
        return backends.choose(_checked(**given)[0].device).name

    return library.Direct(_MODULES, "loss_and_gradient", check)


def _checked(
    queries: Array,
    keys: Array,
    index: Array,
    rotation: Array,
    widths: Sequence[int],
    metric: str,
    counted: Array | None,
    log_floor: Array | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[int], str, Tensor | None, Tensor | None]:
    rows = checks.check_rows(queries, keys, rotation, widths)
    checks.check_metric(metric)
    index, counted = checks.check_neighbors(index, counted, len(rows.widths), rows.queries)
    log_floor = checks.check_log_floor(log_floor, metric, len(rows.widths), rows.queries)
    return rows.queries, rows.keys, index, rows.rotation, rows.widths, metric, counted, log_floor


def _with_index(run: library.Run, given: dict[str, Any]) -> Any:
    if given.pop("check_index"):
        checks.check_index("index", given["index"], len(given["keys"]))
    return run(**given)


@library.op(_MODULES, around=_with_index)
def _loss_and_gradient(
    queries: Tensor,
    keys: Tensor,
    index: Tensor,
    rotation: Tensor,
    widths: list[int],
    metric: str,
    counted: Tensor | None,
    log_floor: Tensor | None,
    check_index: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return rotation.new_empty(len(widths)), torch.empty_like(rotation, memory_format=torch.contiguous_format)
