"""Radius and counts of the KSG estimator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ndm_fast.ops import backends, checks, library
from ndm_fast.ops.arrays import Array

_MODULES = {"reference": "ops.plain", "cpu": "ops.cpu.ksg", "triton": "kernels.ksg"}

_ROWS, _VARIANCES = 2.0**40, 2.0**80
"""Largest values, and their inverses the least, whose squared distances surely fit into fp32."""


def ksg_radius(
    queries: Array,
    keys: Array,
    rotation: Array | None,
    widths: Sequence[int],
    variances: Array,
    pairs: Array,
    *,
    rotated: bool = False,
    backend: str | None = None,
) -> Tensor:
    """[P, Q] fp32 ``min_k max(D_a, D_b)`` for every pair of subspaces and query.

    ``D_s`` is the distance in subspace s over the square root of that subspace's total variance. Rows that
    are equal have distance 0 for certain only where they were rotated to the same numbers before.

    Args:
        queries: [Q, d] and keys: [K, d], fp32, fp16 or bf16, finite.
        rotation: [d, d] fp32; may be None where ``rotated``.
        widths: widths of the S subspaces; they sum to d.
        variances: [S] fp32 or fp64, total variance of each subspace; where it is 0, so are the distances.
        pairs: [P, 2] int64 numbers of subspaces.
        rotated: queries and keys are rotated already.
        backend: see ``ndm_fast.ops.backends``.

    Raises:
        InputError (a ValueError): naming the argument, for NaN or Inf, wrong shape, dtype or device, or a
            backend that cannot run.
    """
    given = _checked(queries, keys, rotation, widths, variances, pairs, rotated)
    return _ksg_radius(*given, bool(rotated), backends.choose(given[0].device, backend).name)


def ksg_counts(
    queries: Array,
    keys: Array,
    rotation: Array | None,
    widths: Sequence[int],
    variances: Array,
    pairs: Array,
    radius: Array,
    *,
    rotated: bool = False,
    backend: str | None = None,
) -> Tensor:
    """[P, 2, Q] int64: keys strictly closer than ``radius`` [P, Q] fp32, in each subspace of each pair.

    Arguments and errors as for :func:`ksg_radius`; use the same backend for both.
    """
    given = _checked(queries, keys, rotation, widths, variances, pairs, rotated)
    shape = (given[-1].shape[0], given[0].shape[0])
    radius = checks.check_tensor("radius", radius, shape, (torch.float32,), given[0])
    return _ksg_counts(*given, radius, bool(rotated), backends.choose(given[0].device, backend).name)


def ksg_radius_and_counts(
    queries: Array,
    keys: Array,
    rotation: Array | None,
    widths: Sequence[int],
    variances: Array,
    pairs: Array,
    *,
    rotated: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``radius`` [P, Q] of :func:`ksg_radius` and, for it, ``counts`` [P, 2, Q] of :func:`ksg_counts`.

    Arguments and errors as there; faster than both one after the other.
    """
    given = _checked(queries, keys, rotation, widths, variances, pairs, rotated)
    return _ksg_radius_and_counts(*given, bool(rotated), backends.choose(given[0].device, backend).name)


_Given = tuple[Tensor, Tensor, Tensor, list[int], Tensor, Tensor]


def _checked(
    queries: Array,
    keys: Array,
    rotation: Array | None,
    widths: Sequence[int],
    variances: Array,
    pairs: Array,
    rotated: bool,
) -> _Given:
    rows = checks.check_rows(queries, keys, rotation, widths, rotated=rotated)
    return *rows, *checks.check_pairs(variances, pairs, len(rows.widths), rows.queries)


def _in_range(run: library.Run, given: dict[str, Any]) -> Any:
    """Runs the op on numbers whose squares fit into fp32, and gives the radius in units of those it got.

    Backends square distances in fp32, which 1e19 overflows and 1e-23 underflows. Such rows, and variances,
    are scaled here, by powers of two, which round nothing.
    """
    checks.check_pair_values(given["variances"], given["pairs"])
    checks.check_largest("rotation", given["rotation"])
    largest = max(checks.check_largest(name, given[name]) for name in ("queries", "keys"))
    unit = 1.0
    if largest and not 1 / _ROWS <= largest <= _ROWS:
        unit = 2.0 ** min(max(math.frexp(largest)[1], -120), 120)
        given |= {name: given[name].float() / unit for name in ("queries", "keys")}
    spread = checks.check_largest("variances", given["variances"])
    if spread and not 1 / _VARIANCES <= spread <= _VARIANCES:
        root = 2.0 ** (math.frexp(spread)[1] // 2)
        given["variances"] = given["variances"].double() / root / root
        unit /= root
    if unit == 1:
        return run(**given)
    if "radius" in given:
        return run(**given | {"radius": given["radius"] / unit})
    found = run(**given)
    return (found[0] * unit, found[1]) if isinstance(found, tuple) else found * unit


@library.op(_MODULES, around=_in_range)
def _ksg_radius(
    queries: Tensor,
    keys: Tensor,
    rotation: Tensor,
    widths: list[int],
    variances: Tensor,
    pairs: Tensor,
    rotated: bool,
    backend: str,
) -> Tensor:
    return queries.new_empty((pairs.shape[0], queries.shape[0]), dtype=torch.float32)


@library.op(_MODULES, around=_in_range)
def _ksg_counts(
    queries: Tensor,
    keys: Tensor,
    rotation: Tensor,
    widths: list[int],
    variances: Tensor,
    pairs: Tensor,
    radius: Tensor,
    rotated: bool,
    backend: str,
) -> Tensor:
    return queries.new_empty((pairs.shape[0], 2, queries.shape[0]), dtype=torch.int64)


@library.op(_MODULES, around=_in_range)
def _ksg_radius_and_counts(
    queries: Tensor,
    keys: Tensor,
    rotation: Tensor,
    widths: list[int],
    variances: Tensor,
    pairs: Tensor,
    rotated: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    shape = (pairs.shape[0], queries.shape[0])
    radius = queries.new_empty(shape, dtype=torch.float32)
    return radius, queries.new_empty((shape[0], 2, shape[1]), dtype=torch.int64)
