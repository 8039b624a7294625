"""Nearest key of every query in every subspace: check, choose a backend, run it as a ``torch.library`` op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ndm_fast.errors import InputError
from ndm_fast.geometry.centring import rotate_centred, sample_mean
from ndm_fast.geometry.reference import Neighbors
from ndm_fast.ops import backends, checks
from ndm_fast.ops.checks import check_search

_MODULES = {
    "reference": "geometry.reference",
    "cpu": "ops.cpu.search",
    "triton": "kernels.search",
    "cuda": "ops.cuda",
}
"""Where each backend has the search."""


def nearest_neighbors(
    queries: Tensor,
    keys: Tensor,
    rotation: Tensor,
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
        rotation: [d, d] orthogonal, fp32.
        widths: widths of the S subspaces; they sum to d.
        metric: ``"euclidean"``, or ``"cosine"`` for which the distance is ``1 - cos``.
        precision: least precision of the pass that proposes neighbors, ``"fp32"`` or ``"bf16"``. With bf16 a
            neighbor may be 1 % farther than the nearest (fp32: 1e-6). The distance returned is always
            computed anew, from the difference of the two rows.
        keys_rotated, queries_rotated: what is rotated already; the queries only where the keys are.
        backend: see ``ndm_fast.ops.backends``.
        check_finite: look for NaN and Inf; switch off where the data was checked before.

    Returns:
        ``Neighbors(distance [S, Q] fp32, index [S, Q] int64)``; ties go to the lowest index.

    Raises:
        InputError (a ValueError): naming the argument, for no keys, NaN or Inf, wrong shape, dtype or device.
    """
    check_search(queries, keys, rotation, widths, metric, precision, check_finite)
    if queries_rotated and not keys_rotated:
        raise InputError("queries_rotated goes with keys_rotated: rotate both, or give both raw")
    chosen = backends.choose(queries.device, backend).name
    form = (metric, precision, keys_rotated, queries_rotated, chosen)
    return Neighbors(*_nearest_neighbors(queries, keys, rotation, list(widths), *form))


@torch.library.custom_op("ndm_fast::nearest_neighbors", mutates_args=())
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
    form = {"metric": metric, "keys_rotated": keys_rotated, "queries_rotated": queries_rotated}
    if backend != "reference":
        form["precision"] = precision
    found = backends.load(_MODULES[backend]).nearest_neighbors(queries, keys, rotation, widths, **form)
    return found.distance.float(), found.index


@_nearest_neighbors.register_fake
def _(
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
    checks.check_search(queries, keys, rotation, widths, metric, precision, False)
    chosen = backends.choose(queries.device, backend).name
    return _nearest_index(queries, keys, rotation, list(widths), metric, precision, chosen)


@torch.library.custom_op("ndm_fast::nearest_index", mutates_args=())
def _nearest_index(
    queries: Tensor,
    keys: Tensor,
    rotation: Tensor,
    widths: list[int],
    metric: str,
    precision: str,
    backend: str,
) -> Tensor:
    options: dict[str, Any] = {"precision": precision, "backend": backend, "check_finite": False}
    if backend == "triton" and precision == "bf16":
        search = backends.load(_MODULES["triton"])
        return search.nearest_index(queries, keys, rotation, widths, metric=metric)
    if backend in ("cpu", "reference") and metric == "euclidean":
        origin = sample_mean(keys)
        queries, keys = (rotate_centred(rows, rotation, origin) for rows in (queries, keys))
        options |= {"keys_rotated": True, "queries_rotated": True}
    return nearest_neighbors(queries, keys, rotation, widths, metric=metric, **options).index


@_nearest_index.register_fake
def _(
    queries: Tensor,
    keys: Tensor,
    rotation: Tensor,
    widths: list[int],
    metric: str,
    precision: str,
    backend: str,
) -> Tensor:
    return queries.new_empty((len(widths), len(queries)), dtype=torch.int64)
