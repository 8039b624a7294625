"""Triton ops: any CUDA card, and Triton's interpreter on the CPU. Launches what ``kernels/`` holds.

Shapes and names as in ``ndm_fast.reference``, which says what each op means; ``kernels/nearest.py`` and
``docs/kernels.md`` say how the search works. triton is imported at the first call, never with the package.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ndm_fast import gpu_frame, gpu_search
from ndm_fast.gpu_frame import Frame, Search
from ndm_fast.gpu_search import KeyChunk, QueryPack
from ndm_fast.reference import Neighbors
from ndm_fast.triton_ksg import ksg_counts, ksg_radius
from ndm_fast.triton_rerank import rerank, settle

if TYPE_CHECKING:
    from ndm_fast.kernels.tuning import Sweep

__all__ = [
    "available",
    "ksg_counts",
    "ksg_radius",
    "nearest_index",
    "nearest_neighbors",
    "why_unavailable",
]

_PIECE = 64
"""Columns of a wide subspace that are multiplied at once."""
_MOST_TILES = 64
"""Tiles a query may visit in half precision; it then keeps the best of those it saw."""


def available() -> bool:
    """Whether triton is installed."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton's interpreter is asked for, which runs kernels on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_unavailable(device: torch.device) -> str | None:
    """Why the ops cannot run on a device, or None where they can."""
    if not available():
        return "triton is not installed: pip install triton"
    if device.type == "cuda" and torch.version.hip is None:
        old = torch.cuda.get_device_capability(device) < (8, 0)
        return "its kernels need compute capability 8.0" if old else None
    if device.type == "cpu" and interpreted():
        return None if _can_interpret() else "set TRITON_INTERPRET=1 before triton is imported"
    return f"it runs on CUDA devices (and, slowly, on the CPU with TRITON_INTERPRET=1), not on {device.type}"


