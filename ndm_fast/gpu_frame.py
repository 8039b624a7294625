"""One search on a GPU: queries and keys brought into the frame in which they are compared."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ndm_fast import gpu_search
from ndm_fast.full_fp32 import full_fp32
from ndm_fast.gpu_search import KeyChunk, KeyFrame
from ndm_fast.objective import equal_width_runs
from ndm_fast.reference import Neighbors

KEY_BYTES = 1 << 30
"""Rotated keys held at once."""
MINIMA_BYTES = 1 << 28
"""Minima of a sweep held at once; bounds the subspaces and queries that are searched together."""
_ALIGNED_ROWS = 2048
"""Chunks of so many keys make a multiple of 16 tiles, whose minima are loaded four at a time."""
NO_KEY = torch.iinfo(torch.int64).max
_TF32X3_UNIT = 2.0**-21
"""Roundoff of a product of fp32 numbers split into two tf32 each."""


class Search(NamedTuple):
    """What is asked for."""

    cosine: bool
    in_half: bool
    """Rotate the keys in half precision, which they have already; a product would round fp32 keys first."""
    keys_rotated: bool
    queries_rotated: bool
    fused: bool
    """Make no rotated copy of the keys."""


class Frame(NamedTuple):
    """Queries, and how keys become comparable to them."""

    keys: KeyFrame
    turn: Tensor
    """[d, d] by which keys are rotated: fp32, or rounded to the type of the product."""
    rotated: Tensor
    """[Q, d] fp64 queries, rotated by ``turn``, minus the keys' origin."""
    exact: Tensor
    """[Q, d] fp64 queries rotated by the rotation as given; just ``rotated`` where nothing asks for them."""
    raw: Tensor
    """[Q, d] the queries as given."""
    rotation: Tensor
    """[d, d] fp32 as given."""


def make_search(
    keys: Tensor, metric: str, precision: str, *, keys_rotated: bool, queries_rotated: bool, fused: bool
) -> Search:
    """What the arguments of an op ask for."""
    in_half = precision == "bf16" and not keys_rotated and keys.dtype != torch.float32
    return Search(metric == "cosine", in_half, keys_rotated, queries_rotated, fused)


def make_frame(
    queries: Tensor, keys: Tensor, rotation: Tensor, widths: list[int], search: Search, *, exact: bool
) -> Frame:
    """The frame of a search; ``exact`` asks for exactly rotated queries even in half precision."""
    turn = rotation.to(keys.dtype) if search.in_half else rotation
    key_frame = gpu_search.key_frame(keys, turn.float(), widths, search.cosine, search.keys_rotated)
    origin = key_frame.origin.double()
    turned = None
    if exact or not search.in_half or search.cosine:
        turned = queries.double() if search.queries_rotated else queries.double() @ rotation.double()
    if search.in_half:
        with full_fp32():
            rotated = (queries.float() @ turn.float()).double()
        if not search.fused:  # the product takes it off in this type
            origin = key_frame.origin.to(keys.dtype).double()
    else:
        assert turned is not None
        rotated = turned
        if key_frame.raw_origin is not None and not search.fused:
            origin = key_frame.raw_origin.double() @ rotation.double()
    rotated = rotated - origin
    return Frame(key_frame, turn, rotated, rotated if turned is None else turned, queries, rotation)


def chunks(keys: Tensor, frame: Frame, widths: list[int], search: Search) -> Iterator[KeyChunk]:
    """The keys in as many parts as keep a rotated copy small; one part where none is made."""
    scales, none = frame.keys.scales, torch.zeros_like(frame.keys.scales)
    origin = None if search.cosine else frame.keys.origin
    if search.keys_rotated or search.fused:
        errors = none
        if search.fused and frame.turn.dtype == torch.float32:
            norm = gpu_search.largest_norm(keys)
            errors = gpu_search.rotation_errors(frame.keys, norm, _TF32X3_UNIT)
        yield KeyChunk(0, keys, keys, origin, scales, errors)
        return
    size = max(1, KEY_BYTES // (keys.shape[1] * frame.turn.element_size()))
    if size > _ALIGNED_ROWS:
        size -= size % _ALIGNED_ROWS
    for start in range(0, len(keys), size):
        part = keys[start : start + size]
        if search.in_half:
            copy = gpu_search.rounded_keys(part, frame.turn, frame.keys)
            yield KeyChunk(start, copy, part, None, scales, gpu_search.underflow_errors(scales, widths))
        else:
            copy, norm = gpu_search.exact_keys(part, frame.turn, frame.keys)
            yield KeyChunk(start, copy, part, None, scales, gpu_search.rotation_errors(frame.keys, norm))


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
    """Neighbours from [S, Q] fp64 squared distances, or 1 - cos; inf, where no key was found, becomes NaN."""
    found = best.isfinite()
    distance = torch.where(found, best if cosine else best.sqrt(), torch.nan)
    return Neighbors(distance.float(), torch.where(found, index, 0))


def capability(device: torch.device) -> int:
    """Compute capability such as 90; for Triton's interpreter that of an A100."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def power_of_two(number: int) -> int:
    """The least one that is not below a number."""
    return 1 << max(0, number - 1).bit_length()


def device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes the tensor's device the current one, on which kernels are launched."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()
