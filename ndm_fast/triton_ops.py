"""Triton ops: any CUDA card, and Triton's interpreter on the CPU. Launches what ``kernels/`` holds.

Shapes and names as in ``ndm_fast.reference``, which says what each op means; ``kernels/nearest.py`` and
``docs/kernels.md`` say how the search works. triton is imported at the first call, never with the package.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ndm_fast import gpu_frame, gpu_search
from ndm_fast.centring import sample_mean
from ndm_fast.gpu_frame import Frame, Search
from ndm_fast.gpu_search import KeyChunk
from ndm_fast.objective import equal_width_runs
from ndm_fast.reference import Neighbors

_DISTANCE_BYTES = 1 << 25
"""Distances of the KSG estimate held at once: what a large card's second-level cache holds."""
_SEGMENT = 4096
"""Minima of one query in registers at once."""
_MOST_TILES = 64
"""Tiles a query may visit in half precision; it then keeps the best of those it saw."""
_OPTIONS = {"enable_fp_fusion": True}
"""Products and sums may fuse into one rounding; triton 3.9 warns where that is left open."""


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
        return None
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
    from ndm_fast.kernels import tuning

    queries, keys = gpu_search.unit_columns(queries), gpu_search.unit_columns(keys)
    rotation = rotation.detach().float().contiguous()
    form = form or tuning.FORM[tuning.architecture(_capability(queries.device))]
    fused = form == "fused" and not keys_rotated and max(widths) <= tuning.WIDEST_IN_PLACE
    search = gpu_frame.make_search(
        keys, metric, precision, keys_rotated=keys_rotated, queries_rotated=queries_rotated, fused=fused
    )
    with _device_of(queries):
        return _search(queries, keys, rotation, list(widths), search)


def ksg_radius(
    queries: Tensor,
    keys: Tensor,
    rotation: Tensor,
    widths: Sequence[int],
    variances: Tensor,
    pairs: Tensor,
    *,
    rotated: bool = False,
) -> Tensor:
    """[P, Q] fp32 ``min_k max(D_a, D_b)`` for every pair of subspaces and query.

    Args:
        queries, keys, rotation, widths: as for :func:`nearest_neighbors`.
        rotated: queries and keys are rotated already.
        variances: [S] total variance of each subspace; where it is 0, so are the distances.
        pairs: [P, 2] int64 numbers of subspaces.
    """
    from ndm_fast.kernels import ksg

    radius = torch.empty(len(pairs), len(queries), device=queries.device)
    pairs = pairs.contiguous()
    for group, distances in _scaled_distances(queries, keys, rotation, widths, variances, rotated):
        part = torch.empty(len(pairs), distances.shape[1], device=queries.device)
        ksg.radius_kernel[part.shape](
            distances, distances.shape[1], len(keys), pairs, part, KEY_BLOCK=1024, num_warps=4, **_OPTIONS
        )
        radius[:, group] = part
    return radius


def ksg_counts(
    queries: Tensor,
    keys: Tensor,
    rotation: Tensor,
    widths: Sequence[int],
    variances: Tensor,
    pairs: Tensor,
    radius: Tensor,
    *,
    rotated: bool = False,
) -> Tensor:
    """[P, 2, Q] int64: keys strictly closer than ``radius`` [P, Q], in each subspace of each pair.

    Arguments as for :func:`ksg_radius`, whose result is the radius: both read distances made by one kernel,
    so the key that sets a radius is never below it.
    """
    from ndm_fast.kernels import ksg

    counts = torch.empty(len(pairs), 2, len(queries), dtype=torch.int64, device=queries.device)
    pairs = pairs.contiguous()
    for group, distances in _scaled_distances(queries, keys, rotation, widths, variances, rotated):
        limits = radius[:, group].float().contiguous()
        part = torch.empty(len(pairs), 2, distances.shape[1], dtype=torch.int64, device=queries.device)
        ksg.counts_kernel[limits.shape](
            distances,
            distances.shape[1],
            len(keys),
            pairs,
            limits,
            part,
            KEY_BLOCK=1024,
            num_warps=4,
            **_OPTIONS,
        )
        counts[:, :, group] = part
    return counts


