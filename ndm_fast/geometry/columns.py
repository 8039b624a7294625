"""Columns of subspaces: runs of equal widths, and rows laid out for the kernels."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from torch import Tensor


def unit_columns(rows: Tensor) -> Tensor:
    """The same rows with neighboring columns next to each other; rows may stay strided."""
    rows = rows.detach()
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def equal_width_runs(widths: Sequence[int], longest: int = sys.maxsize) -> Iterator[tuple[slice, slice]]:
    """Runs of up to ``longest`` neighboring subspaces of one width: their numbers, and their columns."""
    start = column = 0
    while start < len(widths):
        stop = start
        while stop < min(len(widths), start + longest) and widths[stop] == widths[start]:
            stop += 1
        size = (stop - start) * widths[start]
        yield slice(start, stop), slice(column, column + size)
        start, column = stop, column + size
