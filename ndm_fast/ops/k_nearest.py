"""The k nearest keys of every query in every subspace."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index as as_index
from typing import Any

import torch
from torch import Tensor

from ndm_fast.errors import InputError
from ndm_fast.geometry.reference import Neighbors
from ndm_fast.ops import backends, checks, library
from ndm_fast.ops.arrays import Array, in_short
from ndm_fast.ops.differentiable import DISTANCES, distance_type, with_finite

_MODULES = dict.fromkeys(backends.BACKENDS, "geometry.k_nearest")
"""Torch code for all of them: it is exact on any device, and no kernel has been written."""


def k_nearest_neighbors(
    queries: Array,
    keys: Array,
    rotation: Array | None,
    widths: Sequence[int],
    k: int,
    *,
    exclude: Array | None = None,
    metric: str = "euclidean",
    keys_rotated: bool = False,
    queries_rotated: bool = False,
    backend: str | None = None,
    check_finite: bool = True,
) -> Neighbors:
    """The k nearest keys of every query inside every subspace, nearest first.

    All backends run the same torch code (docs/embed.md says what that costs).

    Args:
        queries, keys, rotation, widths, metric, keys_rotated, queries_rotated, backend, check_finite: as for
            ``ndm_fast.ops.nearest_neighbors``.
        k: neighbors wanted, at most K; with ``exclude`` at most K - 1.
        exclude: [Q] int64, the key that is none of a query's neighbors (itself), or -1 for none.

    Returns:
        ``Neighbors(distance [S, Q, k] fp32, index [S, Q, k] int64)``. Each distance is that of the key named,
        and at most 1 + 1e-6 times the true one of its rank. Equal ones come in the order of the index. They
        carry gradients, and take fp64 on backend ``reference``, as those of ``nearest_neighbors`` do.

    Raises:
        InputError (a ValueError): naming the argument, for a k out of range or a key that is not there, NaN
            or Inf, wrong shape, dtype or device.
    """
    checks.check_rotated(keys_rotated, queries_rotated)
    rows = checks.check_rows(
        queries, keys, rotation, widths, rotated=queries_rotated, backend=backend, float64=True
    )
    checks.check_metric(metric)
    count = rows.queries.shape[0]
    if exclude is not None:
        exclude = checks.check_tensor("exclude", exclude, (count,), (torch.int64,), rows.queries)
    k = _checked(k, rows.keys.shape[0], exclude is not None)
    form = (metric, bool(keys_rotated), bool(queries_rotated))
    chosen = backends.choose(rows.queries.device, backend).name
    return Neighbors(*_k_nearest_neighbors(*rows, *form, k, exclude, bool(check_finite), chosen))


def _checked(k: int, keys: int, excludes: bool) -> int:
    most = keys - 1 if excludes else keys
    try:
        k = as_index(k)
    except TypeError:
        raise InputError(f"k is {in_short(k)}: give an int") from None
    if not 1 <= k <= most:
        among = f"{keys} keys, one of them excluded" if excludes else f"{keys} keys"
        raise InputError(f"k is {k} of {among}: give from 1 to as many as there are")
    return k


def _with_excluded(run: library.Run, given: dict[str, Any]) -> Any:
    if given["exclude"] is not None:
        checks.check_index("exclude", given["exclude"], len(given["keys"]), least=-1)
    return with_finite(run, given)


@library.op(_MODULES, around=_with_excluded, gradient=DISTANCES)
def _k_nearest_neighbors(
    queries: Tensor,
    keys: Tensor,
    rotation: Tensor,
    widths: list[int],
    metric: str,
    keys_rotated: bool,
    queries_rotated: bool,
    k: int,
    exclude: Tensor | None,
    check_finite: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    shape = (len(widths), queries.shape[0], k)
    distance = queries.new_empty(shape, dtype=distance_type(queries, keys, rotation))
    return distance, queries.new_empty(shape, dtype=torch.int64)
