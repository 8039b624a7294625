"""Adam on the Lie algebra: ours beside the same in torch, eager and compiled. Rates count the bytes moved."""

from __future__ import annotations

import torch
from contest import Contender, copy
from registry import TINY, Shape
from torch import Tensor

from ndm_fast import ops
from ndm_fast.geometry import reference

BETAS, FACTORS = (0.9, 0.999), (1e-3, 1e-8)
PASSES = 7
"""Reads and writes of a [d, d] matrix: product (with its transpose, 2), both moments (4), update (1)."""


class Update:
    """The product of one step; every contender moves on moments of its own."""

    def __init__(self, shape: Shape) -> None:
        self._product = torch.randn(shape.d, shape.d, generator=torch.Generator().manual_seed(shape.d))
        self._shape = shape
        self.work = PASSES * 4 * shape.d**2

    def check(self) -> None:
        """Update and moments against fp64, over two steps."""
        moments = torch.zeros(2, *self._product.shape)
        exact = moments.double()
        for _ in range(2):
            found = ops.lie_update(self._product, *moments, *FACTORS, BETAS)
            expected = reference.lie_update(self._product.double(), *exact, *FACTORS, BETAS)
            torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(moments.double(), exact, rtol=1e-4, atol=1e-9)

    def contender(self, update=ops.lie_update) -> Contender:
        moments = torch.zeros(2, *self._product.shape)

        def run() -> Tensor:
            return update(self._product, *moments, *FACTORS, BETAS)

        return Contender(run, self.work)

    def peers(self) -> dict[str, Contender]:
        found = {"torch": self.contender(reference.lie_update)}
        if self._shape not in TINY.shapes:
            compiled = torch.compile(reference.lie_update, dynamic=False)
            found["torch.compile"] = self.contender(compiled)
        return found


def bench_lie_update(contest, shape: Shape) -> None:
    case = Update(shape)
    case.check()
    about = {"d": shape.d}
    contest(about, case.contender(), ceiling=copy(), peers=case.peers(), unit="GB/s")
