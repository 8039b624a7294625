"""Compiled CPU ops of an optimiser step: gradient of the loss, and Adam on the Lie algebra."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ndm_fast.geometry import objective
from ndm_fast.geometry.columns import unit_columns
from ndm_fast.geometry.objective import Objective
from ndm_fast.ops.cpu.extension import extension, isa, offsets_of, rows_of


def loss_and_gradient(
    queries: Tensor,
    keys: Tensor,
    index: Tensor,
    rotation: Tensor,
    widths: Sequence[int],
    metric: str,
    counted: Tensor | None = None,
    log_floor: Tensor | None = None,
) -> Objective:
    """As ``geometry.objective.loss_and_gradient``; the euclidean metric in C++, in fp32.

    Args:
        queries: [Q, d] and keys: [K, d], fp32, fp16 or bf16 on the CPU. Rows may be strided.
        index: [S, Q] int64 rows of the keys.
        rotation: [d, d] fp32.
        widths: S widths that sum to d.
        counted: [S, Q] bool, the neighbors that contribute; default all.
        log_floor: [S] fp32, for the loss of logarithms.

    Raises:
        ValueError: the index names a row that is not there.
    """
    if metric == "cosine":
        return objective.loss_and_gradient(queries, keys, index, rotation, widths, metric, counted)
    index, counted = unit_columns(index), None if counted is None else unit_columns(counted)
    log_floor = None if log_floor is None else log_floor.detach().contiguous()
    queries, keys, rotation = unit_columns(queries), unit_columns(keys), rotation.detach().contiguous()
    mean, gradient = torch.empty(len(widths)), torch.empty_like(rotation)
    extension().mean_distance_gradient(
        *(isa(), torch.get_num_threads(), len(queries), len(keys), offsets_of(widths)),
        *(rows_of(queries), rows_of(keys), index.data_ptr(), index.stride(0)),
        *((0, 0) if counted is None else (counted.data_ptr(), counted.stride(0))),
        0 if log_floor is None else log_floor.data_ptr(),
        *(rotation.data_ptr(), mean.data_ptr(), gradient.data_ptr()),
    )
    return Objective(mean, gradient)


def lie_update(
    product: Tensor | None,
    first: Tensor,
    second: Tensor,
    scale: float | Tensor,
    guard: float | Tensor,
    betas: Sequence[float],
    half: bool = False,
) -> Tensor:
    """[d, d] skew update, as ``ndm_fast.geometry.reference.lie_update``; fp32, or bf16 where ``half``."""
    product = None if product is None else product.detach().float().contiguous()
    update = torch.empty(first.shape, dtype=torch.bfloat16 if half else torch.float32)
    extension().lie_update(
        *(isa(), torch.get_num_threads(), len(first), 0 if product is None else product.data_ptr()),
        *(first.data_ptr(), second.data_ptr(), float(scale), float(guard), *betas),
        *((0, update.data_ptr()) if half else (update.data_ptr(), 0)),
    )
    return update
