"""What ``ndm-fast evaluate circuits`` found about a run, for its report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ndm_fast.errors import InputError
from ndm_fast.files import read_json

_TEST = {
    "what": str,
    "site": str,
    "methods": {"ndm": {"effect": [float], "whole": float, "gini": {"dimension": object}}},
}


class CircuitColumn(NamedTuple):
    """One circuit test: the effect of patching each subspace."""

    test: str
    what: str
    site: str
    effects: tuple[float, ...]
    """[S] mean change of the test's metric."""
    whole: float
    """The same for the whole activation."""
    gini: float
    """Of the absolute effects over the subspaces' shares of the width."""


def circuit_columns(path: Path, widths: Sequence[int]) -> list[CircuitColumn]:
    """Columns of the tests in a ``circuits.json``, of the partition with these widths; none without a file.

    Raises:
        InputError: the file is damaged, or is of another partition.
    """
    if not path.exists():
        return []
    remedy = "delete it, or run `ndm-fast evaluate circuits RUN --out RUN` again"
    partitions = read_json(path, {str: {str: _TEST}}, remedy=remedy)
    columns = [
        CircuitColumn(
            name, test["what"], test["site"], tuple(ndm["effect"]), ndm["whole"], ndm["gini"]["dimension"]
        )
        for tests in partitions.values()
        for name, test in tests.items()
        for ndm in [test["methods"]["ndm"]]
    ]
    if len(partitions) != 1 or any(len(column.effects) != len(widths) for column in columns):
        raise InputError(f"{path} is not of this run's {len(widths)} subspaces alone: {remedy}")
    return columns
