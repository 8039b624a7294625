"""Plain-torch oracle of every op: slow, obvious, in float64, on any device.

Every fast op is tested against this file, and it is what runs where no compiled op is there.

Glossary (used in every docstring of the package): ``Q`` queries, ``K`` keys, ``d`` width of the
activations, ``S`` subspaces, ``p_s`` width of subspace ``s``, ``o_s`` its offset, ``P`` pairs.
Rotated activations are ``h @ rotation``; subspace ``s`` owns the columns ``[o_s, o_s + p_s)``.
Distances are plain (not squared) unless a name says ``squared``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

KEY_BLOCK = 8192
"""Keys handled at once; bounds the memory of the materialised distances."""

TIE_TOLERANCE = 16 * torch.finfo(torch.float64).eps
"""Two squared distances closer than this, relative to the squared norms, are a tie."""


class Neighbors(NamedTuple):
    """Nearest key of every query in every subspace."""

    distance: Tensor
    """[S, Q] distance to the nearest key inside the subspace."""
    index: Tensor  # type: ignore[assignment]  # shadows tuple.index, which nobody misses here
    """[S, Q] int64, row of ``keys`` that is nearest; ties go to the lowest index."""


def nearest_neighbors(
    queries: Tensor,
    keys: Tensor,
    rotation: Tensor,
    widths: Sequence[int],
    *,
    metric: str = "euclidean",
    keys_rotated: bool = False,
    queries_rotated: bool = False,
) -> Neighbors:
    """Nearest key of every query inside every subspace.

    Args:
        queries: [Q, d] raw activations.
        keys: [K, d] raw activations, or ``keys @ rotation`` where ``keys_rotated``.
        queries_rotated: the queries are rotated already, as the keys are.
        rotation: [d, d] orthogonal.
        widths: S widths that sum to d.
        metric: ``"euclidean"``, or ``"cosine"`` for which the distance is ``1 - cos`` (a zero vector has
            cosine 0 with everything).

    Returns:
        ``Neighbors`` with float64 distances.
    """
    rotation = rotation.double()
    keys = keys.double()
    rotated_queries = queries.double() if queries_rotated else queries.double() @ rotation
    best = torch.full((len(widths), len(queries)), torch.inf, dtype=torch.float64, device=queries.device)
    index = torch.zeros_like(best, dtype=torch.int64)
    # A common offset leaves euclidean distances alone and would cost digits in the expansion below.
    origin = keys.mean(0) if metric == "euclidean" else torch.zeros_like(keys[0])
    rotated_origin = origin if keys_rotated else origin @ rotation
    for start in range(0, len(keys), KEY_BLOCK):
        block = keys[start : start + KEY_BLOCK] - origin
        rotated_keys = block if keys_rotated else block @ rotation
        parts = zip(
            (rotated_queries - rotated_origin).split(list(widths), 1),
            rotated_keys.split(list(widths), 1),
            strict=True,
        )
        for s, (query_part, key_part) in enumerate(parts):
            squared, tolerance = _squared_distances(query_part, key_part, metric)
            block_best = squared.min(1).values
            first = (squared <= (block_best + tolerance)[:, None]).int().argmax(1)
            nearer = block_best < best[s] - tolerance
            best[s] = torch.where(nearer, block_best, best[s])
            index[s] = torch.where(nearer, first + start, index[s])
    form = {"keys_rotated": keys_rotated, "queries_rotated": queries_rotated}
    return Neighbors(distance_to(queries, keys, rotation, widths, index, metric=metric, **form), index)


def k_nearest_neighbors(
    queries: Tensor,
    keys: Tensor,
    rotation: Tensor,
    widths: Sequence[int],
    k: int,
    *,
    exclude: Tensor | None = None,
    metric: str = "euclidean",
    keys_rotated: bool = False,
    queries_rotated: bool = False,
) -> Neighbors:
    """The k nearest keys of every query inside every subspace, nearest first: ``Neighbors`` [S, Q, k].

    Args:
        exclude: [Q] int64, the key that is none of a query's neighbors (itself), or -1.

    Others as for :func:`nearest_neighbors`. What fp32 cannot tell apart comes in the order of the keys.
    """
    form: dict[str, Any] = {"keys_rotated": keys_rotated, "queries_rotated": queries_rotated}
    found = []
    every_key = torch.arange(len(keys), device=keys.device).expand(len(widths), -1)
    for q, query in enumerate(queries):
        # [S, K]: one query against every key, each difference on its own.
        distance = distance_to(
            query.expand_as(keys), keys, rotation, widths, every_key, metric=metric, **form
        )
        if exclude is not None and exclude[q] >= 0:
            distance[:, exclude[q]] = torch.inf
        index = distance.float().sort(stable=True, dim=1).indices[:, :k]
        found.append((distance.gather(1, index), index))
    return Neighbors(*(torch.stack(each, 1) for each in zip(*found, strict=True)))


def distance_to(
    queries: Tensor,
    keys: Tensor,
    rotation: Tensor,
    widths: Sequence[int],
    index: Tensor,
    *,
    metric: str = "euclidean",
    keys_rotated: bool = False,
    queries_rotated: bool = False,
) -> Tensor:
    """[S, Q] float64 distance of every query to the key ``index[s, q]`` in subspace ``s``.

    Computed from the difference of the two rows (for ``cosine``: from the two rows), so nothing cancels.
    Arguments as for :func:`nearest_neighbors`; ``index`` is [S, Q] int64.
    """
    rotation = rotation.double()
    distances = []
    for columns, rows in zip(_columns(widths), index, strict=True):
        basis, query, neighbor = rotation[:, columns], queries.double(), keys[rows].double()
        if metric == "euclidean" and not keys_rotated:
            difference = (query - neighbor) @ basis  # subtracted first: nothing cancels
            distances.append(torch.linalg.vector_norm(difference, dim=1))
            continue
        query_part = query[:, columns] if queries_rotated else query @ basis
        key_part = neighbor[:, columns] if keys_rotated else neighbor @ basis
        if metric == "cosine":
            distances.append(1 - (_unit(query_part) * _unit(key_part)).sum(1))
        else:
            distances.append(torch.linalg.vector_norm(query_part - key_part, dim=1))
    return torch.stack(distances)


def mean_distance(
    queries: Tensor,
    neighbors: Tensor,
    rotation: Tensor,
    widths: Sequence[int],
    *,
    metric: str = "euclidean",
) -> Tensor:
    """The loss of NDM for given neighbors, differentiable in ``rotation`` (Huang & Hahn 2025, section 3).

    Args:
        queries: [Q, d]; neighbors: [S, Q, d], the activation nearest to each query in each subspace.

    Returns:
        Scalar: for ``euclidean`` the mean over subspaces and queries of the distance; for ``cosine`` minus
        the mean cosine, subspaces weighted by width.
    """
    total = rotation.new_zeros(())
    for columns, rows in zip(_columns(widths), neighbors, strict=True):
        basis = rotation[:, columns]
        if metric == "cosine":
            cosine = (_unit(queries @ basis) * _unit(rows @ basis)).sum(1)
            total = total - basis.shape[1] * cosine.mean() / rotation.shape[0]
        else:
            total = total + torch.linalg.vector_norm((queries - rows) @ basis, dim=1).mean() / len(widths)
    return total


def scaled_distances(
    queries: Tensor,
    keys: Tensor,
    rotation: Tensor,
    widths: Sequence[int],
    variances: Tensor,
    *,
    rotated: bool = False,
) -> Tensor:
    """[S, Q, K] float64 distance in each subspace over the square root of that subspace's variance.

    ``variances`` is [S], the total variance of each subspace; a subspace without variance has distance 0
    to everything. ``rotated``: queries and keys are rotated already.
    """
    origin = keys.double().mean(0)
    centred = [rows.double() - origin for rows in (queries, keys)]
    query_parts, key_parts = (
        (rows if rotated else rows @ rotation.double()).split(list(widths), 1) for rows in centred
    )
    scaled = []
    for query_part, key_part, variance in zip(query_parts, key_parts, variances.double(), strict=True):
        # From differences, so that equal rows have distance 0 and not what an expansion rounds off.
        distance = torch.cdist(query_part, key_part, compute_mode="donot_use_mm_for_euclid_dist")
        scaled.append(distance / variance.sqrt() if variance > 0 else torch.zeros_like(distance))
    return torch.stack(scaled)


def ksg_radius(
    queries: Tensor,
    keys: Tensor,
    rotation: Tensor,
    widths: Sequence[int],
    variances: Tensor,
    pairs: Tensor,
    *,
    rotated: bool = False,
) -> Tensor:
    """[P, Q] distance to the nearest key in the joint space of each pair, in the maximum norm.

    ``radius = min_k max(D_a(q, k), D_b(q, k))`` with ``D`` as in :func:`scaled_distances`; ``pairs`` is
    [P, 2] int64. Kraskov, Stögbauer & Grassberger 2004, algorithm 1 with one neighbor.
    """
    scaled = scaled_distances(queries, keys, rotation, widths, variances, rotated=rotated)
    return torch.stack([torch.maximum(scaled[a], scaled[b]).min(1).values for a, b in pairs.tolist()])


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
) -> Tensor:
    """[P, 2, Q] int64: keys strictly closer than ``radius`` ([P, Q]) in each subspace of each pair."""
    scaled = scaled_distances(queries, keys, rotation, widths, variances, rotated=rotated)
    counts = [
        # In the radius's dtype: rounding keeps order, so the key that set the radius is never below it.
        torch.stack([(scaled[side].to(radius.dtype) < limit[:, None]).sum(1) for side in pair])
        for pair, limit in zip(pairs.tolist(), radius, strict=True)
    ]
    return torch.stack(counts)


def _columns(widths: Sequence[int]) -> list[slice]:
    offsets = [0]
    for width in widths:
        offsets.append(offsets[-1] + width)
    return [slice(start, stop) for start, stop in pairwise(offsets)]


def _unit(rows: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / torch.where(norm > 0, norm, 1)


def _squared_distances(query_part: Tensor, key_part: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """[Q, K] squared distances (cosine: ``2 - 2 cos``) and [Q] the size of their rounding errors."""
    if metric == "cosine":
        squared = 2 - 2 * _unit(query_part) @ _unit(key_part).T
        return squared, squared.new_full((len(query_part),), 2 * TIE_TOLERANCE)
    query_norms = query_part.square().sum(1)
    key_norms = key_part.square().sum(1)
    squared = query_norms[:, None] + key_norms - 2 * query_part @ key_part.T
    return squared.clamp_min_(0), TIE_TOLERANCE * (query_norms + key_norms.max())


def lie_update(
    product: Tensor | None,
    first: Tensor,
    second: Tensor,
    scale: float | Tensor,
    guard: float | Tensor,
    betas: tuple[float, float],
    half: bool = False,
) -> Tensor:
    """[d, d] Adam's update on the Lie algebra, ``U = -scale m / (sqrt(v) + guard)`` (docs/method.md).

    Args:
        product: [d, d] ``R'G`` of a rotation and its gradient, in any dtype; the tangent is ``R'G - G'R``.
            None leaves the moments as they are.
        first, second: [d, d] moments m and v of the tangent, moved on in place.
        scale, guard: learning rate and Adam's epsilon, with the bias corrections.
        betas: decay of m and of v.
        half: return the update in bf16.
    """
    fast, slow = betas
    if product is not None:
        product = product.to(first.dtype)
        tangent = product - product.T
        first.lerp_(tangent, 1 - fast)
        second.mul_(slow).addcmul_(tangent, tangent, value=1 - slow)
    update = (first / second.sqrt().add_(guard)).mul_(-scale)
    return update.bfloat16() if half else update
