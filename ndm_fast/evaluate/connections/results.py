"""What ``evaluate connections`` gives: nodes and edges between sites, as saved in ``connections.json``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ndm_fast.errors import InputError
from ndm_fast.files import read_json

NAME = "connections"
"""Of the file, without its suffix."""

_SHAPE = {
    "model": str,
    "sites": [{"site": str, "widths": [int]}],
    "pairs": [{"below": int, "above": int, "edges": [{str: object}], "heads": [{str: object}]}],
}


@dataclass(frozen=True)
class SiteNodes:
    """One site with its subspaces."""

    site: str
    partition: str
    """Where the partition came from."""
    widths: list[int]


@dataclass(frozen=True)
class HeadNode:
    """A head between two sites, and what it writes into each subspace of the one above."""

    block: int
    head: int
    writes: list[float]
    """[S'] share, over chance."""
    effects: list[float] | None = None
    """[3] mean drop where the whole activation of the site below is patched on its way into Q, K or V."""


@dataclass(frozen=True)
class Edge:
    """A subspace on its way into one side of one head, or into an MLP."""

    subspace: int
    block: int
    head: int | None
    """None for the MLP."""
    side: str
    """Q, K or V; "in" for the MLP."""
    share: float
    """Of what the side reads."""
    times: float
    """That share over chance, which is the subspace's share of the width."""
    deviations: float
    """Share less chance, over the standard deviation among random rotations."""
    effect: float | None = None
    """Mean drop of the metric where the edge alone is patched."""
    error: float | None = None
    """Standard error of that mean."""
    attributed: float | None = None
    """The same to first order."""
    arriving: list[float] | None = None
    """[S'] how much of it goes, to first order, straight into each subspace of the site above."""
    by_prompt: list[float] | None = None
    """[N] drop for each prompt; of the edges with the largest effects only."""


@dataclass(frozen=True)
class MlpNode:
    """The MLP of a block: what it reads of each subspace below, and writes into each above."""

    block: int
    read: list[float]
    """[S] share."""
    write: list[float]
    """[S'] share."""
    times: list[float]
    """[S] ``read`` over chance."""
    deviations: list[float]
    """[S] ``read`` less chance, over the standard deviation among random rotations."""
    whole: float | None = None
    """Mean drop of the metric where the whole activation below is patched on its way into the MLP."""
    effects: list[float] | None = None
    """[S] mean drop where one subspace is."""
    errors: list[float] | None = None
    """[S] standard errors of these means."""
    attributed: list[float] | None = None
    """[S] the same to first order."""
    arriving: list[list[float]] | None = None
    """[S, S'] how much of it goes, to first order, straight into each subspace of the site above."""
    by_prompt: list[list[float]] | None = None
    """[S, N] drop for each prompt."""


@dataclass(frozen=True)
class Skip:
    """The skip connection from one site to the other, patched: blocks between see nothing of it."""

    whole: float
    """Mean drop of the metric where the whole activation goes straight to the site above."""
    effects: list[float]
    """[S] the same for one subspace."""
    arriving: list[list[float]]
    """[S, S'] how much of it goes, to first order, through each subspace there."""


@dataclass(frozen=True)
class Agreement:
    """How far ways of measuring edges agree; None where there is nothing to tell apart."""

    weights: float | None
    """Area under the curve: share over chance, against the edges that path patching finds."""
    deviations: float | None
    """The same for the deviations from chance."""
    attribution: float | None
    """The same for the size of gradient times difference."""
    weights_ranks: float | None
    """Rank correlation of share over chance with the size of the effect."""
    attribution_ranks: float | None
    """Rank correlation of gradient times difference with the effect."""
    edges: int
    """How many there are."""
    found: int
    """Edges whose effect is at least a tenth of the largest."""


@dataclass(frozen=True)
class Tested:
    """The prompts that the edges of a pair of sites were measured on."""

    test: str
    what: str
    texts: list[str]
    clean: float
    """Mean of the metric."""
    whole: float
    """Its mean drop where the whole activation of the site below is patched."""
    subspaces: list[float]
    """[S] the same for each of its subspaces."""
    agreement: Agreement
    """Of edges into heads."""
    mlp_agreement: Agreement | None
    """Of edges into MLPs; None without any."""
    skip: Skip
    run: float
    """Share of the edges into heads run through all layers above; the rest are taken to first order there."""
    cpu_seconds: float


@dataclass(frozen=True)
class Pair:
    """Two sites, one above the other, and all between them."""

    below: int
    above: int
    """Numbers of the sites."""
    heads: list[HeadNode]
    edges: list[Edge]
    mlps: list[MlpNode]
    kept: list[list[float]]
    """[S, S'] share of each subspace below that lies in each above, over chance."""
    through: list[list[float]]
    """[S, S'] what the heads take from each subspace into each by queries that change nothing: the largest
    composition score over the heads, over chance."""
    tested: Tested | None = None


@dataclass(frozen=True)
class Connections:
    """All sites of one model, from below to above."""

    model: str
    sites: list[SiteNodes]
    pairs: list[Pair]
    left_out: list[str]
    """What the weights do not tell in this model."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def read_connections(path: Path) -> dict[str, Any]:
    """The content of a ``connections.json``.

    Raises:
        InputError: it is damaged or of another kind.
    """
    remedy = "run `ndm-fast evaluate connections` again, or delete it"
    content = read_json(path, _SHAPE, remedy=remedy)
    for pair in content["pairs"]:
        if not 0 <= pair["below"] < pair["above"] < len(content["sites"]):
            raise InputError(f"{path} has an edge between sites that it does not name: {remedy}")
    return content


def mlp_edges(pair: Pair) -> list[Edge]:
    """The edges into the MLPs of a pair of sites."""
    edges = []
    for node in pair.mlps:
        reads = zip(node.read, node.times, node.deviations, strict=True)
        for s, (share, times, deviations) in enumerate(reads):
            edge = Edge(s, node.block, None, "in", share, times, deviations)
            if node.effects and node.errors and node.attributed and node.arriving:
                edge = replace(
                    edge,
                    effect=node.effects[s],
                    error=node.errors[s],
                    attributed=node.attributed[s],
                    arriving=node.arriving[s],
                )
            edges.append(edge)
    return edges


def connection_rows(found: Connections, most: int = 12) -> list[dict[str, Any]]:
    """One table row per edge, the strongest of each pair of sites first."""
    rows = []
    for pair in found.pairs:
        for edge in strongest([*pair.edges, *mlp_edges(pair)], most):
            row = {
                "from": f"{_short(found.sites[pair.below].site)} s{edge.subspace}",
                "into": f"{edge.block}.{edge.head}" if edge.head is not None else f"MLP {edge.block}",
                "side": edge.side,
                "share": edge.share,
                "times_chance": edge.times,
                "deviations": edge.deviations,
            }
            if pair.tested:
                row |= {"test": pair.tested.test, "effect": edge.effect, "first_order": edge.attributed}
            rows.append(row)
    return rows


def strongest(edges: Sequence[Edge], most: int) -> list[Edge]:
    """Edges of the largest effect; where none was measured, of the largest share over chance."""
    return sorted(edges, key=lambda e: -(e.times if e.effect is None else abs(e.effect)))[:most]


def _short(site: str) -> str:
    return site.removeprefix("blocks.").replace(".hook_resid_", " ")
