"""The picture of connections: sites as rows, subspaces as blocks as wide as they are, heads and MLPs between.

One drawing serves the file, the report and the live page; there a script hides what is below the threshold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

from ndm_fast.evaluate.connections.results import read_connections
from ndm_fast.files import write_atomic
from ndm_fast.report.connection_edges import MLP, Node, label, nodes_of, outputs, strengths, words

THRESHOLD = 0.1
"""Share of the strongest edge of its pair of sites, below which an edge is not shown at first."""

LEAST = 0.02
"""The same, below which an edge is not drawn at all."""

_WIDTH, _LEFT, _RIGHT, _TOP = 1000, 96, 16, 40
_ROW, _GAP, _LINE = 26, 66, 52
"""Heights: of a site's blocks, from them to the first heads, and from one block's heads to the next's."""

_LEGEND = {3: 190, 4: 158}
"""Width of an entry of the legend, by the number of kinds of edges."""

_STYLE = """
.cx { --cx-page: #fbfbfa; --cx-text: #1c1e21; --cx-soft: #5b626b; --cx-block: #dfe4ea; --cx-hot: #b7791f;
  --cx-Q: #0072b2; --cx-K: #d55e00; --cx-V: #007f5c; --cx-in: #a3447f; --cx-out: #7a828b;
  font: 12px system-ui, sans-serif; }
@media (prefers-color-scheme: dark) { .cx { --cx-page: #14171a; --cx-text: #e6e8ea; --cx-soft: #a2aab3;
  --cx-block: #2f363e; --cx-hot: #d9a441; --cx-Q: #58aee0; --cx-K: #f0904d; --cx-V: #4fbf98;
  --cx-in: #d98abb; --cx-out: #8c959e; } }
.cx .cx-page { fill: var(--cx-page); }
.cx text { fill: var(--cx-soft); font-size: 11px; }
.cx text.cx-site { fill: var(--cx-text); font-size: 12px; font-weight: 600; }
.cx .cx-block { fill: var(--cx-block); stroke: var(--cx-page); stroke-width: 1.5; }
.cx .cx-effect { fill: var(--cx-hot); fill-opacity: 0.6; }
.cx text.cx-label { fill: var(--cx-text); }
.cx .cx-head circle, .cx .cx-head rect { fill: var(--cx-page); stroke: var(--cx-soft); stroke-width: 1.2; }
.cx .cx-edge { fill: none; stroke-linecap: round; }
.cx .cx-Q { stroke: var(--cx-Q); } .cx .cx-K { stroke: var(--cx-K); } .cx .cx-V { stroke: var(--cx-V); }
.cx .cx-in { stroke: var(--cx-in); } .cx text.cx-in { fill: var(--cx-in); stroke: none; }
.cx .cx-out { stroke: var(--cx-out); stroke-dasharray: 4 3; }
.cx text.cx-Q { fill: var(--cx-Q); stroke: none; } .cx text.cx-K { fill: var(--cx-K); stroke: none; }
.cx text.cx-V { fill: var(--cx-V); stroke: none; } .cx text.cx-out { fill: var(--cx-out); stroke: none; }
.cx [hidden] { display: none; }
"""

_NOTES = {"Q": "Q: where it looks from", "K": "K: what it looks for", "V": "V: what it takes along"}
_MLP_NOTE = {"in": "into an MLP"}


_HIDDEN = {True: ' hidden=""', False: ""}


class _Spot(NamedTuple):
    x: float
    y: float


def write_picture(content: Path, picture: Path) -> None:
    """Draw a ``connections.json`` as a file of its own.

    Raises:
        InputError: it is damaged, or the picture cannot be written.
    """
    write_atomic(picture, picture_of(read_connections(content)).encode())


def is_measured(found: Mapping[str, Any]) -> bool:
    """Whether all edges were patched."""
    return all(pair.get("tested") for pair in found["pairs"])


