"""Shapes of the gradient's kernels (``gradient.py``), each with its reasoning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from .tuning import architecture


class Gradient(NamedTuple):
    """Shapes of the kernels of ``gradient.py``."""

    project_queries: int
    """Queries a block of ``project_kernel`` takes."""
    depth: int
    """Rows of the rotation it multiplies at once."""
    blocks: int
    """How many of them to make, at most, by splitting the depth."""
    project_warps: int
    project_stages: int
    rows: int
    """Rows of the gradient a block of ``gradient_kernel`` makes."""
    queries: int
    """Queries that are added to it at once."""
    warps: int
    stages: int

    def project(self, splits: int) -> dict[str, int]:
        """Choices of ``project_kernel``."""
        return {
            "SPLITS": splits,
            "QUERY_BLOCK": self.project_queries,
            "DEPTH_BLOCK": self.depth,
            "num_warps": self.project_warps,
            "num_stages": self.project_stages,
        }

    def total(self) -> dict[str, int]:
        """Choices of ``gradient_kernel``."""
        return {
            "ROWS": self.rows,
            "QUERY_BLOCK": self.queries,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


_WGMMA = Gradient(128, 32, 264, 8, 3, 64, 64, 4, 2)
"""With wgmma, Gemma: two blocks of 8 warps on a multiprocessor that project, at 118 registers and 61 KB, and
read the rotation once; then four of 4 warps that sum, at 128 registers and 49 KB. One works while the others'
neighbors are on their way. The projections' blocks are one wave on 132 multiprocessors."""


_AMPERE = Gradient(64, 32, 216, 4, 2, 64, 32, 4, 2)
"""mma.sync holds both factors in registers, up to 250 at 80 columns; at a depth of 64 it spills."""


_IEEE = Gradient(32, 32, 396, 4, 1, 64, 32, 4, 2)
"""fp32 products wait for shared memory: 62 to 150 registers, 12 to 33 KB, and no more work a load by more."""


_PIECES = ((16, 0), (32, 0), (64, 0), (64, 16), (128, 0))
"""Columns that a block may take at once, in two products: 72 are 64 + 16, not 128."""


_GATHERING = 48
"""Columns that take as long as it takes to gather and split the differences they are multiplied by."""


def columns_of(widths: Sequence[int], products: str) -> tuple[int, int]:
    """Columns of a piece, in two powers of two of which the second may be 0.

    In fp16x3 it is: of a second part ptxas 12.8.93 (triton 3.6) makes wrong code (``uniform.py``).
    """
    pieces: Sequence[tuple[int, int]] = _PIECES
    if products == "ieee":
        pieces = pieces[:-1]  # 128 columns spill on sm_80
    elif products == "fp16x3":
        pieces = [piece for piece in pieces if not piece[1]]

    def cost(columns: tuple[int, int]) -> int:
        return sum(-(-width // sum(columns)) for width in widths) * (_GATHERING + sum(columns))

    return min(pieces, key=cost)


def shape_of(capability: int, products: str) -> Gradient:
    """Shapes for the gradient, by what multiplies."""
    if products == "ieee":  # at 4 warps sm_80 spills from 72 columns on
        return _IEEE._replace(warps=4 if architecture(capability) in (90, 100) else 8)
    return _WGMMA if architecture(capability) in (90, 100) else _AMPERE


def splits_of(shape: Gradient, queries: int, depth: int, pieces: int) -> int:
    """Parts of the depth that make as many blocks of ``project_kernel`` as the shape asks for, or fewer."""
    tiles = -(-depth // shape.depth)
    wanted = max(1, shape.blocks // (pieces * -(-queries // shape.project_queries)))
    return -(-tiles // -(-tiles // wanted))  # no part is empty


def units_of(widths: Sequence[int], splits: int) -> dict[str, Any]:
    """Choices of ``units_kernel``: up to eight sums a thread, whose parts are on their way at once."""
    columns = min(128, max(16, 1 << (max(widths) - 1).bit_length()))
    choices = {"COLUMNS": columns, "WHOLE": max(widths) <= columns, "QUERY_BLOCK": min(16, 1024 // columns)}
    return {"SPLITS": splits, **choices, "num_warps": 4}


CANDIDATES = [
    *(
        _WGMMA._replace(
            project_queries=queries, depth=depth, blocks=blocks, project_warps=warps, project_stages=stages
        )
        for queries, depth, blocks, warps, stages in (
            (128, 32, 264, 8, 3),
            (128, 32, 264, 8, 2),
            (128, 32, 528, 8, 3),
            (128, 64, 132, 8, 2),
            (128, 64, 132, 8, 3),
            (64, 64, 396, 4, 2),
            (64, 64, 264, 4, 3),
            (64, 32, 528, 4, 3),
        )
    ),
    *(
        _WGMMA._replace(rows=rows, queries=queries, warps=warps, stages=stages)
        for rows, queries, warps, stages in (
            (64, 64, 4, 1),
            (64, 32, 4, 2),
            (64, 32, 4, 3),
            (64, 128, 8, 1),
            (128, 64, 8, 1),
            (128, 32, 8, 2),
            (128, 32, 8, 3),
        )
    ),
]
"""What ``bench/gpu/check.py`` times: of one kernel, then of the other: they are independent."""
