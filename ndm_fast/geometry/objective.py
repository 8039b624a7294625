"""The loss of NDM and its gradient in closed form, without an autograd graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ndm_fast.geometry.columns import equal_width_runs

_CACHED_ELEMENTS = 1 << 19
"""Elements of the differences to neighbors that are made at once on a CPU: 2 MB, or they leave the cache."""


class Objective(NamedTuple):
    """Loss of one batch of queries, per subspace, and its gradient."""

    by_subspace: Tensor
    """[S] mean distance (euclidean), its mean logarithm, or mean ``1 - cos`` (cosine) to the neighbors."""
    gradient: Tensor
    """[d, d] gradient of the loss with respect to the rotation."""


def loss_weights(widths: Sequence[int], *, by_width: bool, device: torch.device | str = "cpu") -> Tensor:
    """[S] fp64 weights that turn means per subspace into the loss: equal, or by width."""
    shares = torch.tensor(widths, dtype=torch.float64, device=device)
    return shares / shares.sum() if by_width else torch.full_like(shares, 1 / len(widths))


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
    """Loss and gradient for given neighbors.

    Euclidean, with ``delta = q - n_s(q)`` and ``r = delta R_s``: ``dL/dR_s = 1/(S Q) sum_q delta' r / |r|``
    (docs/method.md). Cosine, with unit vectors ``u = q R_s / |q R_s|`` and ``v = n R_s / |n R_s|``:
    ``dL/dR_s = -p_s/(d Q) sum_q q' (v - cos u) / |q R_s| + n' (u - cos v) / |n R_s|``. A zero distance, or a
    zero vector, contributes nothing.

    With ``log_floor``, ``f_s``, the loss is ``sum_s p_s/d mean_q log sqrt(|r|^2 + f_s^2)`` and its gradient
    ``p_s/(d Q) sum_q delta' r / (|r|^2 + f_s^2)``. Up to a constant that is the nearest-neighbor estimate of
    the sum of the subspaces' entropies (Kozachenko & Leonenko 1987), which is least where they share the
    least information, whatever their scales (docs/method.md).

    Args:
        queries: [Q, d]; keys: [K, d]; index: [S, Q] int64, the row of ``keys`` that is nearest.
        rotation: [d, d], in whose dtype all is computed.
        counted: [S, Q] bool, the neighbors that contribute; default all. The means are over Q anyhow, so
            that parts of them, each from the rank that has the rows, add up.
        log_floor: [S] distances from 0 up, for the loss of logarithms; euclidean only.
    """
    queries = queries.to(rotation.dtype)
    gradient = torch.empty_like(rotation, memory_format=torch.contiguous_format)
    losses = []
    by_width = metric == "cosine" or log_floor is not None
    together = max(1, _CACHED_ELEMENTS // queries.numel()) if rotation.device.type == "cpu" else len(widths)
    for subspaces, columns in equal_width_runs(widths, together):
        count, width = subspaces.stop - subspaces.start, widths[subspaces.start]
        weight = width / sum(widths) if by_width else 1 / len(widths)
        neighbors = keys[index[subspaces]].to(rotation.dtype)
        basis = rotation[:, columns].unflatten(1, (count, width)).transpose(0, 1)
        here = None if counted is None else counted[subspaces].to(rotation.dtype)
        if log_floor is not None:
            distance, raw = _log(queries, neighbors, basis, here, log_floor[subspaces].to(rotation.dtype))
        else:
            part = _cosine if metric == "cosine" else _euclidean
            distance, raw = part(queries, neighbors, basis, here)
        losses.append(distance.mean(1))
        into = gradient[:, columns].unflatten(1, (count, width))
        torch.mul(raw.transpose(0, 1), weight / queries.shape[0], out=into)
    return Objective(torch.cat(losses), gradient)


def _euclidean(
    queries: Tensor, neighbors: Tensor, basis: Tensor, here: Tensor | None
) -> tuple[Tensor, Tensor]:
    """[s, Q] distances and [s, d, p] sums over queries of their gradients; ``here`` [s, Q] is 1 or 0."""
    delta = queries - neighbors
    if here is not None:
        delta = torch.where(here[..., None] > 0, delta, 0)  # also of NaN, and zero contributes no gradient
    projected = delta @ basis
    distance = torch.linalg.vector_norm(projected, dim=2)
    return distance, delta.transpose(1, 2) @ over_norm(projected, distance)


def _log(
    queries: Tensor, neighbors: Tensor, basis: Tensor, here: Tensor | None, floor: Tensor
) -> tuple[Tensor, Tensor]:
    """[s, Q] logarithms of distances and [s, d, p] sums over queries of their gradients; ``floor`` [s]."""
    delta = queries - neighbors
    projected = delta @ basis
    squared = projected.square().sum(2) + floor.square()[:, None]
    squared = torch.where(squared == 0, 1, squared)  # a copy without a floor: nothing to lower; NaN stays
    scale = squared.reciprocal() if here is None else here / squared
    logarithm = squared.log() / 2
    return logarithm if here is None else logarithm * here, delta.transpose(1, 2) @ (
        projected * scale[..., None]
    )


def _cosine(queries: Tensor, neighbors: Tensor, basis: Tensor, here: Tensor | None) -> tuple[Tensor, Tensor]:
    """[s, Q] ``1 - cos`` and [s, d, p] sums over queries of their gradients; ``here`` [s, Q] is 1 or 0."""
    query_part, key_part = queries @ basis, neighbors @ basis
    query_norm = torch.linalg.vector_norm(query_part, dim=2)
    key_norm = torch.linalg.vector_norm(key_part, dim=2)
    if here is not None:
        query_norm, key_norm = query_norm * here, key_norm * here
    u, v = over_norm(query_part, query_norm), over_norm(key_part, key_norm)
    cosine = (u * v).sum(2)
    by_query = over_norm(v - cosine[..., None] * u, query_norm)
    by_key = over_norm(u - cosine[..., None] * v, key_norm)
    distance = (1 if here is None else here) - cosine
    return distance, -(queries.T @ by_query + neighbors.transpose(1, 2) @ by_key)


def over_norm(rows: Tensor, norm: Tensor) -> Tensor:
    """Rows [..., p] over their norms [...]: 0 for a norm of 0, NaN for NaN."""
    return torch.where(
        norm[..., None] == 0, 0, rows / norm.clamp_min(torch.finfo(norm.dtype).tiny)[..., None]
    )
