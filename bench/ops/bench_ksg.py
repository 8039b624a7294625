"""KSG mutual information of all pairs: ours beside eager torch, which builds the [pairs, Q, K] tensors.

Twice: over rows that are rotated already, for both, and from raw ones, where both rotate the keys. Eager
torch works on as many pairs at once as fit in --memory-gb. Rates count the products, not the comparisons.
"""

from __future__ import annotations

import pytest
import torch
from contest import Contender, product
from registry import Shape
from torch import Tensor

from ndm_fast import ops
from ndm_fast.geometry import reference
from ndm_fast.train.merge.mutual_information import mutual_information

GOALS = {384: 60, 768: 150}
"""Times eager torch, from rotated rows, by width of the activations."""
CHECKED = 6


class Estimate:
    """The mutual information of all pairs of subspaces, which share a little of it."""

    def __init__(self, shape: Shape, form: str, memory_gb: float) -> None:
        torch.manual_seed(0)
        count, d = shape.queries + shape.keys, shape.d
        rows = torch.randn(count, d) + 0.3 * torch.randn(count, 1)
        self.queries, self.keys = rows[: shape.queries], rows[shape.queries :]
        self.rotation = torch.linalg.qr(torch.randn(d, d))[0]
        self.rotated = self.queries @ self.rotation, self.keys @ self.rotation
        self.widths, self.raw = shape.widths, form == "raw"
        self.variances = torch.stack([part.var(0).sum() for part in self.rotated[1].split(self.widths, 1)])
        self.pairs = torch.combinations(torch.arange(len(self.widths)))
        self.at_once = max(1, int(memory_gb * 2**30 / (shape.queries * shape.keys * 4 * 3)))
        self.work = 2 * shape.queries * shape.keys * d + (2 * count * d**2 if self.raw else 0)

    def ours(self) -> Tensor:
        """[P] nats."""
        if self.raw:
            found = mutual_information(self.queries, self.keys, self.rotation, self.widths)
            return found[self.pairs[:, 0], self.pairs[:, 1]]
        arguments = (*self.rotated, self.rotation, self.widths, self.variances, self.pairs)
        return nats(ops.ksg_radius_and_counts(*arguments, rotated=True)[1], len(self.keys))

    def eager(self) -> Tensor:
        """[P] nats, as the published estimator computes them."""
        raw = (self.queries @ self.rotation, self.keys @ self.rotation) if self.raw else None
        queries, keys = (rows.split(self.widths, 1) for rows in raw or self.rotated)
        parts = zip(queries, keys, self.variances, strict=True)
        scaled = torch.stack([torch.cdist(q, k) / v.sqrt() for q, k, v in parts])
        counts = []
        for some in self.pairs.split(self.at_once):
            both = scaled[some]  # [pairs, 2, Q, K]
            radius = both.amax(1).amin(-1)
            counts.append((both < radius[:, None, :, None]).sum(-1))
        return nats(torch.cat(counts), len(self.keys))

    def check(self) -> float:
        """Distance to the fp64 oracle on a few pairs."""
        arguments = (*self.rotated, self.rotation, self.widths, self.variances)
        some = self.pairs[:CHECKED]
        radius = reference.ksg_radius(*arguments, some, rotated=True)
        exact = nats(reference.ksg_counts(*arguments, some, radius, rotated=True), len(self.keys))
        gap = float((exact - self.ours()[:CHECKED]).abs().max())
        assert gap <= 1e-4, f"mutual information is off by {gap:.1e}: nothing is timed"
        return gap


def nats(counts: Tensor, keys: int) -> Tensor:
    """[P] nats, from [P, 2, Q] counts: psi(1) + psi(N) - mean(psi(n_a + 1) + psi(n_b + 1))."""
    inside = torch.digamma(counts.double() + 1).sum(1).mean(1)
    return torch.digamma(torch.tensor([1.0, keys + 1.0], dtype=torch.float64)).sum() - inside


@pytest.mark.parametrize("form", ["rotated", "raw"])
def bench_ksg(contest, request: pytest.FixtureRequest, shape: Shape, form: str) -> None:
    case = Estimate(shape, form, request.config.getoption("--memory-gb"))
    gap = case.check()
    goal = ("times_best_peer", GOALS[shape.d]) if shape.d in GOALS and form == "rotated" else None
    contest(
        {**shape._asdict(), "form": form, "pairs": len(case.pairs), "gap_to_fp64": gap},
        Contender(case.ours, case.work),
        ceiling=product(2048),
        peers={"eager torch": Contender(case.eager, case.work)},
        goal=goal,
    )
