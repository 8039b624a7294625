"""The picture of connections: sites as rows, subspaces as blocks as wide as they are, heads between them.

One drawing serves the file, the report and the live page; there a script hides what is below the threshold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

from ndm_fast.evaluate.connections.results import read_connections
from ndm_fast.files import write_atomic

THRESHOLD = 0.1
"""Share of the strongest edge of its pair of sites, below which an edge is not shown at first."""

LEAST = 0.02
"""The same, below which an edge is not drawn at all."""

_WIDTH, _LEFT, _RIGHT, _TOP = 1000, 96, 16, 40
_ROW, _GAP, _LINE = 26, 66, 52
"""Heights: of a site's blocks, from them to the first heads, and from one block's heads to the next's."""

_STYLE = """
.cx { --cx-page: #fbfbfa; --cx-text: #1c1e21; --cx-soft: #5b626b; --cx-block: #dfe4ea; --cx-hot: #b7791f;
  --cx-Q: #0072b2; --cx-K: #d55e00; --cx-V: #007f5c; --cx-out: #7a828b; font: 12px system-ui, sans-serif; }
@media (prefers-color-scheme: dark) { .cx { --cx-page: #14171a; --cx-text: #e6e8ea; --cx-soft: #a2aab3;
  --cx-block: #2f363e; --cx-hot: #d9a441; --cx-Q: #58aee0; --cx-K: #f0904d; --cx-V: #4fbf98;
  --cx-out: #8c959e; } }
.cx .cx-page { fill: var(--cx-page); }
.cx text { fill: var(--cx-soft); font-size: 11px; }
.cx text.cx-site { fill: var(--cx-text); font-size: 12px; font-weight: 600; }
.cx .cx-block { fill: var(--cx-block); stroke: var(--cx-page); stroke-width: 1.5; }
.cx .cx-effect { fill: var(--cx-hot); fill-opacity: 0.6; }
.cx text.cx-label { fill: var(--cx-text); }
.cx .cx-head circle { fill: var(--cx-page); stroke: var(--cx-soft); stroke-width: 1.2; }
.cx .cx-edge { fill: none; stroke-linecap: round; }
.cx .cx-Q { stroke: var(--cx-Q); } .cx .cx-K { stroke: var(--cx-K); } .cx .cx-V { stroke: var(--cx-V); }
.cx .cx-out { stroke: var(--cx-out); stroke-dasharray: 4 3; }
.cx text.cx-Q { fill: var(--cx-Q); stroke: none; } .cx text.cx-K { fill: var(--cx-K); stroke: none; }
.cx text.cx-V { fill: var(--cx-V); stroke: none; } .cx text.cx-out { fill: var(--cx-out); stroke: none; }
.cx [hidden] { display: none; }
"""

_NOTES = {"Q": "Q: where it looks from", "K": "K: what it looks for", "V": "V: what it takes along"}


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
    parts = [
        f'<svg class="cx" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'aria-label="Connections between subspaces of {_quoted(found["model"])}">',
        f"<style>{_STYLE}</style>",
        f'<rect class="cx-page" width="{_WIDTH}" height="{height}"/>',
        *_legend(None if live else ways[0]),
    ]
    for way in ways if live else ways[:1]:
        least = LEAST if live else THRESHOLD
        for number, pair in enumerate(found["pairs"]):
            parts += _edges(number, pair, rows, heads[number], way, least, hidden=live and way != ways[0])
    for number, site in enumerate(found["sites"]):
        tested = next((p["tested"] for p in found["pairs"] if p["below"] == number), None)
        parts += _blocks(site, rows[number], tested)
    for number, spots in enumerate(heads):
        seen = _seen_heads(found["pairs"][number], ways[0])
        for (block, head), spot in spots.items():
            name = f"{block}.{head}"
            shown = name in seen
            parts.append(
                f'<g class="cx-head" data-pair="{number}" data-head="{name}">'
                f"<title>head {head} of block {block}</title>"
                f'<circle cx="{spot.x:.1f}" cy="{spot.y:.1f}" r="4"/>'
                f'<text x="{spot.x + 7:.1f}" y="{spot.y + 4:.1f}"{_HIDDEN[not shown]}>{name}</text></g>'
            )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _places(
    found: Mapping[str, Any],
) -> tuple[list[list[_Spot]], list[dict[tuple[int, int], _Spot]], float]:
    """Centers of all subspaces, of all heads by pair, and the height of the picture."""
    lines = [sorted({head["block"] for head in pair["heads"]}) for pair in found["pairs"]]
    height = _TOP + sum(2 * _GAP + _LINE * (len(blocks) - 1) + _ROW for blocks in lines) + _ROW + 24
    y, rows, heads = height - 12 - _ROW, [], []
    for number, site in enumerate(found["sites"]):
        rows.append([_Spot(x + width / 2, y) for x, width in _extents(site["widths"])])
        if number == len(lines):
            break
        spots = {}
        for place, block in enumerate(lines[number]):
            own = [head["head"] for head in found["pairs"][number]["heads"] if head["block"] == block]
            for head in own:
                x = _LEFT + (head + 0.5) / len(own) * (_WIDTH - _LEFT - _RIGHT)
                spots[block, head] = _Spot(x, y - _GAP - place * _LINE)
        heads.append(spots)
        y -= 2 * _GAP + _LINE * (len(lines[number]) - 1) + _ROW
    return rows, heads, height


