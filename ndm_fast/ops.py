"""Public ops: check the arguments, choose a backend, run it as a ``torch.library`` op."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from ndm_fast import backends, cpu, cuda, reference, triton_ops
from ndm_fast.errors import InputError
from ndm_fast.reference import Neighbors

_MODULES: dict[str, ModuleType] = {
    "reference": reference,
    "cpu": cpu,
    "triton": triton_ops,
    "cuda": cuda,
}
_QUERIES_AT_ONCE = 16
"""Queries for which the reference backend materialises all distances to the keys."""


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
        precision: least precision of the pass that proposes neighbours, ``"fp32"`` or ``"bf16"``. With bf16 a
            neighbour may be 1 % farther than the nearest (fp32: 1e-6). The distance returned is always
            computed anew, from the difference of the two rows.
        keys_rotated, queries_rotated: what is rotated already; the queries only where the keys are.
        backend: see ``ndm_fast.backends``.
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


def ksg_radius(
    queries: Tensor,
    keys: Tensor,
    rotation: Tensor,
    widths: Sequence[int],
    variances: Tensor,
    pairs: Tensor,
    *,
    rotated: bool = False,
    backend: str | None = None,
) -> Tensor:
    """[P, Q] fp32 ``min_k max(D_a, D_b)`` for every pair of subspaces and query.

    ``D_s`` is the distance in subspace s over the square root of that subspace's total variance.

    Args:
        queries, keys, rotation, widths: as for :func:`nearest_neighbors`.
        variances: [S] total variance of each subspace.
        pairs: [P, 2] int64, two different subspaces each.
        rotated: queries and keys are rotated already.
    """
    _check(queries, keys, rotation, widths, True)
    _check_pairs(variances, pairs, widths)
    chosen = backends.choose(queries.device, backend).name
    return _ksg_radius(queries, keys, rotation, list(widths), variances, pairs, rotated, chosen)


def ksg_counts(
    queries: Tensor,
    keys: Tensor,
    rotation: Tensor,
    widths: Sequence[int],
    variances: Tensor,
    pairs: Tensor,
    radius: Tensor,
    *,
    rotated: bool = False,
    backend: str | None = None,
) -> Tensor:
    """[P, 2, Q] int64: keys strictly closer than ``radius`` [P, Q], in each subspace of each pair.

    Arguments as for :func:`ksg_radius`; use the same backend for both.
    """
    _check(queries, keys, rotation, widths, False)
    _check_pairs(variances, pairs, widths)
    if radius.shape != (len(pairs), len(queries)):
        raise InputError(f"radius has shape {list(radius.shape)}: give [P, Q] = {[len(pairs), len(queries)]}")
    chosen = backends.choose(queries.device, backend).name
    return _ksg_counts(queries, keys, rotation, list(widths), variances, pairs, radius, rotated, chosen)


def ksg_radius_and_counts(
    queries: Tensor,
    keys: Tensor,
    rotation: Tensor,
    widths: Sequence[int],
    variances: Tensor,
    pairs: Tensor,
    *,
    rotated: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``radius`` [P, Q] of :func:`ksg_radius` and, for it, ``counts`` [P, 2, Q] of :func:`ksg_counts`.

    Arguments as there; faster than both one after the other where a backend has it in one op.
    """
    _check(queries, keys, rotation, widths, True)
    _check_pairs(variances, pairs, widths)
    chosen = backends.choose(queries.device, backend).name
    return _ksg_radius_and_counts(queries, keys, rotation, list(widths), variances, pairs, rotated, chosen)


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
    found = _MODULES[backend].nearest_neighbors(queries, keys, rotation, widths, **form)
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


@torch.library.custom_op("ndm_fast::ksg_radius", mutates_args=())
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
    if backend != "reference":
        return _MODULES[backend].ksg_radius(
            queries, keys, rotation, widths, variances, pairs, rotated=rotated
        )
    parts = queries.split(_QUERIES_AT_ONCE)
    return torch.cat(
        [
            reference.ksg_radius(part, keys, rotation, widths, variances, pairs, rotated=rotated)
            for part in parts
        ],
        dim=1,
    ).float()


@_ksg_radius.register_fake
def _(
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


@torch.library.custom_op("ndm_fast::ksg_counts", mutates_args=())
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
    if backend != "reference":
        return _MODULES[backend].ksg_counts(
            queries, keys, rotation, widths, variances, pairs, radius, rotated=rotated
        )
    parts = zip(queries.split(_QUERIES_AT_ONCE), radius.split(_QUERIES_AT_ONCE, dim=1), strict=True)
    return torch.cat(
        [
            reference.ksg_counts(part, keys, rotation, widths, variances, pairs, limit, rotated=rotated)
            for part, limit in parts
        ],
        dim=2,
    )


@_ksg_counts.register_fake
def _(
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


@torch.library.custom_op("ndm_fast::ksg_radius_and_counts", mutates_args=())
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
    if backend == "cpu":
        return cpu.ksg_radius_and_counts(queries, keys, rotation, widths, variances, pairs, rotated=rotated)
    arguments = (queries, keys, rotation, widths, variances, pairs)
    radius = _ksg_radius(*arguments, rotated, backend)
    return radius, _ksg_counts(*arguments, radius, rotated, backend)


@_ksg_radius_and_counts.register_fake
def _(
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
    _check(queries, keys, rotation, widths, check_finite)
    if metric not in ("euclidean", "cosine"):
        raise InputError(f"metric is {metric!r}: take euclidean or cosine")
    if precision not in ("fp32", "bf16"):
        raise InputError(f"precision is {precision!r}: take fp32 or bf16")


def _check(
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


def _check_pairs(variances: Tensor, pairs: Tensor, widths: Sequence[int]) -> None:
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
