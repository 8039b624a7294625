"""One search on a GPU: queries and keys brought into the frame in which they are compared."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..geometry.columns import equal_width_runs
from ..geometry.reference import Neighbors
from .keys import (
    KeyChunk,
    exact_keys,
    largest_norm,
    rotation_errors,
    rounded_keys,
    underflow_errors,
)
from .queries import Frame, Search

KEY_BYTES = 1 << 30
"""Rotated keys held at once."""


MINIMA_BYTES = 1 << 28
"""Minima of a sweep held at once; bounds the subspaces and queries that are searched together."""


_ALIGNED_ROWS = 2048
"""Chunks of so many keys make a multiple of 16 tiles, whose minima are loaded four at a time."""


NO_KEY = torch.iinfo(torch.int64).max


_TF32X3_UNIT = 2.0**-21
"""Roundoff of a product of fp32 numbers split into two tf32 each."""


WITHOUT_A_CARD = 80
"""Compute capability of what lies on none: for Triton's interpreter an A100's; ``replay.py`` changes it."""


def chunks(keys: Tensor, frame: Frame, widths: list[int], search: Search) -> Iterator[KeyChunk]:
    """The keys in as many parts as keep a rotated copy small; one part where none is made."""
    scales, none = frame.keys.scales, torch.zeros_like(frame.keys.scales)
    origin = None if search.cosine else frame.keys.origin
    if search.keys_rotated or search.fused:
        errors = none
        if search.fused and frame.turn.dtype == torch.float32:
            norm = largest_norm(keys)
            errors = rotation_errors(frame.keys, norm, _TF32X3_UNIT)
        yield KeyChunk(0, keys, keys, origin, scales, errors)
        return
    size = max(1, KEY_BYTES // (keys.shape[1] * frame.turn.element_size()))
    if size > _ALIGNED_ROWS:
        size -= size % _ALIGNED_ROWS
    for start in range(0, len(keys), size):
        part = keys[start : start + size]
        if search.in_half:
            copy = rounded_keys(part, frame.turn, frame.keys)
            yield KeyChunk(start, copy, part, None, scales, underflow_errors(scales, widths))
        else:
            copy, norm = exact_keys(part, frame.turn, frame.keys)
            yield KeyChunk(start, copy, part, None, scales, rotation_errors(frame.keys, norm))


def portions(
    widths: Sequence[int], queries: int, keys: int, tile_of: Callable[[int], int]
) -> Iterator[tuple[slice, slice, slice]]:
    """Subspaces of one width with their columns, and queries, whose minima over tiles of keys fit.

    Few subspaces rather than few queries: a launch then reads its keys once for all of them.

    Args:
        tile_of: keys of a tile, by width.
    """
    for run, columns in equal_width_runs(widths):
        width = widths[run.start]
        each = 4 * -(-keys // tile_of(width))
        together = max(1, MINIMA_BYTES // (each * queries))
        size = queries if each * queries <= MINIMA_BYTES else max(128, MINIMA_BYTES // each // 128 * 128)
        for first in range(run.start, run.stop, together):
            stop = min(first + together, run.stop)
            column = columns.start + (first - run.start) * width
            for start in range(0, queries, size):
                group = slice(start, min(start + size, queries))
                yield slice(first, stop), slice(column, column + (stop - first) * width), group


def result(best: Tensor, index: Tensor, cosine: bool) -> Neighbors:
    """Neighbors from [S, Q] fp64 squared distances, or 1 - cos; inf, where no key was found, becomes NaN."""
    found = best.isfinite()
    distance = torch.where(found, best if cosine else best.sqrt(), torch.nan)
    return Neighbors(distance.float(), torch.where(found, index, 0))


def capability(device: torch.device) -> int:
    """Compute capability such as 90."""
    if device.type != "cuda":
        return WITHOUT_A_CARD
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def multiprocessors(device: torch.device) -> int:
    """Of a card; for Triton's interpreter 2."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def power_of_two(number: int) -> int:
    """The least one that is not below a number."""
    return 1 << max(0, number - 1).bit_length()


def aligned(width: int) -> int:
    """Power of two, up to the 8 fp16 numbers of one load, of which a width is a multiple."""
    return math.gcd(8, width)


def device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes the tensor's device the current one, on which kernels are launched."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()


class Part(NamedTuple):
    """Subspaces of one width, some of the keys and some of the queries: what one launch searches."""

    frame: Frame
    chunk: KeyChunk
    search: Search
    subspaces: slice
    columns: slice
    group: slice

    @property
    def subspace_count(self) -> int:
        return self.subspaces.stop - self.subspaces.start

    @property
    def width(self) -> int:
        return (self.columns.stop - self.columns.start) // self.subspace_count

    @property
    def aligned(self) -> int:
        """Columns that a kernel takes a width to be a multiple of; the fused form is compiled for it."""
        return self.width if self.search.fused else aligned(self.width)

    @property
    def units(self) -> int:
        """The width as kernels take it, in aligned columns."""
        return self.width // self.aligned

    def keys(self) -> tuple[Tensor, int, int]:
        """Arguments of both kernels: rows, their stride and number."""
        rows = self.chunk.rows if self.search.fused else self.chunk.rows[:, self.columns]
        return rows, rows.stride(0), len(rows)

    def turn(self) -> tuple[Tensor, int, int]:
        """Arguments of both kernels: rotation, its stride and depth."""
        # Triton's interpreter multiplies the bits of bf16 as integers; in fp32 the products are the same.
        turn = self.frame.turn.float() if self.chunk.rows.is_cpu else self.frame.turn
        return turn[:, self.columns], turn.stride(0), len(turn)

    def scaling(self) -> tuple[Tensor, Tensor, Tensor]:
        """Arguments of both kernels: origin (not read where it is off), scales and errors."""
        origin = self.frame.keys.origin if self.chunk.origin is None else self.chunk.origin
        return origin[self.columns], self.chunk.scales[self.subspaces], self.chunk.errors[self.subspaces]

    def options(self) -> dict[str, object]:
        """Compile-time choices that both kernels share."""
        return {
            "ALIGNED": self.aligned,
            "CENTRE": self.chunk.origin is not None,
            "COSINE": self.search.cosine,
        }

    def projection(self) -> dict[str, object]:
        """How a tile of raw keys is rotated, where that is not done before."""
        depth = 32 if self.frame.turn.dtype == torch.float32 else 64
        return {"PROJECT": self.search.fused, "DEPTH_BLOCK": depth, "DOT": "tf32x3"}