def _can_interpret() -> bool:
    """Triton decides whether it compiles or interprets when it is imported."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(tl.sum, InterpretedFunction)


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
    form: str | None = None,
) -> Neighbors:
    """Nearest key of every query inside every subspace.

    Args:
        queries: [Q, d] fp32, fp16 or bf16.
        keys: [K, d] likewise, or ``keys @ rotation`` where ``keys_rotated``.
        rotation: [d, d] orthogonal.
        widths: S widths that sum to d.
        metric: ``"euclidean"``, or ``"cosine"`` for which the distance is ``1 - cos``.
        precision: ``"fp32"`` rotates keys in fp32 and decides in fp64, and is exact; ``"bf16"`` rotates fp16
            and bf16 keys in their type and decides, in fp32 or better, between the few nearest by that.
        keys_rotated, queries_rotated: they are rotated already; the queries only where the keys are. Then the
            result is exact for either precision.
        form: ``"split"`` makes a rotated copy of (at most 1 GB of) the keys, ``"fused"`` none; default by
            architecture (``kernels/tuning.py``). Subspaces wider than 512 are always split.

    Returns:
        ``Neighbors(distance [S, Q] fp32, index [S, Q] int64)``; ties go to the lowest index. NaN in a query
        gives NaN distances; a key with NaN is nobody's neighbour.
    """
    with gpu_frame.device_of(queries):
        rotated = {"keys_rotated": keys_rotated, "queries_rotated": queries_rotated}
        found = _search(queries, keys, rotation, widths, metric, precision, form, **rotated)
        best, index = found.near, found.candidates
        if found.search.in_half:
            best, index = rerank(found.frame, found.keys, index, widths, found.search)
        shape = len(widths), len(queries)
        return gpu_frame.result(best.view(shape), index.view(shape), found.search.cosine)


def nearest_index(
    queries: Tensor,
    keys: Tensor,
    rotation: Tensor,
    widths: Sequence[int],
    *,
    metric: str = "euclidean",
    form: str | None = None,
) -> Tensor:
    """[S, Q] int64 rows of the keys that ``nearest_neighbors`` finds in half precision, without distances.

    Arguments as there. Raw rows are read only for queries whose nearest the copy cannot tell to 1 %. Where no
    key is near (NaN), the row is 0.
    """
    with gpu_frame.device_of(queries):
        found = _search(queries, keys, rotation, widths, metric, "bf16", form)
        if not found.search.in_half:  # fp32 keys
            return torch.where(found.near.isfinite(), found.candidates, 0)[..., 0]
        near, candidates = found.near, found.candidates
        return settle(found.frame, found.keys, near, candidates, widths, found.search).clamp_min(0)


class _Found(NamedTuple):
    """The nearest by what the kernels saw; in half precision several, by the rotated copy."""

    frame: Frame
    search: Search
    keys: Tensor
    """[K, d] as given, neighbouring columns next to each other."""
    near: Tensor
    """[S, Q, slots] fp64 squared distance, 1 - cos, or (half precision) scaled distance by the copy."""
    candidates: Tensor
    """[S, Q, slots] int64."""


def _search(
    queries: Tensor,
    keys: Tensor,
    rotation: Tensor,
    widths: Sequence[int],
    metric: str,
    precision: str,
    form: str | None,
    *,
    keys_rotated: bool = False,
    queries_rotated: bool = False,
) -> _Found:
    from ndm_fast.kernels import tuning

    queries, keys = gpu_search.unit_columns(queries), gpu_search.unit_columns(keys)
    rotation = rotation.detach().float().contiguous()
    form = form or tuning.FORM[tuning.architecture(gpu_frame.capability(queries.device))]
    fused = form == "fused" and not keys_rotated and max(widths) <= tuning.WIDEST_IN_PLACE
    search = gpu_frame.make_search(
        keys, metric, precision, keys_rotated=keys_rotated, queries_rotated=queries_rotated, fused=fused
    )
    frame = gpu_frame.make_frame(queries, keys, rotation, list(widths), search, exact=False)
    slots = 1 if not search.in_half else 8 if keys.dtype == torch.bfloat16 else 4
    shape = (len(widths), len(queries), slots)
    best = torch.full(shape, torch.inf, dtype=torch.float64, device=keys.device)
    index = torch.full(shape, -1 if search.in_half else gpu_frame.NO_KEY, device=keys.device)
    capability = gpu_frame.capability(keys.device)
    for chunk in gpu_frame.chunks(keys, frame, list(widths), search):
        portions = gpu_frame.portions(
            widths, len(queries), len(chunk.rows), lambda width: tuning.sweep(capability, width).tile
        )
        for subspaces, columns, group in portions:
            state = best[subspaces, group].contiguous(), index[subspaces, group].contiguous()
            _search_part(_Part(frame, chunk, search, subspaces, columns, group), state)
            best[subspaces, group], index[subspaces, group] = state
    return _Found(frame, search, keys, best, index)


class _Part(NamedTuple):
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

    def keys(self) -> tuple[Tensor, int, int]:
        """Arguments of both kernels: rows, their stride and number."""
        rows = self.chunk.rows if self.search.fused else self.chunk.rows[:, self.columns]
        return rows, rows.stride(0), len(rows)

    def turn(self) -> tuple[Tensor, int, int]:
        """Arguments of both kernels: rotation, its stride and depth."""
        # Triton's interpreter multiplies the bits of bf16 as integers; in fp32 the products are the same.
        turn = self.frame.turn if self.chunk.rows.is_cuda else self.frame.turn.float()
        return turn[:, self.columns], turn.stride(0), len(turn)

    def scaling(self) -> tuple[Tensor, Tensor, Tensor]:
        """Arguments of both kernels: origin (not read where it is off), scales and errors."""
        origin = self.frame.keys.origin if self.chunk.origin is None else self.chunk.origin
        return origin[self.columns], self.chunk.scales[self.subspaces], self.chunk.errors[self.subspaces]

    def options(self) -> dict[str, object]:
        """Compile-time choices that both kernels share."""
        return {
            "WIDTH": self.width,
            "CENTRE": self.chunk.origin is not None,
            "COSINE": self.search.cosine,
        }

    def projection(self) -> dict[str, object]:
        """How a tile of raw keys is rotated, where that is not done before."""
        depth = 32 if self.frame.turn.dtype == torch.float32 else 64
        return {"PROJECT": self.search.fused, "DEPTH_BLOCK": depth, "DOT": "tf32x3"}


def _sweep(part: _Part, tiles: Sweep) -> tuple[Tensor, QueryPack]:
    """[s, q, tiles] least value of every query over every tile of keys, and the queries as swept."""
    from ndm_fast.kernels import nearest, tuning

    rotated = part.frame.rotated[part.group][:, part.columns]
    slots = -(-len(rotated) // tiles.query_block) * tiles.query_block
    wide = part.width > tuning.WIDEST_IN_PLACE
    main, rest = (-(-part.width // _PIECE) * _PIECE, 0) if wide else tuning.pieces(part.width)
    scales = part.frame.keys.scales[part.subspaces]
    pack = gpu_search.pack_queries(rotated, scales, part.width, part.search.cosine, main, rest, slots)
    tile_count = -(-len(part.chunk.rows) // tiles.tile)
    minima = torch.empty(part.subspace_count, len(rotated), tile_count, device=rotated.device)
    queries = (len(rotated), slots, minima, tile_count)
    options = {"TILE": tiles.tile, "QUERY_BLOCK": tiles.query_block, **part.options()}
    options |= {"num_warps": tiles.warps, "num_stages": tiles.stages, **tuning.OPTIONS}
    grid = (tile_count, part.subspace_count)
    if wide:
        nearest.sweep_wide_kernel[grid](
            *part.keys(), *part.scaling(), pack.main, *queries, PADDED=main, PIECE=_PIECE, **options
        )
    else:
        nearest.sweep_kernel[grid](
            *(*part.keys(), *part.turn(), *part.scaling(), pack.main, pack.rest, *queries),
            **{"P1": main, "P2": rest, "STAGES": tiles.stages, **part.projection(), **options},
        )
    return minima, pack


def _search_part(part: _Part, state: tuple[Tensor, Tensor]) -> None:
    """Sweeps and resolves; brings best and index, [s, q, slots], up to date."""
    from ndm_fast.kernels import resolve, tuning

    search, frame = part.search, part.frame
    tiles = tuning.sweep(gpu_frame.capability(part.chunk.rows.device), part.width)
    minima, pack = _sweep(part, tiles)
    rotated, exact = frame.rotated[part.group][:, part.columns], frame.exact[part.group][:, part.columns]
    raw, keys, rotation = frame.raw[part.group], part.chunk.raw, frame.rotation[:, part.columns]
    mode = resolve.ROTATED if search.keys_rotated else resolve.SLOTS if search.in_half else resolve.RAW
    shape = tuning.resolve_shape(part.width, tiles.tile, fused=search.fused, raw=mode is resolve.RAW)
    resolve.resolve_kernel[(len(rotated), part.subspace_count)](
        *(minima, minima.shape[2], *part.keys(), part.chunk.first, *part.turn(), *part.scaling()),
        *(rotated, exact, rotated.stride(0), pack.sizes, pack.half_norms),
        *(raw, raw.stride(0), keys, keys.stride(0), rotation, rotation.stride(0), *state),
        gpu_search.rounding_of(part.chunk.rows.dtype if search.in_half else torch.float32),
        gpu_search.underflow_of(part.width),
        _MOST_TILES if search.in_half else 1 << 30,
        TILE=tiles.tile,
        SLOT_COUNT=state[0].shape[2],
        MODE=mode.value,
        **shape.constants(minima.shape[2]),
        **{**shape.options, **part.options(), **part.projection(), **tuning.OPTIONS},
    )
