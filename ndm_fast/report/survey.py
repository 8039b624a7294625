"""What a report says about each subspace: nearest neighbors of a sample, diverse queries, counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ndm_fast import ops
from ndm_fast.evaluate.purity.purity import purity_rows
from ndm_fast.evaluate.purity.reading import Reading, describe
from ndm_fast.report.index.format import PreimageIndex
from ndm_fast.report.index.search import nearest_rows
from ndm_fast.report.views import NeighborView, RowView, count_tokens, token_ids, view_neighbors, view_row
from ndm_fast.seeds import Draw, seeded

SAMPLE = 1024
"""Rows whose nearest neighbors are counted."""


_KEYS = 32768
"""Rows among which these are looked for."""


_CLUSTERED = 4096
"""Rows clustered to choose the queries of a gallery."""


_ROUNDS = 12
"""Rounds of Lloyd's algorithm; it need not have converged to give queries far apart."""


_HISTOGRAM_BINS, _MAP_BINS = 32, 20


_TOKENS = 12


_SEED = 0
"""Of the sample and the clusters: the same index gives the same pages."""


_WINDOW = 8


@dataclass(frozen=True)
class Gallery:
    """A query with its neighbors in one subspace."""

    query: RowView
    share: float
    """Share of the rows in the query's cluster."""
    neighbors: list[NeighborView]
    tokens: list[tuple[str, int]]
    """Most frequent tokens of the neighbors."""
    positions: tuple[int, int, int]
    """Least, median and greatest position of the neighbors."""


@dataclass(frozen=True)
class SubspaceSurvey:
    """What the page of one subspace shows."""

    subspace: int
    width: int
    purity: dict[str, Any]
    reading: Reading
    bin_width: float
    near: list[float]
    """Share of the sample whose nearest neighbor is in each bin of distance; the last one is open."""
    random: list[float]
    """The same for a row drawn at random instead."""
    position_map: list[list[float]]
    """Share of nearest neighbors by bins of the query's position and (inner) the neighbor's."""
    tokens: list[tuple[str, float, float]]
    """Most frequent tokens of all galleries' neighbors: name, their share there, share in the index."""
    galleries: list[Gallery]