def picture_of(found: Mapping[str, Any], *, live: bool = False) -> str:
    """The picture as SVG.

    Args:
        found: content of ``connections.json``. live: for the page with a script: all edges from ``LEAST``
            on, by weights too, those below the threshold hidden.
    """
    ways = ["data", "weights"] if is_measured(found) else ["weights"]
    rows, heads, height = _places(found)
    mlps = any(node[1] == MLP for spots in heads for node in spots)
    parts = [
        f'<svg class="cx" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'aria-label="Connections between subspaces of {_quoted(found["model"])}">',
        f"<style>{_STYLE}</style>",
        f'<rect class="cx-page" width="{_WIDTH}" height="{height}"/>',
        *_legend(None if live else ways[0], _NOTES | (_MLP_NOTE if mlps else {})),
    ]
    for way in ways if live else ways[:1]:
        least = LEAST if live else THRESHOLD
        for number, pair in enumerate(found["pairs"]):
            hidden = live and way != ways[0]
            widths = found["sites"][pair["above"]]["widths"]
            parts += _edges(number, pair, rows, heads[number], way, least, widths, hidden=hidden)
    for number, site in enumerate(found["sites"]):
        tested = next((p["tested"] for p in found["pairs"] if p["below"] == number), None)
        parts += _blocks(site, rows[number], tested)
    for number, spots in enumerate(heads):
        seen = _seen(found["pairs"][number], ways[0])
        for node, spot in spots.items():
            parts.append(_mark(number, node, spot, node in seen))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _mark(number: int, node: Node, spot: _Spot, shown: bool) -> str:
    block, head = node
    what = f"MLP of block {block}" if head == MLP else f"head {head} of block {block}"
    shape = (
        f'<rect x="{spot.x - 4:.1f}" y="{spot.y - 4:.1f}" width="8" height="8"/>'
        if head == MLP
        else f'<circle cx="{spot.x:.1f}" cy="{spot.y:.1f}" r="4"/>'
    )
    return (
        f'<g class="cx-head" data-pair="{number}" data-head="{block}.{head}"><title>{what}</title>{shape}'
        f'<text x="{spot.x + 7:.1f}" y="{spot.y + 4:.1f}"{_HIDDEN[not shown]}>{label(node)}</text></g>'
    )


def _places(found: Mapping[str, Any]) -> tuple[list[list[_Spot]], list[dict[Node, _Spot]], float]:
    """Centers of all subspaces, of all heads and MLPs by pair, and the height of the picture."""
    nodes = [nodes_of(pair) for pair in found["pairs"]]
    lines = [sorted({block for block, _ in own}) for own in nodes]
    height = _TOP + sum(2 * _GAP + _LINE * (len(blocks) - 1) + _ROW for blocks in lines) + _ROW + 24
    y, rows, heads = height - 12 - _ROW, [], []
    for number, site in enumerate(found["sites"]):
        rows.append([_Spot(x + width / 2, y) for x, width in _extents(site["widths"])])
        if number == len(lines):
            break
        spots = {}
        for place, block in enumerate(lines[number]):
            own = [node for node in nodes[number] if node[0] == block]
            for column, node in enumerate(own):
                x = _LEFT + (column + 0.5) / len(own) * (_WIDTH - _LEFT - _RIGHT - 30)
                spots[node] = _Spot(x, y - _GAP - place * _LINE)
        heads.append(spots)
        y -= 2 * _GAP + _LINE * (len(lines[number]) - 1) + _ROW
    return rows, heads, height


def _extents(widths: list[int]) -> Iterator[tuple[float, float]]:
    """Left end and width of each block."""
    scale, start = (_WIDTH - _LEFT - _RIGHT) / sum(widths), 0
    for width in widths:
        yield _LEFT + start * scale, width * scale
        start += width


def _legend(way: str | None, notes: Mapping[str, str]) -> list[str]:
    parts, x = [], _LEFT
    for side, note in [*notes.items(), ("out", "what it writes")]:
        parts.append(
            f'<line class="cx-edge cx-{side}" x1="{x}" y1="16" x2="{x + 22}" y2="16" stroke-width="3"/>'
        )
        parts.append(f'<text class="cx-{side}" x="{x + 28}" y="20">{note}</text>')
        x += _LEGEND[len(notes)]
    if way is None:  # the page says it
        return parts
    how = "path patching" if way == "data" else "weights"
    return [*parts, f'<text x="{_WIDTH - _RIGHT}" y="20" text-anchor="end">strength by {how}</text>']


