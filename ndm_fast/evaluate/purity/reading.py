"""What a subspace seems to hold, in words, from its neighbor purity: the one place that decides it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

READINGS = {
    "position_within_3": "position",
    "same_token": "current token",
    "same_previous_token": "previous token",
    "same_next_token": "next token",
    "same_document": "document",
}
"""Shares that speak for a variable, the more particular first."""

_CLEAR, _CONTRAST = 0.5, 1.25


_PARTLY = 0.3
"""Share of neighbors from which on an unclear subspace is said to hold something in part."""


def read_subspaces(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str] = READINGS) -> list[str]:
    """What each subspace tells of in words, or ``"unclear"``.

    Clear: the lower bound of a share's interval is at least one half, and 1.25 times the median of that share
    over all subspaces. With several, the one with the greatest share.

    Args:
        rows: one per subspace, with shares and ``intervals`` {share: [low, high]}.
    """
    medians = {name: statistics.median(float(row[name]) for row in rows) for name in names}
    readings = []
    for row in rows:
        found = {}
        for name, words in names.items():
            low = row["intervals"][name][0]
            if low >= _CLEAR and low >= _CONTRAST * medians[name]:
                found[words] = low
        readings.append(max(found, key=lambda words: found[words]) if found else "unclear")
    return readings


class Reading(NamedTuple):
    """One line about a subspace."""

    variable: str
    """A reading of :func:`read_subspaces`, "mixed" for "unclear"."""
    line: str


def describe(row: Mapping[str, Any]) -> Reading:
    """A row's ``reading`` in one line, with the share behind it.

    Args:
        row: of ``purity.neighbor_purity``.
    """
    variable = row["reading"]
    if variable == "position":
        return Reading(variable, f"position ({100 * row['position_within_3']:.0f} % within 3)")
    if variable != "unclear":
        name = next((name for name, words in READINGS.items() if words == variable), f"same_{variable}")
        return Reading(variable, f"{variable} ({100 * row[name]:.0f} % of neighbors)")
    share, words = max((row[name], words) for name, words in READINGS.items() if words != "position")
    amount = "in part" if share >= _PARTLY else "at most"
    return Reading("mixed", f"mixed, {amount} {words} ({100 * share:.0f} %)")
