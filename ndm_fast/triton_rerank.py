"""The exact pass of a search in half precision, over the few keys that are nearest by the rotated copy.

Shapes and names as in ``ndm_fast.triton_ops``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ndm_fast import gpu_frame, gpu_search
from ndm_fast.gpu_frame import Frame, Search
from ndm_fast.objective import equal_width_runs

_TOLERANCE = 1e-2
"""How much farther than the nearest a neighbour may be (design section 3)."""


class Listed(NamedTuple):
    """Queries of each subspace that a launch looks at."""

    numbers: Tensor
    """[S, Q] int32, of which the first few count."""
    counts: Tensor
    """[S] int32, how many."""


def rerank(
    frame: Frame,
    keys: Tensor,
    candidates: Tensor,
    widths: Sequence[int],
    search: Search,
    only: Listed | None = None,
) -> tuple[Tensor, Tensor]:
    """Nearest of the candidates [S, Q, slots] by their raw rows: [S, Q] fp64 and its index.

    Args:
        only: leave all other queries unwritten.
    """
    from ndm_fast.kernels import rerank, tuning

    best = torch.empty(candidates.shape[:2], dtype=torch.float64, device=keys.device)
    index = torch.empty(candidates.shape[:2], dtype=torch.int64, device=keys.device)
    slots = candidates.shape[2]
    double = search.cosine or gpu_frame.capability(keys.device) in tuning.FP64_IS_FAST
    # A depth of 1 is compiled in, leaves no loop, and then triton 3.6 fails (see kernels/rerank.py).
    double &= len(frame.rotation) > 1
    block = tuning.RERANK_ROWS // slots
    for subspaces, columns in equal_width_runs(widths):
        count = subspaces.stop - subspaces.start
        width = (columns.stop - columns.start) // count
        turn, exact = frame.rotation[:, columns], frame.exact[:, columns]
        listed = (index, index) if only is None else (only.numbers[subspaces], only.counts[subspaces])
        rerank.rerank_kernel[(-(-len(frame.raw) // block), count)](
            *(frame.raw, frame.raw.stride(0), len(frame.raw), keys, keys.stride(0)),
            *(turn, turn.stride(0), len(turn), exact, exact.stride(0)),
            *(candidates[subspaces], *listed, best[subspaces], index[subspaces]),
            WIDTH=width, P=gpu_frame.power_of_two(min(32, max(16, width))), QUERY_BLOCK=block,
            SLOT_COUNT=slots, DEPTH_BLOCK=tuning.RERANK_DEPTH, LISTED=only is not None, DOUBLE=double,
            COSINE=search.cosine, num_warps=4, **tuning.OPTIONS,
        )  # fmt: skip
    return best, index


def settle(
    frame: Frame,
    keys: Tensor,
    near: Tensor,
    candidates: Tensor,
    widths: Sequence[int],
    search: Search,
) -> Tensor:
    """[S, Q] the candidate to take, -1 where there is none; raw rows decide only where the copy cannot.

    Rounding moves a key by ``u |x|``, and one at distance r has ``|x| <= |q| + r``; rounding the rotation
    moves a difference of norm D over all columns by about ``u D sqrt(p / d)`` in p of them (errors of random
    signs; twice their size). So the distance by the copy is off from the true one by no more than ``e``, the
    sum of ``u (2 |q| + r)`` and that. Where no other candidate's can be below ``(r + e) / 1.01`` of the
    nearest, that is near enough.

    Args:
        near: [S, Q, slots] fp64 scaled distances by the copy, inf for none; candidates: [S, Q, slots].
    """
    unit, sizes = gpu_search.rounding_of(keys.dtype), _sizes(frame, widths)
    shares = [math.sqrt(width / sum(widths)) for width in widths]
    whole = torch.linalg.vector_norm(sizes, dim=0)
    if search.cosine:  # of unit vectors, both of which the rotation's rounding turns
        turned = torch.stack([2 * share * whole for share in shares]) / sizes
        sizes = torch.ones_like(sizes)
    else:
        apart = whole + torch.maximum(whole, frame.keys.typical_norm)
        scales = frame.keys.scales[:, None]
        turned = torch.stack([share * apart for share in shares]) * scales
        sizes = sizes * scales
    underflow = gpu_search.underflow_errors(frame.keys.scales, widths)[:, None, None]
    error = unit * (2 * sizes[..., None] + near + turned[..., None]) + underflow
    least = near.amin(2, keepdim=True)
    first = torch.where(near == least, candidates, gpu_frame.NO_KEY).amin(2)
    farther = 1 + _TOLERANCE
    if search.cosine:  # where ``near`` is the distance of unit vectors, the root of twice 1 - cos
        farther = math.sqrt(farther)
    reach = (near + error).amin(2, keepdim=True) / farther
    rivals = ((near - error < reach) & near.isfinite()).sum(2)
    found = least[..., 0].isfinite()
    unsure = found & (rivals > 1)
    only = _listed(unsure)
    _, decided = rerank(frame, keys, candidates, widths, search, only)
    return torch.where(unsure, decided, torch.where(found, first, -1))


def _sizes(frame: Frame, widths: Sequence[int]) -> Tensor:
    """[S, Q] norms of the centred queries."""
    parts = []
    for subspaces, columns in equal_width_runs(widths):
        run = frame.rotated[:, columns].unflatten(1, (-1, widths[subspaces.start]))
        parts.append(torch.linalg.vector_norm(run, dim=2).T)
    return torch.cat(parts)


def _listed(chosen: Tensor) -> Listed:
    """The chosen of each row, in order; all of it on the device."""
    places = chosen.cumsum(1) - 1
    beyond = chosen.shape[1]
    numbers = torch.zeros(len(chosen), beyond + 1, dtype=torch.int32, device=chosen.device)
    every = torch.arange(beyond, dtype=torch.int32, device=chosen.device).expand_as(chosen)
    numbers.scatter_(1, torch.where(chosen, places, beyond), every)
    return Listed(numbers[:, :-1].contiguous(), chosen.sum(1, dtype=torch.int32))
