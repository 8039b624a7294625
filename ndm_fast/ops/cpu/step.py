"""Compiled CPU ops of an optimiser step: gradient of the loss, and Adam on the Lie algebra.

Checks what ``ndm_fast._C`` is given, as ``ndm_fast.ops.cpu.search`` does for the search.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ndm_fast.geometry.objective import Objective
from ndm_fast.ops.cpu.extension import check_rows, extension, isa, rows_of, unit_columns


def mean_distance_gradient(
    queries: Tensor,
    keys: Tensor,
    index: Tensor,
    rotation: Tensor,
    widths: Sequence[int],
    counted: Tensor | None = None,
) -> Objective:
    """Loss and gradient of the euclidean metric, as ``geometry.objective.loss_and_gradient``, in fp32.

    Args:
        queries: [Q, d] and keys: [K, d], fp32, fp16 or bf16 on the CPU. Rows may be strided.
        index: [S, Q] int64 rows of the keys.
        rotation: [d, d] fp32.
        widths: S widths that sum to d.
        counted: [S, Q] bool, the neighbors that contribute; default all.

    Raises:
        ValueError: one line that names the argument.
    """
    offsets = check_rows(queries, keys, rotation, widths)
    shape = (len(widths), len(queries))
    if len(queries) == 0:
        raise ValueError("queries has no rows: give at least one")
    for name, tensor, dtype in (("index", index, torch.int64), ("counted", counted, torch.bool)):
        if tensor is None:
            continue
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device.type != "cpu":
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}: "
                f"give {dtype} {list(shape)} on the CPU"
            )
    index, counted = unit_columns(index), None if counted is None else unit_columns(counted)
    queries, keys, rotation = unit_columns(queries), unit_columns(keys), rotation.contiguous()
    mean, gradient = torch.empty(len(widths)), torch.empty_like(rotation)
    extension().mean_distance_gradient(
        *(isa(), torch.get_num_threads(), len(queries), len(keys), offsets),
        *(rows_of(queries), rows_of(keys), index.data_ptr(), index.stride(0)),
        *((0, 0) if counted is None else (counted.data_ptr(), counted.stride(0))),
        *(rotation.data_ptr(), mean.data_ptr(), gradient.data_ptr()),
    )
    return Objective(mean, gradient)


def lie_update(
    product: Tensor | None,
    first: Tensor,
    second: Tensor,
    scale: float,
    guard: float,
    betas: tuple[float, float],
    half: bool = False,
) -> Tensor:
    """[d, d] skew update, as ``ndm_fast.geometry.reference.lie_update``; fp32, or bf16 where ``half``.

    Raises:
        ValueError: one line that names the argument.
    """
    shape = first.shape
    product = None if product is None else product.float().contiguous()
    for name, tensor in (("product", product), ("first", first), ("second", second)):
        if tensor is None:
            continue
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device} with strides {tensor.stride()}: "
                "give contiguous float32 on the CPU"
            )
        if tensor.ndim != 2 or tensor.shape != shape or shape[0] != shape[1] or not len(first):
            raise ValueError(f"{name} has shape {list(tensor.shape)}: give three squares of one size")
    update = torch.empty(shape, dtype=torch.bfloat16 if half else torch.float32)
    extension().lie_update(
        *(isa(), torch.get_num_threads(), shape[0], 0 if product is None else product.data_ptr()),
        *(first.data_ptr(), second.data_ptr(), scale, guard, *betas),
        *((0, update.data_ptr()) if half else (update.data_ptr(), 0)),
    )
    return update
