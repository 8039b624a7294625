"""The k nearest keys of every query in every subspace, exactly, in torch code for any device.

Products propose a few more keys than are wanted, with a bound on how near all others may be. The keys
proposed are compared anew, in fp64, from the difference of the rows. Where the bound leaves the k nearest in
doubt, as among many copies of a key, all keys are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ndm_fast.geometry.k_nearest_exact import among_all, decide
from ndm_fast.geometry.k_nearest_frame import (
    KEYS_AT_ONCE,
    PRODUCTS_AT_ONCE,
    Frame,
    Search,
    blocks,
    hide,
    unit_roundoff,
    unit_rows,
)
from ndm_fast.geometry.precision import full_fp32
from ndm_fast.geometry.reference import Neighbors

_SPARE = 8
"""Keys proposed beyond k: fewer queries stay in doubt."""

_NARROW = 2
"""Width up to which fp32 cannot tell neighbors of many keys apart; fp64 proposes there."""

_FITS = 2.0**40
"""Largest value, and its inverse the least, whose squares surely fit into fp32."""

_SHARE = 2.0**-10
"""How much nearer, relative, the others are taken to be, so that each key's error counts on its own."""


class _Proposed(NamedTuple):
    keys: Tensor
    """[S, Q, m] their numbers, the most promising first."""
    least: Tensor
    """[S, Q, m] fp64 bounds: no key, neither this nor one that comes later, is nearer."""


def k_nearest_neighbors(
    queries: Tensor,
    keys: Tensor,
    rotation: Tensor,
    widths: Sequence[int],
    metric: str,
    keys_rotated: bool,
    queries_rotated: bool,
    k: int,
    exclude: Tensor | None,
) -> Neighbors:
    """``Neighbors`` [S, Q, k], as ``geometry.reference.k_nearest_neighbors`` defines them."""
    double = torch.float64 in (queries.dtype, keys.dtype, rotation.dtype)
    ends = list(accumulate(widths, initial=0))
    search = Search(
        *(queries.detach(), keys.detach(), rotation.detach()),
        columns=[slice(*pair) for pair in pairwise(ends)],
        cosine=metric == "cosine",
        queries_rotated=queries_rotated,
        keys_rotated=keys_rotated,
        exclude=exclude,
        dtype=torch.float64 if double else torch.float32,
    )
    precise = search.cosine or min(widths) <= _NARROW or not _squares_fit(queries, keys)
    proposed = _propose(search, min(k + _SPARE, len(keys)), torch.float64 if precise else torch.float32)
    found = []
    for s in range(len(widths)):
        distance, index = decide(search, s, proposed.keys[s], proposed.least[s], k)
        if proposed.keys.shape[2] < len(keys):
            # Rounded alike: a key as far as the last in the type returned may have the lower number.
            doubtful = ~(distance[:, -1] < proposed.least[s, :, -1].to(search.dtype))
            rows = doubtful.nonzero()[:, 0]
            if len(rows):
                distance[rows], index[rows] = among_all(search, s, rows, k)
        found.append((distance, index))
    return Neighbors(*(torch.stack(each) for each in zip(*found, strict=True)))


def _propose(search: Search, count: int, dtype: torch.dtype) -> _Proposed:
    """The ``count`` keys of each query that may be nearest, by products in this type.

    With rotated parts q and k that are off by e_q and e_k, ``|q - k| <= D + e_q + e_k``. What is compared
    is ``w = |k|^2 / 2 - q.k``, less what rounding (Higham 2002, section 3.1) and e_k may have added to it,
    from which ``D >= sqrt((2 w + |q|^2) / (1 + _SHARE)) - e_q``. Cosine: ``w = -cos``, less likewise.
    """
    frame = Frame(search, dtype)
    queries, query_error = frame.queries()
    shape = (len(search.columns), len(queries), count)
    values = torch.full(shape, torch.inf, dtype=dtype, device=queries.device)
    index = torch.full(shape, -1, device=queries.device)
    for start in range(0, len(search.keys), KEYS_AT_ONCE):
        keys, key_error = frame.keys(start, start + KEYS_AT_ONCE)
        for s, columns in enumerate(search.columns):
            part, terms = _key_terms(keys[:, columns], key_error, search.cosine)
            for rows in blocks(len(queries), len(keys), PRODUCTS_AT_ONCE):
                side = queries[rows, columns]
                with full_fp32():
                    products = torch.addmm(
                        terms, unit_rows(side) if search.cosine else side, part.T, alpha=-1
                    )
                hide(products, search.exclude, rows, start)
                new, at = _least(products, count)
                new, at = torch.cat([values[s, rows], new], 1), torch.cat([index[s, rows], at + start], 1)
                values[s, rows], order = new.topk(count, largest=False)
                index[s, rows] = at.gather(1, order)
    least = torch.stack(
        [
            _least_distance(values[s], queries[:, columns], query_error, search.cosine)
            for s, columns in enumerate(search.columns)
        ]
    )
    return _Proposed(index, least)


def _key_terms(part: Tensor, error: Tensor, cosine: bool) -> tuple[Tensor, Tensor]:
    """[n, p] what queries are multiplied by, and [n] what is added to that."""
    if cosine:
        norms = part.double().norm(dim=1)
        slack = torch.where(error > 0, 2 * error / norms, 0).clamp_max(4)
        return unit_rows(part), (-slack).to(part.dtype)
    squares = part.square().sum(1)
    slack = squares.double() * _gamma(part) + error.square() * ((1 + 1 / _SHARE) / 2)
    return part, (squares.double() / 2 - slack).to(part.dtype)


def _least_distance(values: Tensor, queries: Tensor, error: Tensor, cosine: bool) -> Tensor:
    """[Q, m] fp64 least distances of keys with these values, for [Q, p] rotated queries."""
    values, error = values.double(), error[:, None]
    norms = queries.double().norm(dim=1, keepdim=True)
    if cosine:
        return 1 + values - torch.where(error > 0, 2 * error / norms, 0) - _gamma(queries)
    lost = 4 * queries.shape[1] * torch.finfo(queries.dtype).tiny  # to underflow
    squares = (2 * values + (1 - _gamma(queries)) * norms.square() - lost) / (1 + _SHARE)
    return squares.clamp_min(0).sqrt() - error


def _least(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` least of each row of [b, n], or all n, and where they are.

    They lie in the groups of columns with the least minima, of which there are few.
    """
    size = int(math.sqrt(values.shape[1] / count))
    if size < 4:
        found = values.topk(min(count, values.shape[1]), largest=False)
        return found.values, found.indices
    groups = values.shape[1] // size
    minima = values[:, : groups * size].unflatten(1, (size, groups)).amin(1)
    group = minima.topk(count, largest=False).indices
    at = group[:, :, None] + groups * torch.arange(size, device=values.device)
    rest = torch.arange(groups * size, values.shape[1], device=values.device).expand(len(values), -1)
    at = torch.cat([at.flatten(1), rest], 1)
    found = values.gather(1, at).topk(count, largest=False)
    return found.values, at.gather(1, found.indices)


def _squares_fit(*tensors: Tensor) -> bool:
    largest = max(float(torch.stack(torch.aminmax(rows.detach())).abs().max()) for rows in tensors)
    return 1 / _FITS <= largest <= _FITS


def _gamma(part: Tensor) -> float:
    """Bound on the relative error of a product of two rows of [n, p], with room for what surrounds it."""
    return 2 * (part.shape[1] + 8) * unit_roundoff(part)
