"""The rows of a search for the k nearest keys, as both its passes see them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ndm_fast.geometry.precision import full_fp32

KEYS_AT_ONCE = 1 << 14
PRODUCTS_AT_ONCE = 1 << 21
"""Keys, and products of queries and keys, in memory at once."""

_ORIGIN_ROWS = 1024
"""Rows that give the origin."""


class Search(NamedTuple):
    queries: Tensor
    keys: Tensor
    rotation: Tensor
    columns: list[slice]
    cosine: bool
    queries_rotated: bool
    keys_rotated: bool
    exclude: Tensor | None
    dtype: torch.dtype
    """Of what is returned, in which distances are told apart."""


class Frame:
    """Rows rotated, less a common origin, in a type that rounds them; some columns of them."""

    def __init__(self, search: Search, dtype: torch.dtype, columns: slice = slice(None)) -> None:
        self._search, self._dtype, self._columns = search, dtype, columns
        # Unlike a mean, near most rows even where a few are far away.
        some = search.keys[:: max(1, len(search.keys) // _ORIGIN_ROWS)].to(dtype)
        self._origin = None if search.cosine else some.median(0).values

    def queries(self, rows: slice | Tensor = slice(None)) -> tuple[Tensor, Tensor]:
        """[n, p] of the queries, and [n] bounds on the norms of their errors."""
        search = self._search
        queries = search.queries[rows]
        if search.keys_rotated and not search.queries_rotated:
            return self._made(queries.double() @ search.rotation.double(), rotated=True)
        return self._made(queries, rotated=search.queries_rotated)

    def keys(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """[n, p] of the keys from ``start`` to ``stop``, and [n] bounds."""
        return self._made(self._search.keys[start:stop], rotated=self._search.keys_rotated)

    def _made(self, rows: Tensor, *, rotated: bool) -> tuple[Tensor, Tensor]:
        rows = rows.to(self._dtype)
        rows = rows if self._origin is None else rows - self._origin
        # Each of d additions rounds by a unit of the row's norm; the errors add as in a random walk.
        error = rows.double().norm(dim=1) * (unit_roundoff(rows) * 2 * math.sqrt(rows.shape[1] + 4))
        if rotated:
            return rows[:, self._columns], error
        with full_fp32():
            return rows @ self._search.rotation[:, self._columns].to(self._dtype), error


def hide(values: Tensor, exclude: Tensor | None, rows: slice | Tensor, start: int) -> None:
    """Make [b, n] values infinite where a query of these rows leaves the key out; the first is ``start``."""
    if exclude is None:
        return
    at = exclude[rows, None] - start
    inside = (at >= 0) & (at < values.shape[1])
    at = at.clamp(0, values.shape[1] - 1)
    values.scatter_(1, at, torch.where(inside, torch.inf, values.gather(1, at)))


def blocks(rows: int, columns: int, elements: int) -> Iterator[slice]:
    size = max(1, elements // columns)
    return (slice(start, start + size) for start in range(0, rows, size))


def unit_rows(rows: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / torch.where(norm > 0, norm, 1)


def unit_roundoff(rows: Tensor) -> float:
    return torch.finfo(rows.dtype).eps / 2