def _blocks(site: Mapping[str, Any], centers: list[_Spot], tested: Mapping[str, Any] | None) -> list[str]:
    y = centers[0].y
    name = escape(site["site"].removeprefix("blocks.").replace(".hook_", " "))
    parts = [f'<text class="cx-site" x="4" y="{y + 17:.1f}">{name}</text>']
    for s, (x, width) in enumerate(_extents(site["widths"])):
        note = f"subspace {s}, width {site['widths'][s]}"
        bar = ""
        if tested and tested["whole"]:
            share = tested["subspaces"][s] / tested["whole"]
            note += f": patching it has {100 * share:.0f} % of the effect of the whole activation"
            size = min(max(share, 0.0), 1.0) * _ROW
            bar = (
                f'<rect class="cx-effect" x="{x + 1:.1f}" y="{y + _ROW - size:.1f}" width="{width - 2:.1f}" '
                f'height="{size:.1f}"/>'
            )
        middle = f'x="{x + width / 2:.1f}" y="{y + 17:.1f}" text-anchor="middle"'
        label = f'<text class="cx-label" {middle}>s{s}</text>'
        parts.append(
            f'<g><title>{note}</title><rect class="cx-block" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" '
            f'height="{_ROW}"/>{bar}{label if width > 22 else ""}</g>'
        )
    return parts


def _edges(
    number: int,
    pair: Mapping[str, Any],
    rows: list[list[_Spot]],
    nodes: Mapping[Node, _Spot],
    way: str,
    least: float,
    widths: Sequence[int],
    *,
    hidden: bool,
) -> list[str]:
    parts = []
    for edge, strength in strengths(pair, way):
        if strength < least:
            break
        node = edge["block"], edge["head"]
        start, end = rows[pair["below"]][edge["subspace"]], nodes[node]
        off = {"Q": -3, "K": 0, "V": 3, "in": 0}[edge["side"]]
        name = f"{node[0]}.{node[1]}"
        parts.append(
            _line(
                _Spot(start.x + off, start.y), _Spot(end.x + off, end.y), edge["side"], strength, words(edge),
                f'data-pair="{number}" data-way="{way}" data-head="{name}" '
                f'data-edge="{edge["subspace"]}.{name}.{edge["side"]}" tabindex="-1"',
                hidden or strength < THRESHOLD,
            )
        )  # fmt: skip
    for node, s, strength, note in outputs(pair, way, THRESHOLD, widths):
        if strength >= least:
            start, end = nodes[node], rows[pair["above"]][s]
            parts.append(
                _line(
                    start, _Spot(end.x, end.y + _ROW), "out", strength, f"{label(node)} to s{s}: {note}",
                    f'data-pair="{number}" data-way="{way}" data-head="{node[0]}.{node[1]}"',
                    hidden or strength < THRESHOLD,
                )
            )  # fmt: skip
    return parts


def _line(start: _Spot, end: _Spot, kind: str, strength: float, note: str, data: str, hidden: bool) -> str:
    bend = (start.y - end.y) * 0.5
    path = (
        f"M{start.x:.1f} {start.y:.1f} C{start.x:.1f} {start.y - bend:.1f} {end.x:.1f} {end.y + bend:.1f} "
        f"{end.x:.1f} {end.y:.1f}"
    )
    return (
        f'<path class="cx-edge cx-{kind}" d="{path}" stroke-width="{0.8 + 5 * strength:.1f}" '
        f'stroke-opacity="{0.35 + 0.6 * strength:.2f}" data-strength="{strength:.3f}" {data}'
        f"{_HIDDEN[hidden]}><title>{escape(note)}</title></path>"
    )


def _quoted(text: str) -> str:
    return escape(text, {'"': "&quot;"})


def _seen(pair: Mapping[str, Any], way: str) -> set[Node]:
    return {(e["block"], e["head"]) for e, strength in strengths(pair, way) if strength >= THRESHOLD}
