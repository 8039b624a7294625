"""The published training scheme in eager torch, as a baseline: nothing of ours in it.

Per step: rotate all keys, distances to blocks of 16,384 keys, nearest neighbor per subspace, mean distance,
backward through ``torch.nn.utils.parametrizations.orthogonal`` (matrix exponential), Adam.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

KEY_BLOCK = 16384


class PublishedTrainer:
    """NDM as its authors run it (Huang & Hahn 2025), one step at a time.

    Args:
        width: of the activations.
        widths: of the subspaces.
        lr: Adam's rate.
    """

    def __init__(self, width: int, widths: Sequence[int], lr: float = 3e-4) -> None:
        self.widths = list(widths)
        self._layer = nn.utils.parametrizations.orthogonal(
            nn.Linear(width, width, bias=False), orthogonal_map="matrix_exp"
        )
        with torch.no_grad():
            self._layer.weight = torch.eye(width)
        self._adam = torch.optim.Adam(self._layer.parameters(), lr=lr)

    @property
    def rotation(self) -> Tensor:
        """[d, d], rows times this are rotated."""
        return self._layer.weight.detach()

    def step(self, queries: Tensor, keys: Tensor) -> float:
        """One step on [Q, d] queries and [K, d] keys; returns the loss."""
        rotation = self._layer.weight
        index = self._nearest(queries, keys, rotation.detach())
        distances = [
            torch.linalg.vector_norm((queries - keys[rows]) @ basis, dim=1).mean()
            for rows, basis in zip(index, rotation.split(self.widths, 1), strict=True)
        ]
        loss = torch.stack(distances).mean()
        self._adam.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self._layer.parameters(), 100.0)
        self._adam.step()
        return float(loss.detach())

    @torch.no_grad()
    def _nearest(self, queries: Tensor, keys: Tensor, rotation: Tensor) -> Tensor:
        """[S, Q] row of the nearest key in each subspace."""
        query_parts = (queries @ rotation).split(self.widths, 1)
        best = torch.full((len(self.widths), len(queries)), torch.inf)
        index = torch.zeros(best.shape, dtype=torch.int64)
        for start in range(0, len(keys), KEY_BLOCK):
            key_parts = (keys[start : start + KEY_BLOCK] @ rotation).split(self.widths, 1)
            for s, (query_part, key_part) in enumerate(zip(query_parts, key_parts, strict=True)):
                distance, row = torch.cdist(query_part, key_part).min(1)
                nearer = distance < best[s]
                best[s] = torch.where(nearer, distance, best[s])
                index[s] = torch.where(nearer, row + start, index[s])
        return index
