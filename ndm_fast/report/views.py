"""Neighbors as people read them: tokens in their context, with distances, norms and positions."""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor

from ndm_fast.report.index.format import PreimageIndex
from ndm_fast.report.index.search import Nearby


class Stretch(TypedDict):
    """Text without or with special tokens, never mixed."""

    text: str
    special: bool


class RowView(TypedDict):
    """One row of an index."""

    row: int
    token: str
    position: int
    document: int
    before: list[Stretch]
    target: str
    after: list[Stretch]


class NeighborView(RowView):
    """A row as the neighbor of a query in one subspace."""

    distance: float
    relative: float
    """Distance over the subspace's spread (the root of its variance); for cosine the distance itself."""
    norm: float
    """Of the row's part in the subspace."""


def view_row(index: PreimageIndex, row: int, window: int) -> RowView:
    """A row with up to ``window`` tokens before and after it."""
    place = int(index.place[row])
    sequence, position = divmod(place, index.context_length)
    tokens = index.tokens[sequence].tolist()
    piece = index.pieces[tokens[position]]
    before = stretches(index, tokens[max(0, position - window) : position])
    if before:
        before[0]["text"] = before[0]["text"].lstrip(" ")  # a space before nothing
    return {
        "row": row,
        "token": piece.name,
        "position": position,
        "document": int(index.documents[sequence, position]),
        "before": before,
        "target": piece.text,
        "after": stretches(index, tokens[position + 1 : position + 1 + window]),
    }


def stretches(index: PreimageIndex, tokens: list[int]) -> list[Stretch]:
    """Tokens joined to stretches of text; a special token is a stretch of its own."""
    joined: list[Stretch] = []
    for token in tokens:
        piece = index.pieces[token]
        if joined and not piece.special and not joined[-1]["special"]:
            joined[-1]["text"] += piece.text
        else:
            joined.append({"text": piece.text, "special": piece.special})
    return joined


def view_neighbors(
    index: PreimageIndex, found: Nearby, place: int, query: int, subspace: int, *, metric: str, window: int
) -> list[NeighborView]:
    """The neighbors of one query in one subspace.

    Args:
        found: of ``search.nearest_rows`` on ``index.rows``.
        place: of the subspace among those searched; query: of the query among the queries.
    """
    numbers = found.index[place, query]
    numbers = numbers[numbers >= 0]
    norms = index.norm(numbers, subspace).tolist()
    views: list[NeighborView] = []
    for row, distance, norm in zip(
        numbers.tolist(), found.distance[place, query].tolist(), norms, strict=False
    ):
        relative = distance if metric == "cosine" else distance / (index.spread[subspace] or 1.0)
        views.append(
            {**view_row(index, row, window), "distance": distance, "relative": relative, "norm": norm}
        )
    return views


def radii(
    index: PreimageIndex, relative: float | None, metric: str, subspaces: list[int]
) -> list[float] | None:
    """A relative distance as the radius in each subspace, see ``NeighborView.relative``."""
    if relative is None:
        return None
    return [relative if metric == "cosine" else relative * index.spread[s] for s in subspaces]


def count_tokens(index: PreimageIndex, rows: Tensor) -> list[tuple[int, int]]:
    """(token id, count) of these rows, most frequent first, equal ones by id."""
    tokens, counts = token_ids(index, rows).unique(return_counts=True)
    order = counts.argsort(descending=True, stable=True)
    return list(zip(tokens[order].tolist(), counts[order].tolist(), strict=True))


def token_ids(index: PreimageIndex, rows: Tensor) -> Tensor:
    """[n] token ids of these rows."""
    return index.tokens.flatten()[index.place[rows]]


def random_row(index: PreimageIndex, generator: torch.Generator) -> int:
    """The number of a row, each as likely as any other."""
    return int(torch.randint(len(index), (1,), generator=generator))
