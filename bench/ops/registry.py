"""What is timed: the shapes of each op, and for how many rounds. The shapes are those of published runs."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """One problem: activations ``d`` wide in subspaces of ``width``, so many queries and keys."""

    d: int
    width: int
    queries: int
    keys: int

    @property
    def widths(self) -> list[int]:
        """As many of the width as fit, and what is left."""
        whole, rest = divmod(self.d, self.width)
        return [self.width] * whole + [rest] * (rest > 0)

    def __str__(self) -> str:
        return f"d{self.d}-w{self.width}-Q{self.queries}-K{self.keys}"


class Plan(NamedTuple):
    """The shapes of an op and the rounds that each is timed for."""

    shapes: list[Shape]
    rounds: int


_SEARCH = [(384, 32, 16384), (768, 32, 65536), (2304, 72, 16384)]
_STEP = [(384, 32), (768, 32), (1536, 64), (2304, 72)]

_ACTIVATIONS = [(384, 32), (384, 96), (576, 32), (576, 96), (576, 192), (576, 432)]
"""MiniLM, SmolLM2: as trained, and as merged. The 4,096 queries of 32 steps are searched at once."""

PLANS = {
    "nearest_index": Plan([Shape(d, width, 4096, 16384) for d, width in _ACTIVATIONS], 3),
    "nearest": Plan([Shape(d, width, q, k) for q in (1024, 128) for d, width, k in _SEARCH], 5),
    "k_nearest": Plan([Shape(384, 32, 1024, 16384), Shape(768, 96, 256, 65536)], 3),
    "ksg": Plan([Shape(d, 32, 128, 16384) for d in (384, 768)], 3),
    "product": Plan([Shape(d, width, 128, 16384) for d, width in _STEP], 5),
    "gradient": Plan([Shape(d, width, 128, 16384) for d, width in _STEP], 9),
    "lie_update": Plan([Shape(d, width, 128, 16384) for d, width in _STEP], 9),
}

TINY = Plan([Shape(64, 16, 32, 512)], 2)
"""For every op with ``--tiny``, which tests the benchmarks and says nothing of speed."""
