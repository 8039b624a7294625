"""Nearest key of every query in every subspace."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ndm_fast.errors import InputError
from ndm_fast.geometry.reference import Neighbors
from ndm_fast.ops import backends, checks, library

_MODULES = {"reference": "ops.plain", "cpu": "ops.cpu.search", "triton": "kernels.search", "cuda": "ops.cuda"}


def nearest_neighbors(
    queries: Tensor,
    keys: Tensor,
    rotation: Tensor | None,
    widths: Sequence[int],
    *,
    metric: str = "euclidean",
    precision: str = "fp32",
    keys_rotated: bool = False,
    queries_rotated: bool = False,
    backend: str | None = None,
    check_finite: bool = True,
) -> Neighbors:
    """Nearest key of every query inside every subspace: project, compare and reduce in one call.

    Args:
        queries: [Q, d] activations, fp32, fp16 or bf16; ``queries @ rotation`` where ``queries_rotated``.
        keys: [K, d] activations; ``keys @ rotation`` where ``keys_rotated``.
        rotation: [d, d] orthogonal, fp32; may be None where both sides are rotated.
        widths: widths of the S subspaces; they sum to d.
        metric: ``"euclidean"``, or ``"cosine"`` for which the distance is ``1 - cos``.
        precision: least precision of the pass that proposes neighbors, ``"fp32"`` or ``"bf16"``. With bf16 a
            neighbor may be 1 % farther than the nearest (fp32: 1e-6). The distance returned is always
            computed anew, from the difference of the two rows.
        keys_rotated, queries_rotated: what is rotated already; the queries only where the keys are.
        backend: see ``ndm_fast.ops.backends``.
        check_finite: look for NaN and Inf; switch off where the data was checked before. On a GPU this waits
            for the device, and it breaks the graph of ``torch.compile``.

    Returns:
        ``Neighbors(distance [S, Q] fp32, index [S, Q] int64)``; ties go to the lowest index. On a GPU a query
        that is 1e19 times as far from the keys as they are from each other gets NaN.

    Raises:
        InputError (a ValueError): naming the argument, for no keys, NaN or Inf, wrong shape, dtype or device.
    """
    if queries_rotated and not keys_rotated:
        raise InputError("queries_rotated goes with keys_rotated: rotate both, or give both raw")
    rotation, widths = checks.check_rows(
        queries, keys, rotation, widths, check_finite=check_finite, rotated=queries_rotated
    )
    checks.check_metric(metric)
    checks.check_precision(precision)
    form = (metric, precision, bool(keys_rotated), bool(queries_rotated))
    chosen = backends.choose(queries.device, backend).name
    return Neighbors(*_nearest_neighbors(queries, keys, rotation, widths, *form, chosen))


@library.op(_MODULES)
def _nearest_neighbors(
    queries: Tensor,
    keys: Tensor,
    rotation: Tensor,
    widths: list[int],
    metric: str,
    precision: str,
    keys_rotated: bool,
    queries_rotated: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    shape = (len(widths), queries.shape[0])
    return queries.new_empty(shape, dtype=torch.float32), queries.new_empty(shape, dtype=torch.int64)


def nearest_index(
    queries: Tensor,
    keys: Tensor,
    rotation: Tensor,
    widths: Sequence[int],
    metric: str = "euclidean",
    precision: str = "fp32",
    *,
    backend: str | None = None,
) -> Tensor:
    """[S, Q] int64 rows of the keys that are nearest: ``ndm_fast.ops.nearest_neighbors`` without distances.

    A step has no use for exact distances, which take longer than the search on a CPU, and up to a fifth of it
    on a GPU. Arguments, errors and tolerances as there, up to the rounding of the rotation; nothing looks for
    NaN and Inf.
    """
    rotation, widths = checks.check_rows(queries, keys, rotation, widths, check_finite=False)
    checks.check_metric(metric)
    checks.check_precision(precision)
    chosen = backends.choose(queries.device, backend).name
    return _nearest_index(queries, keys, rotation, widths, metric, precision, chosen)


@library.op(_MODULES)
def _nearest_index(
    queries: Tensor,
    keys: Tensor,
    rotation: Tensor,
    widths: list[int],
    metric: str,
    precision: str,
    backend: str,
) -> Tensor:
    return queries.new_empty((len(widths), queries.shape[0]), dtype=torch.int64)
