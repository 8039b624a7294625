"""Triton ops of the KSG estimate; ``triton_ops`` has them too. Shapes as in ``ndm_fast.reference``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ndm_fast import gpu_frame
from ndm_fast.centring import sample_mean
from ndm_fast.full_fp32 import full_fp32
from ndm_fast.objective import equal_width_runs

_DISTANCE_BYTES = 1 << 25
"""Distances of the KSG estimate held at once: what a large card's second-level cache holds."""


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
    """[P, Q] fp32 ``min_k max(D_a, D_b)`` for every pair of subspaces and query.

    Args:
        queries, keys, rotation, widths: as for :func:`nearest_neighbors`.
        rotated: queries and keys are rotated already.
        variances: [S] total variance of each subspace; where it is 0, so are the distances.
        pairs: [P, 2] int64 numbers of subspaces.
    """
    from ndm_fast.kernels import ksg, tuning

    radius = torch.empty(len(pairs), len(queries), device=queries.device)
    pairs = pairs.contiguous()
    for group, distances in _scaled_distances(queries, keys, rotation, widths, variances, rotated):
        part = torch.empty(len(pairs), distances.shape[1], device=queries.device)
        with gpu_frame.device_of(queries):
            ksg.radius_kernel[part.shape](
                *(distances, distances.shape[1], len(keys), pairs, part),
                **tuning.KSG_REDUCTIONS, **tuning.OPTIONS,
            )  # fmt: skip
        radius[:, group] = part
    return radius


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
    """[P, 2, Q] int64: keys strictly closer than ``radius`` [P, Q], in each subspace of each pair.

    Arguments as for :func:`ksg_radius`, whose result is the radius: both read distances made by one kernel,
    so the key that sets a radius is never below it.
    """
    from ndm_fast.kernels import ksg, tuning

    counts = torch.empty(len(pairs), 2, len(queries), dtype=torch.int64, device=queries.device)
    pairs = pairs.contiguous()
    for group, distances in _scaled_distances(queries, keys, rotation, widths, variances, rotated):
        limits = radius[:, group].float().contiguous()
        part = torch.empty(len(pairs), 2, distances.shape[1], dtype=torch.int64, device=queries.device)
        with gpu_frame.device_of(queries):
            ksg.counts_kernel[limits.shape](
                *(distances, distances.shape[1], len(keys), pairs, limits, part),
                **tuning.KSG_REDUCTIONS, **tuning.OPTIONS,
            )  # fmt: skip
        counts[:, :, group] = part
    return counts


def _scaled_distances(
    queries: Tensor, keys: Tensor, rotation: Tensor, widths: Sequence[int], variances: Tensor, rotated: bool
) -> Iterator[tuple[slice, Tensor]]:
    """Groups of queries and their [S, q, K] fp32 distances over the root of each subspace's variance."""
    from ndm_fast.kernels import ksg, tuning

    origin, turn = sample_mean(keys), rotation.detach().float()
    centred = (rows.detach().float() - origin for rows in (queries, keys))
    with full_fp32():
        query_columns, key_columns = ((rows if rotated else rows @ turn).T.contiguous() for rows in centred)
    positive = variances.detach().double().clamp_min(0)
    inverse = torch.where(positive > 0, 1 / positive, 0).float()
    shape = tuning.KSG_DISTANCES
    size = max(1, _DISTANCE_BYTES // (4 * len(widths) * len(keys)))
    for start in range(0, len(queries), size):
        group = slice(start, min(start + size, len(queries)))
        count = group.stop - start
        distances = torch.empty(len(widths), count, len(keys), device=keys.device)
        for subspaces, columns in equal_width_runs(widths):
            run = subspaces.stop - subspaces.start
            part, other = query_columns[columns, group], key_columns[columns]
            with gpu_frame.device_of(queries):
                blocks = (-(-len(keys) // shape["KEY_BLOCK"]), -(-count // shape["QUERY_BLOCK"]), run)
                ksg.distances_kernel[blocks](
                    *(part, part.stride(0), count, other, other.stride(0), len(keys)),
                    *(inverse[subspaces], distances[subspaces]),
                    WIDTH=(columns.stop - columns.start) // run, **shape, **tuning.OPTIONS,
                )  # fmt: skip
        yield group, distances
