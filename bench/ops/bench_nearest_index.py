"""The search of training, from raw rows of real activations: with its rotation, and shadows where they pay.

Partitions: the model's own coordinates, principal components, and for SmolLM2 a trained one, with neighbors
put together for the larger widths. "Without shadows" is the same op that multiplies all columns. Peers rotate
too, and search all subspaces.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from activations import SOURCES, activations, rotation_of
from contest import Contender, product
from registry import TINY, Shape
from torch import Tensor

from ndm_fast import ops
from ndm_fast.geometry import reference, shadow

KINDS = ("identity", "pca", "trained")
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}
CHECKED = 32
BF16_AT = 96
"""Width at which bf16 is timed too."""


class Search:
    """One search of a few steps' queries among keys of the same model; noise at other widths."""

    def __init__(self, shape: Shape, kind: str, precision: str) -> None:
        torch.manual_seed(0)
        self.shape, self.precision, count = shape, precision, shape.queries + shape.keys
        self.model = SOURCES[shape.d].model if shape.d in SOURCES else "noise"
        rows = torch.randn(count, shape.d) if self.model == "noise" else activations(shape.d, count)
        self.queries, self.keys = rows[: shape.queries], rows[shape.queries :]
        self.rotation = rotation_of(kind, rows, shape)
        self.work = 2 * shape.queries * shape.keys * shape.d + 2 * count * shape.d**2

    def run(self, queries: int | None = None) -> Tensor:
        """[S, Q] of all queries, or of the first few."""
        given = (self.queries[:queries], self.keys, self.rotation, self.shape.widths)
        return ops.nearest_index(*given, precision=self.precision)

    def without_shadows(self) -> Tensor:
        decide = shadow.pays
        shadow.pays = lambda *sizes: False
        try:
            return self.run()
        finally:
            shadow.pays = decide

    def check(self) -> None:
        """Some neighbors against the fp64 oracle, and all against the full sweep's."""
        some = (self.queries[:CHECKED], self.keys, self.rotation, self.shape.widths)
        exact = reference.nearest_neighbors(*some).distance
        excess = float((self.lengths(self.run()[:, :CHECKED]) / exact - 1).nan_to_num(0).max())
        assert excess <= TOLERANCE[self.precision], f"neighbors are {excess:.1e} too far: nothing is timed"

    def lengths(self, index: Tensor) -> Tensor:
        """[S, q] fp64 distances of the first q queries to these keys."""
        found = []
        for rows, basis in zip(index, self.rotation.double().split(self.shape.widths, 1), strict=True):
            apart = self.queries[: len(rows)].double() - self.keys[rows].double()
            found.append((apart @ basis).norm(dim=1))
        return torch.stack(found)

    def contender(self, run: Callable[[], object] | None = None) -> Contender:
        return Contender(run or self.run, self.work)


def eager(case: Search) -> Callable[[], object]:
    """Rotation, products and the least of them, in torch."""

    def run() -> list[Tensor]:
        queries, keys = (rows @ case.rotation for rows in (case.queries, case.keys))
        parts = zip(queries.split(case.shape.widths, 1), keys.split(case.shape.widths, 1), strict=True)
        return [
            torch.baddbmm(k.square().sum(1)[None, None], q[None], k.T[None], alpha=-2).argmin(2)
            for q, k in parts
        ]

    return run


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def bench_nearest_index(contest, shape: Shape, kind: str, precision: str) -> None:
    if kind == "trained" and shape.d != 576:
        pytest.skip("a trained rotation is at hand for SmolLM2 alone")
    if precision == "bf16" and shape.width not in (BF16_AT, TINY.shapes[0].width):
        pytest.skip("bf16 looks for no shadows: its times do not depend on the data")
    case = Search(shape, kind, precision)
    case.check()
    peers = {
        "without shadows": case.contender(case.without_shadows),
        "torch baddbmm+argmin": case.contender(eager(case)),
    }
    about = {"model": case.model, "partition": kind, **shape._asdict(), "precision": precision}
    contest(about, case.contender(), ceiling=product(2048), peers=peers)
