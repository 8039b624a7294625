"""The k nearest keys: ours among torch and faiss, which sort what one fp32 product gives, and beside k = 1.

Queries and keys are rotated already, for every contender. Peers see two subspaces: each is the same work.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from contest import Contender, product
from registry import Shape

from ndm_fast import ops
from ndm_fast.geometry import reference

PEERS_SEE = 2
FORM = {"keys_rotated": True, "queries_rotated": True}


class Search:
    """One search over rotated rows."""

    def __init__(self, shape: Shape, k: int) -> None:
        torch.manual_seed(0)
        self.shape, self.k = shape, k
        self.queries, self.keys = torch.randn(shape.queries, shape.d), torch.randn(shape.keys, shape.d)

    def run(self, queries: int | None = None) -> reference.Neighbors:
        """Of all queries, or of the first few."""
        given = (self.queries[:queries], self.keys, None, self.shape.widths)
        return ops.k_nearest_neighbors(*given, self.k, **FORM)

    def one(self) -> reference.Neighbors:
        return ops.nearest_neighbors(self.queries, self.keys, None, self.shape.widths, **FORM)

    def check(self) -> None:
        """Some queries against the fp64 oracle."""
        given = (self.queries[:4], self.keys, torch.eye(self.shape.d), self.shape.widths)
        oracle = reference.k_nearest_neighbors(*given, self.k, **FORM)
        excess = float((self.run(4).distance.double() / oracle.distance - 1).abs().max())
        assert excess <= 1e-6, f"distances are off by {excess:.1e}: nothing is timed"

    @property
    def work(self) -> float:
        return 2 * self.shape.queries * self.shape.keys * self.shape.d


def peers(case: Search) -> dict[str, Contender]:
    """Name -> search of a few subspaces over contiguous rows; and ours for one neighbor."""
    shape, k = case.shape, case.k
    both = zip(case.queries.split(shape.widths, 1), case.keys.split(shape.widths, 1), strict=True)
    parts = [(q.contiguous(), keys.contiguous()) for q, keys in both][:PEERS_SEE]
    work = 2 * shape.queries * shape.keys * shape.width * len(parts)
    found = {
        "torch cdist+topk": lambda: [torch.cdist(q, keys).topk(k, largest=False) for q, keys in parts],
    }
    if importlib.util.find_spec("faiss"):
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        found["faiss"] = lambda: [faiss.knn(q.numpy(), keys.numpy(), k) for q, keys in parts]
    made = {name: Contender(run, work) for name, run in found.items()}
    return {**made, "ours, k = 1": Contender(case.one, case.work)}


@pytest.mark.parametrize("k", [1, 10, 50])
def bench_k_nearest(contest, shape: Shape, k: int) -> None:
    case = Search(shape, k)
    case.check()
    about = {**shape._asdict(), "k": k}
    contest(about, Contender(case.run, case.work), ceiling=product(2048), peers=peers(case))
