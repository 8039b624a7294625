"""Which subspaces merge, given how much information they share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merge_scores(information: Tensor, widths: Sequence[int]) -> Tensor:
    """[S, S] mutual information over the sum of the two widths, nats per dimension."""
    sizes = torch.tensor(widths, dtype=information.dtype)
    return information / (sizes[:, None] + sizes)


def choose_pairs(
    scores: Tensor, threshold: float, *, target_subspaces: int | None = None
) -> list[tuple[int, int]]:
    """Disjoint pairs to merge: highest scores first, above the threshold, at most ``max(1, S // 8)``.

    Args:
        scores: [S, S] symmetric.
        target_subspaces: never merge below this many.
    """
    subspaces = scores.shape[0]
    allowed = max(1, subspaces // 8)
    if target_subspaces is not None:
        allowed = min(allowed, max(0, subspaces - target_subspaces))
    ranked = sorted(
        ((float(scores[a, b]), a, b) for a in range(subspaces) for b in range(a + 1, subspaces)),
        key=lambda entry: (-entry[0], entry[1:]),
    )
    chosen: list[tuple[int, int]] = []
    used: set[int] = set()
    for score, a, b in ranked:
        if len(chosen) == allowed or not score > threshold:
            break
        if not {a, b} & used:
            chosen.append((a, b))
            used |= {a, b}
    return chosen
