"""Nearest key of every query in every subspace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ndm_fast.geometry.reference import Neighbors
from ndm_fast.ops import backends, checks, library
from ndm_fast.ops.arrays import Array
from ndm_fast.ops.differentiable import DISTANCES, distance_type, with_finite

_MODULES = {"reference": "ops.plain", "cpu": "ops.cpu.search", "triton": "kernels.search", "cuda": "ops.cuda"}


def nearest_neighbors(
    queries: Array,
    keys: Array,
    rotation: Array | None,
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
            for the device.

    Returns:
        ``Neighbors(distance [S, Q] fp32, index [S, Q] int64)``; ties go to the lowest index. On a GPU a query
        that is 1e19 times as far from the keys as they are from each other gets NaN. The distance carries a
        gradient to queries, keys and rotation; where it is 0 that is 0. Backend ``reference`` takes fp64 too,
        and then gives fp64 distances.

    Raises:
        InputError (a ValueError): naming the argument, for no keys, NaN or Inf, wrong shape, dtype or device.
    """
    checks.check_rotated(keys_rotated, queries_rotated)
    rows = checks.check_rows(
        queries, keys, rotation, widths, rotated=queries_rotated, backend=backend, float64=True
    )
    checks.check_metric(metric)
    checks.check_precision(precision)
    form = (metric, bool(keys_rotated), bool(queries_rotated))
    chosen = backends.choose(rows.queries.device, backend).name
    return Neighbors(*_nearest_neighbors(*rows, *form, precision, bool(check_finite), chosen))


@library.op(_MODULES, around=with_finite, gradient=DISTANCES)
def _nearest_neighbors(
    queries: Tensor,
    keys: Tensor,
    rotation: Tensor,
    widths: list[int],
    metric: str,
    keys_rotated: bool,
    queries_rotated: bool,
    precision: str,
    check_finite: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    shape = (len(widths), queries.shape[0])
    distance = queries.new_empty(shape, dtype=distance_type(queries, keys, rotation))
    return distance, queries.new_empty(shape, dtype=torch.int64)


def nearest_index(
    queries: Array,
    keys: Array,
    rotation: Array,
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
    rows = _checked_rows(queries, keys, rotation, widths, metric, precision)
    chosen = backends.choose(rows.queries.device, backend).name
    return _nearest_index(*rows, metric, precision, chosen)


def direct_index() -> library.Direct:
    """For a loop: :func:`nearest_index` of tensors, all six arguments by name."""

    def check(**given: Any) -> str:
        return backends.choose(_checked_rows(**given).queries.device).name

    return library.Direct(_MODULES, "nearest_index", check)


def _checked_rows(
    queries: Array, keys: Array, rotation: Array, widths: Sequence[int], metric: str, precision: str
) -> checks.Rows:
    rows = checks.check_rows(queries, keys, rotation, widths)
    checks.check_metric(metric)
    checks.check_precision(precision)
    return rows


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
