"""What ``ndm-fast evaluate circuits`` found about a run, for its report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ndm_fast.errors import InputError


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
    try:
        partitions = json.loads(path.read_text())
        columns = [
            CircuitColumn(
                name, test["what"], test["site"], tuple(ndm["effect"]), ndm["whole"], ndm["gini"]["dimension"]
            )
            for tests in partitions.values()
            for name, test in tests.items()
            for ndm in [test["methods"]["ndm"]]
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no result of circuit tests ({error!r}): {remedy}") from None
    if len(partitions) != 1 or any(len(column.effects) != len(widths) for column in columns):
        raise InputError(f"{path} is not of this run's {len(widths)} subspaces alone: {remedy}")
    return columns
