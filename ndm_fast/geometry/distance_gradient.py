"""Gradients of distances to given neighbors, in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ndm_fast.geometry.columns import equal_width_runs
from ndm_fast.geometry.objective import over_norm

_ON_CPU, _ELSEWHERE = 1 << 19, 1 << 25
"""Elements of the differences to neighbors that are made at once."""


class Form(NamedTuple):
    """What distances are of."""

    metric: str
    keys_rotated: bool
    queries_rotated: bool


class Gradients(NamedTuple):
    """Of ``sum(weight * distance)``; None where not wanted."""

    queries: Tensor | None
    """[Q, d]"""
    keys: Tensor | None
    """[K, d]"""
    rotation: Tensor | None
    """[d, d]"""


def distance_gradients(
    weight: Tensor,
    queries: Tensor,
    keys: Tensor,
    rotation: Tensor,
    widths: Sequence[int],
    index: Tensor,
    form: Form,
    wanted: Sequence[bool],
) -> Gradients:
    """Gradients of the distances to the k neighbors named, weighted and summed.

    With ``x = q R_s`` and ``y = n R_s``: euclidean, ``d|x - y|/dx = (x - y) / |x - y|``; cosine, with unit
    vectors u and v, ``d(1 - u.v)/dx = -(v - (u.v) u) / |x|``; y likewise. A distance of 0, or a zero vector,
    contributes nothing (docs/method.md).

    Args:
        weight: [S, Q, k]. queries: [Q, d]. keys: [K, d]. rotation: [d, d]. index: [S, Q, k] rows of the keys.
        wanted: whether the gradients of queries, keys and rotation are.
    """
    # The directions of loud rows cancel in the gradient of a cosine: there fp32 keeps two digits.
    dtype = torch.float64 if form.metric == "cosine" else weight.dtype
    weight = weight.to(dtype)
    q, turn = queries.to(dtype), rotation.to(dtype)
    by_query, by_key = torch.zeros_like(q), torch.zeros_like(keys, dtype=dtype)
    by_rotation = []
    most = _ON_CPU if weight.device.type == "cpu" else _ELSEWHERE
    for subspaces, columns in equal_width_runs(widths, max(1, most // (q.numel() * index.shape[2]))):
        size = subspaces.stop - subspaces.start, widths[subspaces.start]
        basis = turn[:, columns].unflatten(1, size).transpose(0, 1)  # [s, d, p]
        rows = index[subspaces]
        n = keys[rows].to(dtype)  # [s, Q, k, d]
        of_query, of_key, of_basis = _parts(weight[subspaces], q, n, basis, form, columns, size)
        if wanted[0] and form.queries_rotated:
            by_query[:, columns] = of_query.transpose(0, 1).flatten(1)
        elif wanted[0]:
            by_query = by_query + (of_query @ basis.transpose(1, 2)).sum(0)
        if wanted[1] and form.keys_rotated:
            by_key[:, columns] = _scattered(of_key, rows, len(keys)).transpose(0, 1).flatten(1)
        elif wanted[1]:
            spread = of_key.flatten(1, 2) @ basis.transpose(1, 2)  # [s, Q k, d]
            by_key.index_add_(0, rows.flatten(), spread.flatten(0, 1))
        by_rotation.append(of_basis.transpose(0, 1).flatten(1))
    found = by_query, by_key, torch.cat(by_rotation, 1)
    return Gradients(*(each if wish else None for each, wish in zip(found, wanted, strict=True)))


def _parts(
    weight: Tensor,
    queries: Tensor,
    neighbors: Tensor,
    basis: Tensor,
    form: Form,
    columns: slice,
    size: tuple[int, int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by rotated queries [s, Q, p], rotated neighbors [s, Q, k, p], and the basis [s, d, p]."""
    if form.metric == "euclidean" and not form.keys_rotated:
        delta = (queries[:, None] - neighbors).flatten(1, 2)  # subtracted first: nothing cancels
        apart = delta @ basis
        scaled = weight.flatten(1)[..., None] * over_norm(apart, torch.linalg.vector_norm(apart, dim=2))
        of_query = scaled.unflatten(1, weight.shape[1:])
        return of_query.sum(2), -of_query, delta.transpose(1, 2) @ scaled
    x = _columns(queries, columns, size) if form.queries_rotated else queries @ basis  # [s, Q, p]
    if form.keys_rotated:
        here = torch.arange(size[0], device=weight.device)
        y = neighbors[..., columns].unflatten(3, size)[here, :, :, here]  # [s, Q, k, p]
    else:
        y = (neighbors.flatten(1, 2) @ basis).unflatten(1, weight.shape[1:])
    x = x[:, :, None].expand_as(y)
    side = _by_cosine if form.metric == "cosine" else _by_difference
    of_query, of_key = (weight[..., None] * each for each in side(x, y))
    of_basis = torch.zeros_like(basis)
    if not form.queries_rotated:
        of_basis = of_basis + queries.T @ of_query.sum(2)
    if not form.keys_rotated:
        of_basis = of_basis + neighbors.flatten(1, 2).transpose(1, 2) @ of_key.flatten(1, 2)
    return of_query.sum(2), of_key, of_basis


def _by_difference(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    unit = over_norm(x - y, torch.linalg.vector_norm(x - y, dim=-1))
    return unit, -unit


def _by_cosine(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    x_norm, y_norm = (torch.linalg.vector_norm(each, dim=-1) for each in (x, y))
    u, v = over_norm(x, x_norm), over_norm(y, y_norm)
    cosine = (u * v).sum(-1, keepdim=True)
    return -over_norm(v - cosine * u, x_norm), -over_norm(u - cosine * v, y_norm)


def _columns(rows: Tensor, columns: slice, size: tuple[int, int]) -> Tensor:
    return rows[:, columns].unflatten(1, size).transpose(0, 1)


def _scattered(parts: Tensor, rows: Tensor, keys: int) -> Tensor:
    """[s, K, p] sums over the neighbors [s, Q, k, p] that are each key."""
    count, width = parts.shape[0], parts.shape[-1]
    places = rows + keys * torch.arange(count, device=rows.device)[:, None, None]
    out = parts.new_zeros(count * keys, width).index_add_(0, places.flatten(), parts.reshape(-1, width))
    return out.view(count, keys, width)
