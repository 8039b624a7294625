"""Exact distances to keys that were proposed, or to all keys, and the k least of them."""

from __future__ import annotations

import torch
from torch import Tensor

from ndm_fast.geometry.k_nearest_frame import (
    KEYS_AT_ONCE,
    PRODUCTS_AT_ONCE,
    Frame,
    Search,
    blocks,
    hide,
    unit_rows,
)

_EXACT_AT_ONCE = 1 << 20
"""Elements in fp64 at once, 8 MB."""

_SAME_DIRECTION = 2.0**-80
"""``1 - cos`` of directions that fp64 cannot tell apart."""


def decide(search: Search, s: int, index: Tensor, least: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """[Q, k] exact distances and keys, the nearest first, of [Q, m] proposed."""
    rows = torch.arange(len(index), device=index.device)[:, None].expand_as(index)
    distance = torch.full(index.shape, torch.inf, dtype=torch.float64, device=index.device)
    left_out = index < 0 if search.exclude is None else (index < 0) | (index == search.exclude[:, None])
    distance[:, :k] = _exact(search, s, rows[:, :k].flatten(), index[:, :k].clamp_min(0).flatten()).view(
        -1, k
    )
    distance = torch.where(left_out, torch.inf, distance)
    reach = distance[:, :k].amax(1, keepdim=True)
    open_ = ~(least[:, k:].to(search.dtype) > reach.to(search.dtype)) & ~left_out[:, k:]
    at, column = open_.nonzero(as_tuple=True)
    distance[at, column + k] = _exact(search, s, at, index[at, column + k])
    return _nearest_first(search, distance, index, k)


def among_all(search: Search, s: int, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """[n, k] exact distances and keys of some queries, from distances in fp64 to all keys."""
    frame = Frame(search, torch.float64, search.columns[s])
    blocks_of_keys = [
        frame.keys(start, start + KEYS_AT_ONCE) for start in range(0, len(search.keys), KEYS_AT_ONCE)
    ]
    keys, key_error = (torch.cat(each) for each in zip(*blocks_of_keys, strict=True))
    queries, query_error = frame.queries(rows)
    if search.cosine:
        queries, keys = unit_rows(queries), unit_rows(keys)
    found = []
    for some in blocks(len(rows), len(keys), PRODUCTS_AT_ONCE):
        distance = torch.cdist(queries[some], keys, compute_mode="donot_use_mm_for_euclid_dist")
        if search.cosine:
            distance = _one_less_cosine(distance, queries[some, None], keys)
        else:
            distance[distance <= query_error[some, None] + key_error] = 0  # may be copies of the query
        hide(distance, search.exclude, rows[some], 0)
        index = distance.to(search.dtype).sort(stable=True, dim=1).indices[:, :k]
        flat = rows[some, None].expand_as(index).flatten(), index.flatten()
        found.append(_nearest_first(search, _exact(search, s, *flat).view(-1, k), index, k))
    distances, indices = zip(*found, strict=True)
    return torch.cat(distances), torch.cat(indices)


def _nearest_first(search: Search, distance: Tensor, index: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k least of [Q, m] distances in the type returned, with their keys; ties by the key."""
    by_key = index.argsort(1)
    index, distance = index.gather(1, by_key), distance.gather(1, by_key).to(search.dtype)
    order = distance.argsort(stable=True, dim=1)[:, :k]
    return distance.gather(1, order), index.gather(1, order)


def _exact(search: Search, s: int, rows: Tensor, keys: Tensor) -> Tensor:
    """[n] fp64 distances between pairs of queries and keys, by their numbers [n]."""
    columns = search.columns[s]
    basis = search.rotation[:, columns].double()
    size = max(1, _EXACT_AT_ONCE // search.queries.shape[1])

    def part(side: Tensor, numbers: Tensor, rotated: bool) -> Tensor:
        return side[:, columns][numbers].double() if rotated else side[numbers].double() @ basis

    out = torch.empty(len(rows), dtype=torch.float64, device=rows.device)
    for start in range(0, len(rows), size):
        some = slice(start, start + size)
        if not search.cosine and not search.keys_rotated:  # subtracted first: nothing cancels
            apart = search.queries[rows[some]].double() - search.keys[keys[some]].double()
            out[some] = (apart @ basis).norm(dim=1)
            continue
        query = part(search.queries, rows[some], search.queries_rotated)
        key = part(search.keys, keys[some], search.keys_rotated)
        if search.cosine:
            query, key = unit_rows(query), unit_rows(key)
            out[some] = _one_less_cosine((query - key).norm(dim=1), query, key)
        else:
            out[some] = (query - key).norm(dim=1)
    return out


def _one_less_cosine(apart: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """``1 - cos`` from the distance of two unit vectors, where small ones do not cancel; 1 for a zero."""
    found = apart.square() / 2
    found = torch.where(found < _SAME_DIRECTION, 0, found)
    return torch.where((query == 0).all(-1) | (key == 0).all(-1), 1, found)
