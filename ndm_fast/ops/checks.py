"""What the ops ask of their arguments, before any backend sees them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ndm_fast.errors import InputError


def check_search(
    queries: Tensor,
    keys: Tensor,
    rotation: Tensor,
    widths: Sequence[int],
    metric: str,
    precision: str,
    check_finite: bool,
) -> None:
    """Raise what :func:`nearest_neighbors` says of these arguments."""
    check_rows(queries, keys, rotation, widths, check_finite)
    if metric not in ("euclidean", "cosine"):
        raise InputError(f"metric is {metric!r}: take euclidean or cosine")
    if precision not in ("fp32", "bf16"):
        raise InputError(f"precision is {precision!r}: take fp32 or bf16")


def check_rows(
    queries: Tensor, keys: Tensor, rotation: Tensor, widths: Sequence[int], check_finite: bool
) -> None:
    width = sum(widths)
    for name, tensor in (("queries", queries), ("keys", keys), ("rotation", rotation)):
        if tensor.ndim != 2 or tensor.shape[1] != width or (name == "rotation" and tensor.shape[0] != width):
            raise InputError(
                f"{name} has shape {list(tensor.shape)}, the widths sum to {width}: give "
                + (f"[{width}, {width}]" if name == "rotation" else f"[rows, {width}]")
            )
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise InputError(f"{name} has dtype {tensor.dtype}: give float32, float16 or bfloat16")
        if tensor.device != queries.device:
            raise InputError(f"{name} is on {tensor.device}, queries on {queries.device}: move one of them")
        if tensor.shape[0] == 0:
            raise InputError(f"{name} has no rows: give at least one")
        # One pass that reads everything and writes nothing: a sum is finite only where all terms are.
        if check_finite and not torch.isfinite(tensor.sum(dtype=torch.float32)):
            raise InputError(f"{name} holds NaN or Inf: drop these rows or use a wider dtype")
    if min(widths) < 1:
        raise InputError(f"widths {list(widths)} hold one below 1: give positive widths")


def check_pairs(variances: Tensor, pairs: Tensor, widths: Sequence[int]) -> None:
    if variances.shape != (len(widths),):
        raise InputError(
            f"variances has shape {list(variances.shape)}: give one for each of {len(widths)} subspaces"
        )
    if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.dtype != torch.int64 or len(pairs) == 0:
        raise InputError(
            f"pairs is {pairs.dtype} of shape {list(pairs.shape)}: give int64 [P, 2], P at least 1"
        )
    if int(pairs.min()) < 0 or int(pairs.max()) >= len(widths):
        raise InputError(f"pairs name subspaces outside 0 … {len(widths) - 1}: give numbers of subspaces")
