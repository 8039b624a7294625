"""Nearest-neighbor search: ours among torch, torch.compile, faiss and scikit-learn, beside a matrix product.

Queries and keys are rotated already, for every contender. Peers see two subspaces: each is the same work.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from contest import Contender, product
from memory import extra_memory
from pytest_benchmark.fixture import BenchmarkFixture
from registry import TINY, Shape
from torch import Tensor

from ndm_fast.geometry import reference
from ndm_fast.ops.cpu import search

PEERS_SEE = 2
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}


class Search:
    """One search over rotated rows, as the compiled op runs it."""

    def __init__(self, shape: Shape, precision: str) -> None:
        torch.manual_seed(0)
        self.shape, self.precision = shape, precision
        self.queries, self.keys = torch.randn(shape.queries, shape.d), torch.randn(shape.keys, shape.d)
        self._rotation = torch.eye(shape.d)  # not used: both are rotated

    def run(self, queries: int | None = None) -> reference.Neighbors:
        """Of all queries, or of the first few."""
        return search.nearest_neighbors(
            *(self.queries[:queries], self.keys, self._rotation, self.shape.widths),
            keys_rotated=True,
            queries_rotated=True,
            precision=self.precision,
        )

    def check(self) -> None:
        """Some queries against the fp64 oracle."""
        arguments = (self.queries[:16], self.keys, self._rotation, self.shape.widths)
        oracle = reference.nearest_neighbors(*arguments, keys_rotated=True, queries_rotated=True)
        excess = float((self.run(16).distance.double() / oracle.distance - 1).abs().max())
        assert excess <= TOLERANCE[self.precision], f"distances are off by {excess:.1e}: nothing is timed"

    def contender(self) -> Contender:
        return Contender(self.run, 2 * self.shape.queries * self.shape.keys * self.shape.d)


def peers(case: Search) -> dict[str, Contender]:
    """Name -> search of a few subspaces over contiguous rows."""
    shape = case.shape
    both = zip(case.queries.split(shape.widths, 1), case.keys.split(shape.widths, 1), strict=True)
    parts = [(q.contiguous(), k.contiguous()) for q, k in both][:PEERS_SEE]
    work = 2 * shape.queries * shape.keys * shape.width * len(parts)

    def expanded(q: Tensor, k: Tensor) -> Tensor:
        return torch.baddbmm(k.square().sum(1)[None, None], q[None], k.T[None], alpha=-2).argmin(2)

    found = {
        "torch cdist+min": lambda: [torch.cdist(q, k).min(1) for q, k in parts],
        "torch baddbmm+argmin": lambda: [expanded(q, k) for q, k in parts],
    }
    if shape not in TINY.shapes:
        compiled = torch.compile(lambda q, k: (k.square().sum(1) - 2 * q @ k.T).argmin(1), dynamic=False)
        found["torch.compile"] = lambda: [compiled(q, k) for q, k in parts]
    if importlib.util.find_spec("faiss"):
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        found["faiss"] = lambda: [faiss.knn(q.numpy(), k.numpy(), 1) for q, k in parts]
    if importlib.util.find_spec("sklearn"):
        from sklearn.metrics import pairwise_distances_argmin

        found["scikit-learn"] = lambda: [pairwise_distances_argmin(q.numpy(), k.numpy()) for q, k in parts]
    return {name: Contender(run, work) for name, run in found.items()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def bench_nearest(contest, benchmark: BenchmarkFixture, shape: Shape, precision: str) -> None:
    case = Search(shape, precision)
    case.check()
    others = peers(case)
    goal = ("of_ceiling", 0.9 if shape.queries >= 1024 else 0.7)
    if precision == "bf16":
        others["ours in fp32"], goal = Search(shape, "fp32").contender(), None
    about = {**shape._asdict(), "precision": precision, "extra_mb": extra_memory(shape, precision)}
    contest(about, case.contender(), ceiling=product(2048), peers=others, goal=goal)