def _extents(widths: list[int]) -> Iterator[tuple[float, float]]:
    """Left end and width of each block."""
    scale, start = (_WIDTH - _LEFT - _RIGHT) / sum(widths), 0
    for width in widths:
        yield _LEFT + start * scale, width * scale
        start += width


def _legend(way: str | None) -> list[str]:
    parts, x = [], _LEFT
    for side, note in [*_NOTES.items(), ("out", "what it writes")]:
        parts.append(
            f'<line class="cx-edge cx-{side}" x1="{x}" y1="16" x2="{x + 22}" y2="16" stroke-width="3"/>'
        )
        parts.append(f'<text class="cx-{side}" x="{x + 28}" y="20">{note}</text>')
        x += 190
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
    heads: Mapping[tuple[int, int], _Spot],
    way: str,
    least: float,
    *,
    hidden: bool,
) -> list[str]:
    parts = []
    for edge, strength in _strengths(pair, way):
        if strength < least:
            break
        start, end = rows[pair["below"]][edge["subspace"]], heads[edge["block"], edge["head"]]
        off = {"Q": -3, "K": 0, "V": 3}[edge["side"]]
        note = f"s{edge['subspace']} to {edge['block']}.{edge['head']} {edge['side']}: {_words(edge)}"
        parts.append(
            _line(
                _Spot(start.x + off, start.y), _Spot(end.x + off, end.y), edge["side"], strength, note,
                f'data-pair="{number}" data-way="{way}" data-head="{edge["block"]}.{edge["head"]}" '
                f'data-edge="{edge["subspace"]}.{edge["block"]}.{edge["head"]}.{edge["side"]}" tabindex="-1"',
                hidden or strength < THRESHOLD,
            )
        )  # fmt: skip
    for (block, head), s, strength, note in _outputs(pair, way):
        if strength >= least:
            start, end = heads[block, head], rows[pair["above"]][s]
            parts.append(
                _line(
                    start, _Spot(end.x, end.y + _ROW), "out", strength, f"{block}.{head} to s{s}: {note}",
                    f'data-pair="{number}" data-way="{way}" data-head="{block}.{head}"',
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


def _strengths(pair: Mapping[str, Any], way: str) -> list[tuple[Mapping[str, Any], float]]:
    """Edges with their strength over the strongest, falling; by weights what is beyond chance counts."""
    sizes = [abs(e["effect"]) if way == "data" else max(e["times"] - 1, 0.0) for e in pair["edges"]]
    largest = max(sizes, default=0.0) or 1.0
    found = [(edge, size / largest) for edge, size in zip(pair["edges"], sizes, strict=True)]
    return sorted(found, key=lambda one: -one[1])


def _outputs(pair: Mapping[str, Any], way: str) -> Iterator[tuple[tuple[int, int], int, float, str]]:
    """(head, subspace above, strength, note) of what heads with a shown edge write."""
    shown = {(e["block"], e["head"]) for e, strength in _strengths(pair, way) if strength >= THRESHOLD}
    if way == "weights":
        found = [((h["block"], h["head"]), h["writes"]) for h in pair["heads"]]
        kept = [(head, writes) for head, writes in found if head in shown]
        largest = max((max(writes) - 1 for _, writes in kept), default=1.0)
        for head, writes in kept:
            for s, times in enumerate(writes):
                yield head, s, max(times - 1, 0.0) / largest, f"{times:.1f} times chance of what it writes"
        return
    through: dict[tuple[int, int], list[float]] = {}
    for edge in pair["edges"]:
        head = edge["block"], edge["head"]
        if head in shown and edge["arriving"] is not None:
            sums = through.setdefault(head, [0.0] * len(edge["arriving"]))
            through[head] = [a + b for a, b in zip(sums, edge["arriving"], strict=True)]
    largest = max((abs(drop) for drops in through.values() for drop in drops), default=0.0) or 1.0
    for head, drops in through.items():
        for s, drop in enumerate(drops):
            yield head, s, abs(drop) / largest, f"{drop:.3f} of the effect goes through it directly"


def _quoted(text: str) -> str:
    return escape(text, {'"': "&quot;"})


def _seen_heads(pair: Mapping[str, Any], way: str) -> set[str]:
    return {f"{e['block']}.{e['head']}" for e, strength in _strengths(pair, way) if strength >= THRESHOLD}


def _words(edge: Mapping[str, Any]) -> str:
    reads = f"reads {100 * edge['share']:.1f} %, {edge['times']:.1f} times chance"
    if edge.get("effect") is None:
        return reads
    return f"effect {edge['effect']:.3f} (first order {edge['attributed']:.3f}); {reads}"
