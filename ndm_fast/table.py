"""Plain text tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_HEADINGS = {
    "subspace": "subspace",
    "width": "width",
    "variance_share": "variance",
    "heldout_distance": "distance",
    "same_token": "token",
    "same_previous_token": "previous",
    "same_next_token": "next",
    "same_position": "position",
    "position_within_3": "within 3",
    "same_document": "document",
}


def text_table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of the same keys as an aligned table; shares in [0, 1] as percentages."""
    names = list(rows[0])
    cells = [[_cell(name, row[name]) for name in names] for row in rows]
    headings = [_HEADINGS.get(name, name.replace("_", " ")) for name in names]
    sizes = [max(len(heading), *(len(line[i]) for line in cells)) for i, heading in enumerate(headings)]
    lines = [headings, *cells]
    return "\n".join(
        "  ".join(cell.rjust(size) for cell, size in zip(line, sizes, strict=True)) for line in lines
    )


def _cell(name: str, value: Any) -> str:
    if isinstance(value, float):
        return f"{100 * value:.1f} %" if name in _SHARES else f"{value:.4f}"
    return str(value)


_SHARES = frozenset(_HEADINGS) - {"subspace", "width", "heldout_distance"}
