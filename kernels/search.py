"""Triton ops: any CUDA card, and Triton's interpreter on the CPU. Launches what ``kernels/`` holds.

Shapes and names as in ``geometry/reference.py``, which says what each op means; ``sweep.py`` and
``docs/kernels-gpu.md`` say how the search works. triton is imported at the first call, not with the package.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..geometry.columns import unit_columns
from ..geometry.reference import Neighbors
from .keys import rounding_of, underflow_of
from .launch import NO_KEY, Part, capability, chunks, device_of, portions, result
from .queries import Frame, QueryPack, Search, make_frame, make_search
from .rerank import rerank, settle
from .sweep import packed, sweep

if TYPE_CHECKING:
    from .tuning import Sweep

_MOST_TILES = 64
"""Tiles a query may visit in half precision; it then keeps the best of those it saw."""


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
        gives NaN distances; a key with NaN is nobody's neighbor.
    """
    with device_of(queries):
        rotated = {"keys_rotated": keys_rotated, "queries_rotated": queries_rotated}
        found = _search(queries, keys, rotation, widths, metric, precision, form, **rotated)
        best, index = found.near, found.candidates
        if found.search.in_half:
            best, index = rerank(found.frame, found.keys, index, widths, found.search)
        shape = len(widths), len(queries)
        return result(best.view(shape), index.view(shape), found.search.cosine)


def nearest_index(
    queries: Tensor,
    keys: Tensor,
    rotation: Tensor,
    widths: Sequence[int],
    *,
    metric: str = "euclidean",
    precision: str = "bf16",
    form: str | None = None,
) -> Tensor:
    """[S, Q] int64 rows of the keys that ``nearest_neighbors`` finds, without distances.

    Arguments as there. In half precision raw rows are read only for queries whose nearest the copy cannot
    tell to 1 %. Where no key is near (NaN), the row is 0.
    """
    if precision == "fp32":  # which decides by distances anyhow
        return nearest_neighbors(queries, keys, rotation, widths, metric=metric, form=form).index
    with device_of(queries):
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
    """[K, d] as given, neighboring columns next to each other."""
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
    from . import tuning

    queries, keys = unit_columns(queries), unit_columns(keys)
    rotation = rotation.detach().float().contiguous()
    form = form or tuning.FORM[tuning.architecture(capability(queries.device))]
    fused = form == "fused" and not keys_rotated and max(widths) <= tuning.WIDEST_IN_PLACE
    search = make_search(
        keys, metric, precision, keys_rotated=keys_rotated, queries_rotated=queries_rotated, fused=fused
    )
    frame = make_frame(queries, keys, rotation, list(widths), search, exact=False)
    slots = 1 if not search.in_half else 8 if keys.dtype == torch.bfloat16 else 4
    shape = (len(widths), len(queries), slots)
    best = torch.full(shape, torch.inf, dtype=torch.float64, device=keys.device)
    index = torch.full(shape, -1 if search.in_half else NO_KEY, device=keys.device)
    tiles_of = tile_choice(keys, search, len(queries))
    packs: dict[tuple[int, ...], QueryPack] = {}  # the same for every chunk of keys
    for chunk in chunks(keys, frame, list(widths), search):
        parts = portions(widths, len(queries), len(chunk.rows), lambda width: tiles_of(width).tile)
        for subspaces, columns, group in parts:
            state = best[subspaces, group].contiguous(), index[subspaces, group].contiguous()
            part = Part(frame, chunk, search, subspaces, columns, group)
            tiles = tiles_of(part.width)
            which = (subspaces.start, subspaces.stop, group.start, group.stop)
            if which not in packs:
                packs[which] = packed(part, tiles)
            resolve_part(part, tiles, sweep(part, tiles, packs[which]), packs[which], state)
            best[subspaces, group], index[subspaces, group] = state
    return _Found(frame, search, keys, best, index)


def tile_choice(keys: Tensor, search: Search, queries: int) -> Callable[[int], Sweep]:
    """Tiles by the width of subspaces. Keys can pass in fp16, centred by the product that rotates them."""
    from . import tuning

    in_place = keys.dtype == torch.float16 and search.in_half and not (search.fused or search.cosine)
    card = capability(keys.device)
    swept = keys.dtype if search.in_half or search.keys_rotated or search.fused else torch.float32
    return lambda width: tuning.sweep(card, width, queries if in_place else 0, str(swept)[6:])


def resolve_part(
    part: Part, tiles: Sweep, minima: Tensor, pack: QueryPack, state: tuple[Tensor, Tensor]
) -> None:
    """Brings best and index, [s, q, slots], up to date, after :func:`kernels.sweep.sweep`."""
    from . import look, resolve, tuning
    from .tiles import RAW, ROTATED, SLOTS

    search, frame = part.search, part.frame
    _, tile_count, slots = minima.shape
    few = look.look(minima, len(frame.rotated[part.group]))
    rotated, exact = frame.rotated[part.group][:, part.columns], frame.exact[part.group][:, part.columns]
    raw, keys, rotation = frame.raw[part.group], part.chunk.raw, frame.rotation[:, part.columns]
    mode = ROTATED if search.keys_rotated else SLOTS if search.in_half else RAW
    kind = {"fused": search.fused, "raw": mode is RAW, "cosine": search.cosine}
    shape = tuning.resolve_shape(
        part.width,
        tiles.tile,
        **kind,
        capability=capability(minima.device),
        few=tiles.streams > 0,
        keys=str(part.chunk.rows.dtype)[6:],
    )
    resolve.resolve_kernel[(len(rotated), part.subspace_count)](
        *(minima, tile_count, slots, *few, *part.keys(), part.chunk.first, *part.turn(), *part.scaling()),
        *(rotated, exact, rotated.stride(0), pack.sizes, pack.half_norms),
        *(raw, raw.stride(0), keys, keys.stride(0), rotation, rotation.stride(0), *state),
        rounding_of(part.chunk.rows.dtype if search.in_half else torch.float32),
        underflow_of(part.width),
        _MOST_TILES if search.in_half else 1 << 30,
        part.units,
        TILE=tiles.tile,
        SLOT_COUNT=state[0].shape[2],
        MODE=mode.value,
        FEW=look.FEW,
        **shape.constants(tile_count),
        **{**shape.options, **part.options(), **part.projection(), **tuning.OPTIONS},
    )