def _scaled_distances(
    queries: Tensor, keys: Tensor, rotation: Tensor, widths: Sequence[int], variances: Tensor, rotated: bool
) -> Iterator[tuple[slice, Tensor]]:
    """Groups of queries and their [S, q, K] fp32 distances over the root of each subspace's variance."""
    from ndm_fast.kernels import ksg

    origin, turn = sample_mean(keys), rotation.detach().float()
    centred = (rows.detach().float() - origin for rows in (queries, keys))
    with gpu_search.full_fp32():
        query_columns, key_columns = ((rows if rotated else rows @ turn).T.contiguous() for rows in centred)
    positive = variances.detach().double().clamp_min(0)
    inverse = torch.where(positive > 0, 1 / positive, 0).float()
    size = max(1, _DISTANCE_BYTES // (4 * len(widths) * len(keys)))
    for start in range(0, len(queries), size):
        group = slice(start, min(start + size, len(queries)))
        count = group.stop - start
        distances = torch.empty(len(widths), count, len(keys), device=keys.device)
        for subspaces, columns in equal_width_runs(widths):
            run = subspaces.stop - subspaces.start
            part, other = query_columns[columns, group], key_columns[columns]
            with _device_of(queries):
                ksg.distances_kernel[(-(-len(keys) // 128), -(-count // 32), run)](
                    *(part, part.stride(0), count, other, other.stride(0), len(keys)),
                    *(inverse[subspaces], distances[subspaces]),
                    WIDTH=(columns.stop - columns.start) // run, QUERY_BLOCK=32, KEY_BLOCK=128,
                    num_warps=4, **_OPTIONS,
                )  # fmt: skip
        yield group, distances


def _search(queries: Tensor, keys: Tensor, rotation: Tensor, widths: list[int], search: Search) -> Neighbors:
    from ndm_fast.kernels import tuning

    frame = gpu_frame.make_frame(queries, keys, rotation, widths, search, exact=False)
    slots = 1 if not search.in_half else 8 if keys.dtype == torch.bfloat16 else 4
    shape = (len(widths), len(queries), slots)
    best = torch.full(shape, torch.inf, dtype=torch.float64, device=keys.device)
    index = torch.full(shape, -1 if search.in_half else gpu_frame.NO_KEY, device=keys.device)
    for chunk in gpu_frame.chunks(keys, frame, widths, search):
        for subspaces, columns in equal_width_runs(widths):
            count = subspaces.stop - subspaces.start
            tile = tuning.sweep(_capability(keys.device), (columns.stop - columns.start) // count).tile
            for group in gpu_frame.groups(len(queries), len(chunk.rows), count, tile):
                state = best[subspaces, group].contiguous(), index[subspaces, group].contiguous()
                _search_run(frame, chunk, subspaces, columns, group, search, state)
                best[subspaces, group], index[subspaces, group] = state
    if search.in_half:
        best, index = _rerank(frame, keys, index, widths, search)
    return gpu_frame.result(best.view(shape[:2]), index.view(shape[:2]), search.cosine)


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
    from ndm_fast.kernels import nearest, tuning

    count = subspaces.stop - subspaces.start
    width = (columns.stop - columns.start) // count
    tiles = tuning.sweep(_capability(chunk.rows.device), width)
    main, rest = tuning.pieces(width)
    wide = width > tuning.WIDEST_IN_PLACE
    if wide:
        main, rest = -(-width // 64) * 64, 0
    rotated = frame.rotated[group]
    slots = -(-len(rotated) // tiles.query_block) * tiles.query_block
    pack = gpu_search.pack_queries(
        rotated[:, columns], frame.keys.scales[subspaces], width, search.cosine, main, rest, slots
    )
    rows = chunk.rows if search.fused else chunk.rows[:, columns]
    # Triton's interpreter multiplies the bits of bf16 as integers; in fp32 the products are the same.
    turn = (frame.turn if rows.is_cuda else frame.turn.float())[:, columns]
    origin = frame.keys.origin[columns] if chunk.origin is None else chunk.origin[columns]
    scales, errors = chunk.scales[subspaces], chunk.errors[subspaces]
    tile_count = -(-len(rows) // tiles.tile)
    minima = torch.empty(count, len(rotated), tile_count, device=rows.device)
    projection = {
        "CENTRE": chunk.origin is not None,
        "PROJECT": search.fused,
        "DEPTH_BLOCK": 64 if frame.turn.dtype != torch.float32 else 32,
        "DOT": "tf32x3",
    }
    launch = {"num_warps": tiles.warps, "num_stages": tiles.stages, **_OPTIONS}
    grid = (tile_count, count)
    if wide:
        nearest.sweep_wide_kernel[grid](
            *(rows, rows.stride(0), len(rows), origin, scales, errors, pack.main),
            *(len(rotated), slots, minima, tile_count),
            WIDTH=width, PADDED=main, TILE=tiles.tile, QUERY_BLOCK=tiles.query_block, PIECE=64,
            CENTRE=projection["CENTRE"], COSINE=search.cosine, **launch,
        )  # fmt: skip
    else:
        nearest.sweep_kernel[grid](
            *(rows, rows.stride(0), len(rows), turn, turn.stride(0), len(turn), origin, scales, errors),
            *(pack.main, pack.rest, len(rotated), slots, minima, tile_count),
            WIDTH=width, P1=main, P2=rest, TILE=tiles.tile, QUERY_BLOCK=tiles.query_block,
            STAGES=tiles.stages, COSINE=search.cosine, **projection, **launch,
        )  # fmt: skip
    shape = tuning.resolve_shape(width, tiles.tile, search.fused)
    exact, raw = frame.exact[group][:, columns], frame.raw[group]
    rotated, exact_turn = rotated[:, columns], frame.rotation[:, columns]
    mode = 0 if search.keys_rotated else 2 if search.in_half else 1  # as named in kernels/nearest.py
    nearest.resolve_kernel[(len(rotated), count)](
        *(minima, tile_count, rows, rows.stride(0), len(rows), chunk.first),
        *(turn, turn.stride(0), len(turn), origin, scales, errors),
        *(rotated, exact, rotated.stride(0), pack.sizes, pack.half_norms),
        *(raw, raw.stride(0), chunk.raw, chunk.raw.stride(0), exact_turn, exact_turn.stride(0)),
        *state,
        gpu_search.rounding_of(chunk.rows.dtype if search.in_half else torch.float32),
        gpu_search.underflow_of(width),
        _MOST_TILES if search.in_half else 1 << 30,
        WIDTH=width, TILE=tiles.tile, SLOT_COUNT=state[0].shape[2], MODE=mode,
        SEGMENT=min(_SEGMENT, _power_of_two(tile_count)), COSINE=search.cosine, **shape._asdict(),
        **projection, num_warps=4, **_OPTIONS,
    )  # fmt: skip


def _rerank(
    frame: Frame, keys: Tensor, candidates: Tensor, widths: list[int], search: Search
) -> tuple[Tensor, Tensor]:
    """Nearest of the candidates by their raw rows, [S, Q] fp64 and its index."""
    from ndm_fast.kernels import nearest, tuning

    best = torch.empty(candidates.shape[:2], dtype=torch.float64, device=keys.device)
    index = torch.empty(candidates.shape[:2], dtype=torch.int64, device=keys.device)
    slots = candidates.shape[2]
    double = search.cosine or tuning.architecture(_capability(keys.device)) in tuning.FP64_IS_FAST
    block = tuning.RERANK_ROWS // slots
    for subspaces, columns in equal_width_runs(widths):
        count = subspaces.stop - subspaces.start
        width = (columns.stop - columns.start) // count
        turn, exact = frame.rotation[:, columns], frame.exact[:, columns]
        nearest.rerank_kernel[(-(-len(frame.raw) // block), count)](
            *(frame.raw, frame.raw.stride(0), len(frame.raw), keys, keys.stride(0)),
            *(turn, turn.stride(0), len(turn), exact, exact.stride(0)),
            *(candidates[subspaces], best[subspaces], index[subspaces]),
            WIDTH=width, P=min(32, max(16, _power_of_two(width))), QUERY_BLOCK=block, SLOT_COUNT=slots,
            DEPTH_BLOCK=32, DOUBLE=double, COSINE=search.cosine, num_warps=4, **_OPTIONS,
        )  # fmt: skip
    return best, index


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


def _capability(device: torch.device) -> int:
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on torch's current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()