def survey(
    index: PreimageIndex,
    *,
    metric: str,
    queries: int,
    neighbors: int,
    purity: list[dict[str, Any]] | None = None,
) -> list[SubspaceSurvey]:
    """Survey every subspace of an index.

    Args:
        queries: of each gallery, one for each cluster; neighbors: shown for each.
        purity: of the subspaces, where it was measured before; else that of the sample.
    """
    order = torch.randperm(len(index), generator=seeded(_SEED, Draw.SURVEY_SAMPLE))
    count = min(SAMPLE, len(index) // 2)
    sample, others = order[:count], order[count : count + _KEYS]
    rows, keys = index.token_rows(sample), index.token_rows(others)
    origin = index.rows.origin
    found = ops.nearest_neighbors(
        rows.activations + origin,
        keys.activations + origin,
        index.partition.rotation,
        index.rows.widths,
        metric=metric,
        keys_rotated=True,
        queries_rotated=True,
    )
    purity = purity or purity_rows(
        rows, keys, found.index[..., None], index.rows.widths, [s * s for s in index.spread]
    )
    surveys = []
    for s, width in enumerate(index.rows.widths):
        columns = index.rows.columns[s]
        drawn = _distances(rows.activations, keys.activations[: len(sample)], origin, columns, metric)
        bin_width, near, far = _histograms(found.distance[s], drawn)
        galleries, shown = _galleries(index, order[:_CLUSTERED], s, metric, queries, neighbors)
        surveys.append(
            SubspaceSurvey(
                subspace=s,
                width=width,
                purity=purity[s],
                reading=describe(purity[s]),
                bin_width=bin_width,
                near=near,
                random=far,
                position_map=_position_map(
                    rows.position, keys.position[found.index[s]], index.context_length
                ),
                tokens=_frequent(index, shown),
                galleries=galleries,
            )
        )
    return surveys


def _distances(a: Tensor, b: Tensor, origin: Tensor, columns: slice, metric: str) -> Tensor:
    """[n] distances of rows that stand side by side."""
    a, b = a[: len(b), columns], b[:, columns]
    if metric == "euclidean":
        return (a - b).norm(dim=1)
    return 1 - torch.cosine_similarity(a + origin[columns], b + origin[columns])


def _histograms(near: Tensor, drawn: Tensor) -> tuple[float, list[float], list[float]]:
    top = max(float(drawn.quantile(0.99)), float(near.max()), 1e-12)
    bin_width = top / _HISTOGRAM_BINS
    return bin_width, _shares(near, bin_width), _shares(drawn, bin_width)


def _shares(values: Tensor, bin_width: float) -> list[float]:
    bins = (values / bin_width).long().clamp(0, _HISTOGRAM_BINS - 1)
    return (torch.bincount(bins, minlength=_HISTOGRAM_BINS) / len(values)).tolist()


def _position_map(query: Tensor, neighbor: Tensor, length: int) -> list[list[float]]:
    bins = min(_MAP_BINS, length)
    cells = (query * bins // length) * bins + neighbor * bins // length
    counts = torch.bincount(cells, minlength=bins * bins).view(bins, bins).float()
    return (counts / counts.sum(1, keepdim=True).clamp_min(1)).tolist()


def _frequent(index: PreimageIndex, shown: Tensor) -> list[tuple[str, float, float]]:
    everything = token_ids(index, torch.arange(len(index)))
    return [
        (index.pieces[token].name, count / len(shown), float((everything == token).double().mean()))
        for token, count in count_tokens(index, shown)[:_TOKENS]
    ]


def _galleries(
    index: PreimageIndex, rows: Tensor, s: int, metric: str, queries: int, neighbors: int
) -> tuple[list[Gallery], Tensor]:
    """Galleries of a subspace, the largest cluster first, and the numbers of all neighbors in them."""
    points = index.rows.gather(rows, index.rows.columns[s]).float()
    if metric == "cosine":
        points = torch.nn.functional.normalize(points + index.rows.origin[index.rows.columns[s]], dim=1)
    middles, shares = diverse_points(points, queries, _SEED)
    chosen = rows[middles]
    found = nearest_rows(
        index.stored(chosen), index.rows, neighbors, metric=metric, subspaces=[s], exclude=chosen
    )
    galleries = []
    for q, (row, share) in enumerate(zip(chosen.tolist(), shares.tolist(), strict=True)):
        numbers = found.index[0, q][found.index[0, q] >= 0]
        positions = index.position(numbers).sort().values
        galleries.append(
            Gallery(
                query=view_row(index, row, _WINDOW),
                share=share,
                neighbors=view_neighbors(index, found, 0, q, s, metric=metric, window=_WINDOW),
                tokens=[(index.pieces[token].name, n) for token, n in count_tokens(index, numbers)[:6]],
                positions=(int(positions[0]), int(positions[len(positions) // 2]), int(positions[-1])),
            )
        )
    return galleries, found.index[found.index >= 0]


def diverse_points(points: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """One point in the middle of each cluster (k-means), the largest cluster first.

    Args:
        points: [n, p].

    Returns:
        [c] int64 number of the point nearest to each centre, all different, and [c] share of the points in
        each cluster; c is below ``count`` where there are fewer different points.
    """
    generator = seeded(seed, Draw.SURVEY_CLUSTERS)
    centres = _spread_out(points, count, generator)
    for _ in range(_ROUNDS):
        cluster = torch.cdist(points, centres).argmin(1)
        sums = torch.zeros_like(centres).index_add_(0, cluster, points)
        sizes = torch.bincount(cluster, minlength=len(centres))[:, None]
        centres = torch.where(sizes > 0, sums / sizes.clamp_min(1), centres)
    distances = torch.cdist(points, centres)
    sizes = torch.bincount(distances.argmin(1), minlength=len(centres))
    chosen: dict[int, int] = {}
    for c in sizes.argsort(descending=True, stable=True).tolist():
        chosen.setdefault(int(distances[:, c].argmin()), c)
    kept = torch.tensor(list(chosen.values()))
    return torch.tensor(list(chosen)), sizes[kept] / len(points)


def _spread_out(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """First centres, each drawn with probability ∝ squared distance to those before (k-means++)."""
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    gap = torch.full((len(points),), torch.inf)
    while len(chosen) < count:
        gap = torch.minimum(gap, (points - points[chosen[-1]]).square().sum(1))
        if not gap.sum() > 0:
            break
        chosen.append(int(torch.multinomial(gap, 1, generator=generator)))
    return points[chosen]
