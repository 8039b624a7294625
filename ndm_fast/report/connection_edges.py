"""Edges of a ``connections.json`` as they are drawn: into heads and MLPs alike, with their strengths."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

MLP = "mlp"
"""Stands in the place of a head's number."""

Node = tuple[int, int | str]
"""Block, and head or ``MLP``."""


def nodes_of(pair: Mapping[str, Any]) -> list[Node]:
    """Heads and MLPs between two sites, block by block, an MLP behind the heads of its block."""
    heads = [(head["block"], head["head"]) for head in pair["heads"]]
    mlps = [(mlp["block"], MLP) for mlp in _mlps(pair)]
    return sorted([*heads, *mlps], key=lambda node: (node[0], node[1] == MLP, node[1]))


def edges_of(pair: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All edges; those into an MLP have ``MLP`` for a head and the side "in"."""
    found = [*pair["edges"]]
    names = {"share": "read", "times": "times", "deviations": "deviations"}
    if pair.get("tested"):
        names |= {"effect": "effects", "error": "errors", "attributed": "attributed", "arriving": "arriving"}
    for mlp in _mlps(pair):
        for s in range(len(mlp["read"])):
            edge = {"subspace": s, "block": mlp["block"], "head": MLP, "side": "in"}
            found.append(edge | {name: mlp[key][s] for name, key in names.items()})
    return found


def _mlps(pair: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Those with scores: a file of an older version holds shares alone, which are no edges."""
    return [mlp for mlp in pair.get("mlps", ()) if "times" in mlp]


def strengths(pair: Mapping[str, Any], way: str) -> list[tuple[dict[str, Any], float]]:
    """Edges with their strength over the strongest, falling; by weights what is beyond chance counts."""
    edges = edges_of(pair)
    sizes = [abs(e["effect"]) if way == "data" else max(e["times"] - 1, 0.0) for e in edges]
    largest = max(sizes, default=0.0) or 1.0
    found = [(edge, size / largest) for edge, size in zip(edges, sizes, strict=True)]
    return sorted(found, key=lambda one: -one[1])


def outputs(
    pair: Mapping[str, Any], way: str, least: float, widths: Sequence[int]
) -> Iterator[tuple[Node, int, float, str]]:
    """(node, subspace above, strength, note) of what nodes with an edge of so much strength write.

    Args:
        widths: of the subspaces above.
    """
    shown = {(e["block"], e["head"]) for e, strength in strengths(pair, way) if strength >= least}
    if way == "weights":
        writes = {(head["block"], head["head"]): head["writes"] for head in pair["heads"]}
        for mlp in _mlps(pair):
            chance = [width / sum(widths) for width in widths]
            over = [share / own for share, own in zip(mlp["write"], chance, strict=True)]
            writes[mlp["block"], MLP] = over
        kept = {node: times for node, times in writes.items() if node in shown}
        largest = max((max(times) - 1 for times in kept.values()), default=1.0)
        for node, over in kept.items():
            for s, times in enumerate(over):
                yield node, s, max(times - 1, 0.0) / largest, f"{times:.1f} times chance of what it writes"
        return
    through: dict[Node, list[float]] = {}
    for edge in edges_of(pair):
        node = edge["block"], edge["head"]
        if node in shown and edge["arriving"] is not None:
            sums = through.setdefault(node, [0.0] * len(edge["arriving"]))
            through[node] = [a + b for a, b in zip(sums, edge["arriving"], strict=True)]
    largest = max((abs(drop) for drops in through.values() for drop in drops), default=0.0) or 1.0
    for node, drops in through.items():
        for s, drop in enumerate(drops):
            yield node, s, abs(drop) / largest, f"{drop:.3f} of the effect goes through it directly"


def label(node: Node) -> str:
    """What stands beside a node."""
    return f"MLP {node[0]}" if node[1] == MLP else f"{node[0]}.{node[1]}"


def words(edge: Mapping[str, Any]) -> str:
    """An edge's numbers."""
    into = label((edge["block"], edge["head"])) + ("" if edge["head"] == MLP else f" {edge['side']}")
    said = f"s{edge['subspace']} to {into}: "
    reads = f"reads {100 * edge['share']:.1f} %, {edge['times']:.1f} times chance"
    if edge.get("effect") is None:
        return said + reads
    return f"{said}effect {edge['effect']:.3f} (first order {edge['attributed']:.3f}); {reads}"
