"""What a subspace seems to hold, in one line, from its neighbour purity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

_CLEAR, _PARTLY = 0.6, 0.3
_POSITION_CLEAR, _POSITION_ABOVE_OTHERS = 0.8, 1.5
_VARIABLES = {
    "same_token": "current token",
    "same_previous_token": "previous token",
    "same_next_token": "next token",
    "same_document": "document",
}


class Reading(NamedTuple):
    """One line about a subspace."""

    variable: str
    """One of "position", "current token", "previous token", "next token", "document", "mixed"."""
    line: str


def read_subspace(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Reading:
    """The variable that nearest neighbours agree on, where the evidence is clear; else "mixed".

    A row's own ``reading``, which knows confidence intervals, decides where there is one: so a page says what
    ``ndm-fast evaluate purity`` says.

    Args:
        row: of ``purity.neighbour_purity``; rows: those of all subspaces, to compare with.
    """
    share, name = max((row[share], name) for share, name in _VARIABLES.items())
    decided = row.get("reading")
    if decided == "position":
        return Reading("position", f"position ({100 * row['position_within_3']:.0f} % within 3)")
    for key, variable in _VARIABLES.items():
        if decided == variable:
            return Reading(variable, f"{variable} ({100 * row[key]:.0f} % of neighbours)")
    if decided is not None:
        return _mixed(share, name)
    near = row["position_within_3"]
    usual = median(other["position_within_3"] for other in rows)
    if near >= _POSITION_CLEAR and near >= _POSITION_ABOVE_OTHERS * usual:
        return Reading("position", f"position ({100 * near:.0f} % within 3)")
    if share >= _CLEAR:
        return Reading(name, f"{name} ({100 * share:.0f} % of neighbours)")
    return _mixed(share, name)


def _mixed(share: float, name: str) -> Reading:
    amount = "in part" if share >= _PARTLY else "at most"
    return Reading("mixed", f"mixed, {amount} {name} ({100 * share:.0f} %)")
