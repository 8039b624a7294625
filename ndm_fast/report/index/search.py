"""The k nearest stored rows inside every subspace, exactly, in one pass over rows on disk or in memory."""

from __future__ import annotations

import functools
import math
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from ndm_fast.errors import InputError
from ndm_fast.report.index.rows import RotatedRows, Shard

_BLOCK_ELEMENTS = 3 << 19
"""Elements of rows in one block: few enough that its subspaces find it in cache one after the other."""


_VALUE_ELEMENTS = 1 << 26
"""Proposed distances held at once, 256 MB in fp32; more queries are taken in turn."""


_EXACT_ELEMENTS = 1 << 22
"""Elements of rows in fp64 at once, 32 MB."""


_UNIT = 2.0**-24
"""Unit roundoff of fp32."""


class Nearby(NamedTuple):
    """The nearest rows of each query in each subspace searched, nearest first, ties by number."""

    distance: Tensor
    """[S', Q, k] fp64; infinite where fewer than k rows qualify."""
    index: Tensor  # type: ignore[assignment]  # shadows tuple.index, which nobody misses here
    """[S', Q, k] int64 number of the row; -1 where the distance is infinite."""
    within: Tensor
    """[S', Q] int64 rows at most ``radius`` away; all rows where no radius was given."""


def nearest_rows(
    queries: Tensor,
    stored: RotatedRows,
    k: int,
    *,
    metric: str = "euclidean",
    radius: Sequence[float] | None = None,
    subspaces: Sequence[int] | None = None,
    exclude: Tensor | None = None,
) -> Nearby:
    """The k nearest stored rows of every query, in every subspace or in some.

    An fp32 pass over all rows proposes. Every row that its rounding error (Higham 2002, section 3.1) leaves
    in question is compared anew in fp64, from the difference of the rows, so the result is that of a
    brute-force search in fp64 over the rows as they are stored.

    Args:
        queries: [Q, d] rotated, less the origin, as the rows are stored; taken as fp32.
        k: neighbors wanted; no more than there are rows are returned.
        metric: ``"euclidean"``, or ``"cosine"`` for which the distance is ``1 - cos`` (with the origin added
            back; a part of norm 0 has cosine 0 with everything).
        radius: largest distance that counts, in each of the S' subspaces searched.
        subspaces: S' numbers of those to search; default: all.
        exclude: [Q] int64, a row that is none of the query's neighbors (itself).

    Raises:
        InputError: k is below 1, no such subspace or metric, or the shapes do not fit.
    """
    searched = list(range(len(stored.widths))) if subspaces is None else list(subspaces)
    _check(queries, stored, k, metric, radius, searched)
    k = min(k, len(stored))
    queries = queries.float()
    at_once = max(1, _VALUE_ELEMENTS // (len(stored) * len(searched)))
    parts = []
    for start in range(0, len(queries), at_once):
        some = queries[start : start + at_once]
        values = _propose(some, stored, searched, metric)
        if exclude is not None:
            values[:, torch.arange(len(some)), exclude[start : start + at_once]] = torch.inf
        parts.append(_decide(some, stored, values, k, metric, radius, searched))
    return Nearby(*(torch.cat(column, 1) for column in zip(*parts, strict=True)))


def _check(
    queries: Tensor,
    stored: RotatedRows,
    k: int,
    metric: str,
    radius: Sequence[float] | None,
    searched: Sequence[int],
) -> None:
    width, subspaces = sum(stored.widths), len(stored.widths)
    if queries.ndim != 2 or queries.shape[1] != width or len(queries) == 0:
        raise InputError(f"queries have shape {list(queries.shape)}: give [Q, {width}], Q at least 1")
    if not torch.isfinite(queries).all():
        raise InputError("queries hold NaN or Inf: drop these rows")
    if k < 1:
        raise InputError(f"k is {k}: give the number of neighbors wanted, at least 1")
    if metric not in ("euclidean", "cosine"):
        raise InputError(f"metric is {metric!r}: take euclidean or cosine")
    if not searched or not all(0 <= s < subspaces for s in searched):
        raise InputError(f"subspaces {list(searched)}: give some of 0 to {subspaces - 1}")
    if radius is not None and len(radius) != len(searched):
        raise InputError(f"{len(radius)} radii for {len(searched)} subspaces: give one for each")


def _propose(queries: Tensor, stored: RotatedRows, searched: Sequence[int], metric: str) -> Tensor:
    """[S', Q, N] fp32; euclidean: squared distance less the query's squared norm, with rounding errors;
    cosine: ``1 - cos`` less the largest error it may have."""
    values = torch.empty(len(searched), len(queries), len(stored))
    sides = _cosine_sides(queries, stored) if metric == "cosine" else queries
    size = max(1, _BLOCK_ELEMENTS // queries.shape[1])
    shifts, tops = _cosine_terms(sides, stored)

    def fill(shard: Shard, start: int, out: Tensor) -> None:
        rows = slice(start, start + out.shape[2])
        block = shard.rows[rows]
        if len(searched) > 1:
            block = block.float()
        for i, s in enumerate(searched):
            columns = stored.columns[s]
            products = _products(sides[:, columns], block[:, columns].float())
            if metric == "cosine":
                products += shifts[s]
                torch.addcmul(tops[s], shard.inverse_norms[s, rows], products, value=-1, out=out[i])
            else:
                torch.sub(shard.squares[s, rows], products, alpha=2, out=out[i])

    tasks = []
    at = 0
    for shard in stored.shards:
        for start in range(0, len(shard.rows), size):
            stop = min(start + size, len(shard.rows))
            tasks.append((shard, start, values[:, :, at : at + stop - start]))
            at += stop - start
    deque(_workers().map(fill, *zip(*tasks, strict=True)), maxlen=0)
    return values


@functools.cache
def _workers() -> ThreadPoolExecutor:
    """Threads whose torch ops run on one thread each.

    Blocks shared out here scale; torch's own threads meet at a barrier after each of thousands of short ops,
    and cost five times the work itself where another process has one of the cores.
    """
    count = torch.get_num_threads()
    all_there = threading.Barrier(count)
    pool = ThreadPoolExecutor(count, "search", initializer=torch.set_num_threads, initargs=(1,))
    deque(pool.map(lambda _: all_there.wait(), range(count)), maxlen=0)
    torch.set_num_threads(count)  # the number is each thread's own, but also what later threads start with
    return pool


def _cosine_sides(queries: Tensor, stored: RotatedRows) -> Tensor:
    """Queries with the origin added back, every part of norm 1 (or 0)."""
    parts = (queries + stored.origin).split(list(stored.widths), 1)
    return torch.cat([torch.nn.functional.normalize(part, dim=1) for part in parts], 1)


def _cosine_terms(sides: Tensor, stored: RotatedRows) -> tuple[list[Tensor], list[Tensor]]:
    """For each subspace [Q, 1] and [1]: ``1 - cos`` is at least ``top - (product + shift) / norm``."""
    shifts, tops = [], []
    for width, columns in zip(stored.widths, stored.columns, strict=True):
        origin, gamma = stored.origin[columns], _gamma(width)
        # Products round relative to |row| <= |row + origin| + |origin|.
        shifts.append((sides[:, columns] @ origin + 2 * gamma * origin.norm())[:, None])
        tops.append(torch.full((1,), 1 - gamma))
    return shifts, tops


def _products(queries: Tensor, rows: Tensor) -> Tensor:
    """[Q, n] inner products; for one query BLAS's matrix-vector product, which is twice as fast."""
    return torch.mv(rows, queries[0])[None] if len(queries) == 1 else queries @ rows.T


def _gamma(width: int) -> float:
    """Bound on the relative error of a sum of ``width`` products in fp32, with room for what surrounds it."""
    return 2 * (width + 8) * _UNIT


def _decide(
    queries: Tensor,
    stored: RotatedRows,
    values: Tensor,
    k: int,
    metric: str,
    radius: Sequence[float] | None,
    searched: Sequence[int],
) -> Nearby:
    distance = torch.full((*values.shape[:2], k), torch.inf, dtype=torch.float64)
    index = torch.full(distance.shape, -1)
    within = torch.full(values.shape[:2], len(stored))
    for i, s in enumerate(searched):
        for q, query in enumerate(queries):
            part = _QueryPart(query, stored, s, metric)
            limit = math.inf if radius is None else radius[i]
            numbers, distances = part.nearest(values[i, q], k, limit)
            index[i, q, : len(numbers)], distance[i, q, : len(numbers)] = numbers, distances
            if radius is not None:
                within[i, q] = part.count(values[i, q], limit)
    return Nearby(distance, index, within)


class _QueryPart:
    """One query in one subspace: exact distances, and what proposed values leave in question."""

    def __init__(self, query: Tensor, stored: RotatedRows, subspace: int, metric: str) -> None:
        self._stored, self._columns, self._cosine = stored, stored.columns[subspace], metric == "cosine"
        self._query = query[self._columns].double()
        self._origin = stored.origin[self._columns].double()
        self._norm = float(self._query.norm())

    def exact(self, index: Tensor) -> Tensor:
        """[n] fp64 distances to the rows of these numbers."""
        size = max(1, _EXACT_ELEMENTS // len(self._query))
        parts = [self._exact(self._stored.gather(some, self._columns)) for some in index.split(size)]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64)

    def _exact(self, rows: Tensor) -> Tensor:
        if not self._cosine:
            return (rows - self._query).norm(dim=1)
        rows, query = rows + self._origin, self._query + self._origin
        lengths = rows.norm(dim=1) * query.norm()
        return 1 - rows @ query / torch.where(lengths > 0, lengths, 1)

    def bounds(self, reach: float) -> tuple[float, float]:
        """A row with a value below the first is nearer than ``reach``; above the second, it is not."""
        if self._cosine:
            return -math.inf, reach
        # A row within reach has a norm of at most |query| + reach.
        error = _gamma(len(self._query)) * (self._norm + reach) ** 2
        middle = reach**2 - self._norm**2
        return middle - error, middle + error

    def nearest(self, values: Tensor, k: int, limit: float) -> tuple[Tensor, Tensor]:
        """Numbers and distances of up to k rows within ``limit``."""
        lowest = values.topk(min(len(values), 2 * k + 16), largest=False)
        first = lowest.indices[:k][lowest.values[:k].isfinite()]
        if len(first) == 0:
            return first, torch.empty(0, dtype=torch.float64)
        reach = min(limit, float(self.exact(first).max()))
        high = self.bounds(reach)[1]
        if float(lowest.values[-1]) > high:  # all that may be nearer are among them
            candidates = lowest.indices[lowest.values <= high].sort().values
        else:
            candidates = (values <= high).nonzero()[:, 0]
        distances = self.exact(candidates)
        candidates, distances = candidates[distances <= limit], distances[distances <= limit]
        order = distances.argsort(stable=True)[:k]  # candidates ascend, so equal ones stay in that order
        return candidates[order], distances[order]

    def count(self, values: Tensor, limit: float) -> int:
        """Number of rows within ``limit``."""
        low, high = self.bounds(limit)
        unsure = ((values >= low) & (values <= high)).nonzero()[:, 0]
        return int((values < low).sum()) + int((self.exact(unsure) <= limit).sum())
