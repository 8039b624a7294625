"""Products in fp32 as training makes them: ours beside those of torch.

"keys": raw fp16 rows, centred, times the rotation; torch converts and centres a block at a time. "update":
``R'G``. Ours are taken where ``ops.cpu.product.pays`` says so. numpy is left out: its idle threads
keep a core busy for some 20 ms after each product, and the next contender waits.
"""

from __future__ import annotations

import pytest
import torch
from contest import Contender, product
from registry import Shape
from torch import Tensor

from ndm_fast.geometry import centring
from ndm_fast.ops.cpu import product as compiled

CHECKED = 64


class Product:
    """Factors of one product, by both."""

    def __init__(self, shape: Shape, kind: str) -> None:
        torch.manual_seed(0)
        self.keys = kind == "keys"
        rows = shape.keys if self.keys else shape.d
        self.left, self.right = torch.randn(rows, shape.d), torch.randn(shape.d, shape.d)
        self.origin = torch.randn(shape.d)
        self.rows, self.work = self.left.half(), 2 * rows * shape.d**2

    def ours(self) -> Tensor:
        if self.keys:
            return compiled.product(self.rows, self.right, origin=self.origin)
        return compiled.product(self.left, self.right, transposed=True)

    def torchs(self) -> Tensor:
        if self.keys:
            return centring.rotate_centred(self.rows, self.right, self.origin)
        return self.left.T @ self.right

    def check(self) -> None:
        """Some rows against fp64."""
        left = self.rows.double() - self.origin.double() if self.keys else self.left.double().T
        exact = left[:CHECKED] @ self.right.double()
        size = left[:CHECKED].abs() @ self.right.double().abs()
        excess = float(((self.ours()[:CHECKED].double() - exact).abs() / size).max())
        assert excess <= 1e-6, f"entries are off by {excess:.1e} of what is added up: nothing is timed"


@pytest.mark.parametrize("kind", ["keys", "update"])
def bench_product(contest, shape: Shape, kind: str) -> None:
    case = Product(shape, kind)
    case.check()
    peers = {"torch": Contender(case.torchs, case.work)}
    contest(
        {"kind": kind, **shape._asdict()}, Contender(case.ours, case.work), ceiling=product(2048), peers=peers
    )
