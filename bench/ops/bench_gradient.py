"""Loss and gradient for given neighbors: ours beside the closed form and autograd in torch.

Random neighbors. Rates count the two products that the gradient needs.
"""

from __future__ import annotations

import torch
from contest import Contender, product
from registry import Shape
from torch import Tensor

from ndm_fast import ops
from ndm_fast.geometry import objective, reference


class Gradient:
    """Arguments of one call, and who computes it."""

    def __init__(self, shape: Shape) -> None:
        generator = torch.Generator().manual_seed(shape.d)
        self.queries, self.keys = (
            torch.randn(n, shape.d, generator=generator) for n in (shape.queries, shape.keys)
        )
        size = (len(shape.widths), shape.queries)
        self.index = torch.randint(shape.keys, size, generator=generator)
        self.rotation = torch.linalg.qr(torch.randn(shape.d, shape.d, generator=generator))[0]
        self.widths = shape.widths

    def ours(self) -> objective.Objective:
        return ops.loss_and_gradient(self.queries, self.keys, self.index, self.rotation, self.widths)

    def closed_form(self, dtype: torch.dtype = torch.float32) -> objective.Objective:
        rotation = self.rotation.to(dtype)
        arguments = (self.queries, self.keys, self.index, rotation, self.widths)
        return objective.loss_and_gradient(*arguments, "euclidean")

    def autograd(self) -> Tensor:
        """[d, d], as the published scheme has it."""
        rotation = self.rotation.clone().requires_grad_()
        reference.mean_distance(self.queries, self.keys[self.index], rotation, self.widths).backward()
        assert rotation.grad is not None
        return rotation.grad

    def check(self) -> None:
        """Loss and gradient against fp64."""
        found, exact = self.ours(), self.closed_form(torch.float64)
        torch.testing.assert_close(found.by_subspace.double(), exact.by_subspace, rtol=1e-5, atol=0)
        largest = float(exact.gradient.abs().max())
        torch.testing.assert_close(found.gradient.double(), exact.gradient, rtol=0, atol=1e-5 * largest)


def bench_gradient(contest, shape: Shape) -> None:
    case = Gradient(shape)
    case.check()
    work = 4 * shape.queries * shape.d**2
    contest(
        shape._asdict(),
        Contender(case.ours, work),
        ceiling=product(1024),
        peers={
            "torch closed form": Contender(case.closed_form, work),
            "torch autograd": Contender(case.autograd, work),
        },
    )
