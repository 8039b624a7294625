"""CUDA C++ ops (``csrc/cuda``): the nearest-neighbor search for sm_80 and up, never picked by ``auto``.

No GPU record shows them faster than Triton yet. The extension takes raw addresses and a stream and knows
nothing of torch; ``kernels/sweep.py`` explains the method. There are no KSG kernels here: use ``triton``.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from ndm_fast.errors import InputError
from ndm_fast.geometry.columns import unit_columns
from ndm_fast.geometry.objective import Objective
from ndm_fast.geometry.reference import Neighbors
from ndm_fast.kernels.keys import KeyChunk, rounding_of, underflow_of
from ndm_fast.kernels.launch import NO_KEY, chunks, device_of, portions, result
from ndm_fast.kernels.queries import Frame, Search, make_frame, make_search, pack_queries
from ndm_fast.ops import backends

_cuda: ModuleType | None


try:
    from ndm_fast import _cuda  # type: ignore[attr-defined, no-redef, unused-ignore]

    _OBSTACLE: str | None = None
except ImportError as error:
    _cuda = None
    _OBSTACLE = f"ndm_fast._cuda is not built ({error}): install with NDM_FAST_CUDA=1 and nvcc at hand"

PADDED_WIDTHS = (16, 32, 48, 64, 80, 96, 128, 256, 512)
"""Widths the kernels are compiled for; others are padded."""

_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


_QUERY_BLOCK = 64


_NO_ROWS = (0, 0, 0)


def why_unavailable(device: torch.device) -> str | None:
    """Why the extension cannot run on a device, or None where it can."""
    if device.type != "cuda":
        return f"it runs on CUDA devices, not on {device.type}"
    if _OBSTACLE is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs compute capability 8.0"
    return _OBSTACLE


def nearest_neighbors(
    queries: Tensor,
    keys: Tensor,
    rotation: Tensor,
    widths: Sequence[int],
    *,
    metric: str = "euclidean",
    precision: str = "fp32",
    keys_rotated: bool = False,
    queries_rotated: bool = False,
) -> Neighbors:
    """Nearest key of every query inside every subspace; arguments as in ``ndm_fast.kernels.search``.

    Raises:
        InputError: a subspace is wider than 512.
    """
    if max(widths) > PADDED_WIDTHS[-1]:
        raise InputError(f"a subspace is {max(widths)} wide, the CUDA kernels take 512: use backend 'triton'")
    queries, keys = unit_columns(queries), unit_columns(keys)
    rotation = rotation.detach().float().contiguous()
    search = make_search(
        keys, metric, precision, keys_rotated=keys_rotated, queries_rotated=queries_rotated, fused=False
    )
    with device_of(queries):
        frame = make_frame(queries, keys, rotation, list(widths), search, exact=True)
        shape = (len(widths), len(queries))
        best = torch.full(shape, torch.inf, dtype=torch.float64, device=keys.device)
        index = torch.full(shape, NO_KEY, device=keys.device)
        for chunk in chunks(keys, frame, list(widths), search):
            for subspaces, columns, group in portions(widths, len(queries), len(chunk.rows), _tile):
                state = best[subspaces, group].contiguous(), index[subspaces, group].contiguous()
                _search_run(frame, chunk, subspaces, columns, group, search, state)
                best[subspaces, group], index[subspaces, group] = state
        return result(best, index, search.cosine)


def nearest_index(
    queries: Tensor, keys: Tensor, rotation: Tensor, widths: Sequence[int], metric: str, precision: str
) -> Tensor:
    """The index of :func:`nearest_neighbors`: here a search knows the distances anyway."""
    return nearest_neighbors(queries, keys, rotation, widths, metric=metric, precision=precision).index


def loss_and_gradient(
    queries: Tensor,
    keys: Tensor,
    index: Tensor,
    rotation: Tensor,
    widths: Sequence[int],
    metric: str,
    counted: Tensor | None = None,
    log_floor: Tensor | None = None,
) -> Objective:
    """Triton's kernels where triton can run, else torch code: there is no CUDA C++ for it."""
    run = _beside("kernels.gradient", "ops.plain", queries).loss_and_gradient
    found: Objective = run(queries, keys, index, rotation, widths, metric, counted, log_floor)
    return found


def lie_update(
    product: Tensor | None,
    first: Tensor,
    second: Tensor,
    scale: float | Tensor,
    guard: float | Tensor,
    betas: Sequence[float],
    half: bool = False,
) -> Tensor:
    """As :func:`loss_and_gradient`."""
    run = _beside("kernels.lie_update", "ops.plain", first).lie_update
    update: Tensor = run(product, first, second, scale, guard, betas, half)
    return update


def _beside(triton: str, plain: str, tensor: Tensor) -> ModuleType:
    return backends.load(triton if backends.why_no_triton(tensor.device) is None else plain)


def _padded(width: int) -> int:
    return next(p for p in PADDED_WIDTHS if p >= width)


def _tile(width: int) -> int:
    assert _cuda is not None
    return _cuda.tile_keys(_padded(width))


def _search_run(
    frame: Frame,
    chunk: KeyChunk,
    subspaces: slice,
    columns: slice,
    group: slice,
    search: Search,
    state: tuple[Tensor, Tensor],
) -> None:
    """Sweep and resolve for subspaces of one width and some of the queries; updates the state in place."""
    assert _cuda is not None
    count = subspaces.stop - subspaces.start
    width = (columns.stop - columns.start) // count
    padded = _padded(width)
    rotated, exact = frame.rotated[group][:, columns], frame.exact[group][:, columns]
    if len(rotated) > 1 and exact.stride() != rotated.stride():
        raise RuntimeError("rotated queries differ in layout")
    slots = -(-len(rotated) // _QUERY_BLOCK) * _QUERY_BLOCK
    scales = frame.keys.scales[subspaces]
    pack = pack_queries(rotated, scales, width, search.cosine, padded, 0, slots)
    rows, raw = chunk.rows[:, columns], frame.raw[group]
    turn = frame.rotation[:, columns]
    origin = None if chunk.origin is None else chunk.origin[columns]
    minima = torch.empty(count, len(rotated), -(-len(rows) // _tile(width)), device=rows.device)
    stream = torch.cuda.current_stream(rows.device).cuda_stream if rows.is_cuda else 0  # 0: tests
    sweep = _cuda.Sweep(
        *(_rows(rows), len(rows), 0 if origin is None else origin.data_ptr(), scales.data_ptr()),
        *(chunk.errors[subspaces].data_ptr(), pack.main.data_ptr(), len(rotated), slots, minima.data_ptr()),
        *(count, width, padded, search.cosine),
    )
    _cuda.sweep(sweep, stream)
    copy_rounding = rounding_of(rows.dtype) if search.in_half else 0.0
    _cuda.resolve(
        *(sweep, rotated.data_ptr(), exact.data_ptr(), rotated.stride(0)),
        *(pack.sizes.data_ptr(), pack.half_norms.data_ptr()),
        *((_NO_ROWS, _NO_ROWS) if search.keys_rotated else (_rows(raw), _rows(chunk.raw))),
        *(turn.data_ptr(), turn.stride(0), len(turn), chunk.first),
        *(max(copy_rounding, rounding_of(torch.float32)), copy_rounding),
        *(underflow_of(width), state[0].data_ptr(), state[1].data_ptr(), stream),
    )


def _rows(tensor: Tensor) -> tuple[int, int, int]:
    return tensor.data_ptr(), _TYPES[tensor.dtype], tensor.stride(0)
