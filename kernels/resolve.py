"""The search that decides which key is nearest, after the sweep of ``sweep.py``, which has the bound."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import NO_ROW, RAW, ROTATED, SLOTS, exact_raw, inverse_norm, load_tile


@triton.jit
def _inside(columns, width, ALL: tl.constexpr):
    """[D] which columns a subspace has; where that is all of them, the compiler sees it."""
    if ALL:
        return tl.full(columns.shape, 1, tl.int1)
    else:  # noqa: RET505 - triton compiles what follows a return
        return columns < width


@triton.jit
def _distances(
    keys,
    key_stride,
    rows,
    valid,
    rotation,
    rotation_stride,
    depth,
    origin,
    scale,
    error,
    query,  # [D] fp64
    query_factor,  # makes the query comparable to a tile
    query_norm,  # squared, of the exact query
    width,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    PIECE: tl.constexpr,
    TOGETHER: tl.constexpr,
    WHOLE: tl.constexpr,
    MODE: tl.constexpr,
    CENTRE: tl.constexpr,
    PROJECT: tl.constexpr,
    COSINE: tl.constexpr,
    DEPTH_BLOCK: tl.constexpr,
    DOT: tl.constexpr,
):
    """[N] squared distances or 1 - cos in fp64 (ROTATED), or scaled distances in fp32; and their errors.

    Piece by piece, of which a thread has whole rows: nothing is summed over lanes. inf for keys that are not
    there, or NaN.
    """
    TYPE: tl.constexpr = tl.float64 if MODE == ROTATED else tl.float32
    squared = tl.zeros([CHUNK], TYPE)
    dot = tl.zeros([CHUNK], TYPE)
    inverse = tl.zeros([CHUNK], TYPE)
    if COSINE:
        for start in range(0, width, PIECE * TOGETHER):
            for piece in tl.static_range(TOGETHER):
                columns = start + (piece * PIECE + tl.arange(0, PIECE))
                inside = _inside(columns, width, WHOLE or (piece == 0 and ALIGNED % PIECE == 0))
                tile = load_tile(
                    keys, key_stride, rows, valid, columns, inside, rotation, rotation_stride, depth,
                    origin, scale, MODE, CENTRE, PROJECT, DEPTH_BLOCK, DOT,
                )  # fmt: skip
                squared += tl.sum(tile * tile, 1)
        inverse = inverse_norm(squared)
        squared = tl.zeros([CHUNK], TYPE)
    for start in range(0, width, PIECE * TOGETHER):
        for piece in tl.static_range(TOGETHER):
            columns = start + (piece * PIECE + tl.arange(0, PIECE))
            inside = _inside(columns, width, WHOLE or (piece == 0 and ALIGNED % PIECE == 0))
            tile = load_tile(
                keys, key_stride, rows, valid, columns, inside, rotation, rotation_stride, depth,
                origin, scale, MODE, CENTRE, PROJECT, DEPTH_BLOCK, DOT,
            )  # fmt: skip
            wanted = tl.load(query + columns, mask=inside, other=0.0)
            wanted = (wanted * query_factor).to(TYPE)[None, :]
            if MODE == ROTATED and COSINE:
                dot += tl.sum(tile * wanted, 1)
            else:
                if COSINE:
                    tile *= inverse[:, None]
                delta = tile - wanted
                squared += tl.sum(delta * delta, 1)
    slack = tl.zeros([CHUNK], tl.float32)
    if MODE == ROTATED:
        found = 1 - dot * inverse * inverse_norm(query_norm) if COSINE else squared
    else:
        found = tl.sqrt(squared)
        slack += error
        if COSINE:
            slack *= inverse
            # A zero vector has cosine 0 with everything.
            found = tl.where(inverse * query_norm == 0, 1.4142135, found)
    return tl.where(valid & (found == found), found, float("inf")), slack


@triton.jit
def _keep_nearest(found, rows, first_key, held, held_index):
    """The held neighbor, or the nearest of these: of equal ones that with the lowest index."""
    nearest = tl.min(found, 0)
    row = tl.min(tl.where(found == nearest, rows + first_key, NO_ROW), 0)
    better = (nearest < held) | ((nearest == held) & (row < held_index))
    return tl.where(better, nearest, held), tl.where(better, row, held_index)


@triton.jit
def _keep_few(near, rows, first_key, held, held_index, slots, SLOT_COUNT: tl.constexpr):
    """The nearest few of the held ones and these."""
    worst, last = _worst(held, held_index)
    nearest = tl.min(near, 0)
    row = tl.min(tl.where(near == nearest, rows, NO_ROW), 0)
    while (nearest < worst) | ((nearest == worst) & (nearest < float("inf")) & (row + first_key < last)):
        slot = tl.min(tl.where((held == worst) & (held_index == last), slots, SLOT_COUNT), 0)
        held = tl.where(slots == slot, nearest.to(tl.float64), held)
        held_index = tl.where(slots == slot, row + first_key, held_index)
        worst, last = _worst(held, held_index)
        near = tl.where(rows == row, float("inf"), near)
        nearest = tl.min(near, 0)
        row = tl.min(tl.where(near == nearest, rows, NO_ROW), 0)
    return held, held_index


@triton.jit
def _next_tile(minima, tiles, query_slots, last, last_number, SEGMENT: tl.constexpr):
    """Least value of the sweep after ``last``, and the first tile that has it; equal values go by tile."""
    least = tl.full([], float("inf"), tl.float32)
    tile = tl.full([], 0, tl.int32)
    for start in range(0, tiles, SEGMENT):
        numbers = start + tl.arange(0, SEGMENT)
        lows = tl.load(minima + numbers.to(tl.int64) * query_slots, mask=numbers < tiles, other=float("inf"))
        after = (lows > last) | ((lows == last) & (numbers > last_number))
        lows = tl.where(after, lows, float("inf"))
        low = tl.min(lows, 0)
        number = tl.min(tl.where(lows == low, numbers, 2147483647), 0)
        tile = tl.where(low < least, number, tile)
        least = tl.minimum(least, low)
    return least, tile


@triton.jit(do_not_specialize=["width"], do_not_specialize_on_alignment=["scales", "errors"])
def resolve_kernel(
    minima,  # [S, tiles, query_slots] fp32, of sweep_kernel
    tiles,
    query_slots,
    few,  # [S, Q, FEW] fp32, of look_kernel
    few_tiles,  # [S, Q, FEW] int32
    keys,  # as in sweep_kernel
    key_stride,
    key_count,
    first_key,  # number of the first of these keys among all
    rotation,
    rotation_stride,
    depth,
    origin,
    scales,
    errors,
    queries,  # [Q, d] fp64 rotated; centred like the keys are after CENTRE
    exact_queries,  # [Q, d] fp64 rotated, not centred
    query_stride,
    sizes,  # [S, Q] fp32 |q| after scaling (cosine: 1); inf: visit everything
    half_norms,  # [S, Q] fp32 |q^|^2/2 (a zero vector's cosine: 1/2)
    raw_queries,  # [Q, d], RAW only, from column 0 on
    raw_query_stride,
    raw_keys,  # [K, d], RAW only
    raw_key_stride,
    exact_rotation,  # [d, d] fp32, RAW only
    exact_rotation_stride,
    best,  # [S, Q, SLOT_COUNT] fp64: squared distance, 1 - cos, or (SLOTS) approximate scaled distance
    index,  # [S, Q, SLOT_COUNT] int64
    rounding,  # u of the module's docstring
    absolute,  # error where fp16 underflows
    most_tiles,
    width,  # in ALIGNED columns
    ALIGNED: tl.constexpr,
    P: tl.constexpr,  # not below the width: RAW or COSINE only
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    PIECE: tl.constexpr,
    TOGETHER: tl.constexpr,
    WHOLE: tl.constexpr,  # the width is a multiple of PIECE * TOGETHER
    SEGMENT: tl.constexpr,
    DEEP: tl.constexpr,
    SLOT_COUNT: tl.constexpr,
    FEW: tl.constexpr,
    MODE: tl.constexpr,
    CENTRE: tl.constexpr,
    PROJECT: tl.constexpr,
    COSINE: tl.constexpr,
    DEPTH_BLOCK: tl.constexpr,
    DOT: tl.constexpr,
):
    """Grid (Q, S). Goes on from the state in ``best`` and ``index``; ties go to the lowest index.

    Tiles are visited in the order of their least value: the first few as ``look.py`` found them, each further
    one by a look at all.
    """
    # So triton knows how wide loads may be. Where it projects, masks would cost in the inner loop.
    width = ALIGNED if PROJECT else width * ALIGNED
    q, s = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at = s * tl.num_programs(0) + q
    column = s * width
    columns = tl.arange(0, P)
    scale, error = tl.load(scales + s), tl.load(errors + s)
    size, half_norm = tl.load(sizes + at), tl.load(half_norms + at)
    queries += q * query_stride + column
    exact_queries += q * query_stride + column
    if not PROJECT:
        keys += column
    rotation += column
    origin += column
    exact_rotation += column
    exact_query, centred = tl.zeros([P], tl.float64), tl.zeros([P], tl.float64)
    if MODE == RAW or COSINE:
        exact_query = tl.load(exact_queries + columns, mask=columns < width, other=0.0)
        centred = tl.load(queries + columns, mask=columns < width, other=0.0) * scale
    exact_norm = tl.sum(exact_query * exact_query, 0)
    span = tl.sqrt(tl.sum(centred * centred, 0)).to(tl.float32)
    factor = scale.to(tl.float64)
    if MODE == ROTATED:
        queries = exact_queries
        factor = tl.full([], 1.0, tl.float64)
    elif COSINE:
        factor *= inverse_norm(tl.sum(centred * centred, 0))
        span = tl.where(span > 0, 1.0, 0.0)

    slots = tl.arange(0, SLOT_COUNT)
    held = tl.load(best + at * SLOT_COUNT + slots)
    held_index = tl.load(index + at * SLOT_COUNT + slots)
    minima += s * tiles * query_slots + q
    few += at * FEW
    few_tiles += at * FEW
    low, number = tl.load(few), tl.load(few_tiles)
    visited = 0
    reach = _reach(tl.min(held, 0), scale, MODE, COSINE)
    limit = _threshold(reach, size, half_norm, error, rounding, absolute, width, COSINE)
    while (low < float("inf")) & (low <= limit) & (visited < most_tiles):
        visited += 1
        for chunk in range(0, TILE, CHUNK):
            rows = number.to(tl.int64) * TILE + chunk + tl.arange(0, CHUNK)
            found, slack = _distances(
                keys, key_stride, rows, rows < key_count, rotation, rotation_stride, depth, origin,
                scale, error, queries, factor, exact_norm, width, ALIGNED, CHUNK, PIECE, TOGETHER, WHOLE,
                MODE, CENTRE, PROJECT, COSINE, DEPTH_BLOCK, DOT,
            )  # fmt: skip
            if MODE == ROTATED:
                held, held_index = _keep_nearest(found, rows, first_key, held, held_index)
            elif MODE == SLOTS:
                held, held_index = _keep_few(found, rows, first_key, held, held_index, slots, SLOT_COUNT)
            else:
                near = tl.maximum(found * (1 - 1e-6) - slack, 0.0)
                nearest = tl.min(near, 0)
                while (nearest < float("inf")) & (nearest <= reach + 1e-6 * span):
                    row = tl.min(tl.where(near == nearest, rows, NO_ROW), 0)
                    near = tl.where(rows == row, float("inf"), near)
                    exact = exact_raw(
                        raw_queries + q * raw_query_stride, raw_keys + row * raw_key_stride, exact_rotation,
                        exact_rotation_stride, depth, exact_query, width, P, DEEP, COSINE,
                    )  # fmt: skip
                    row += first_key
                    better = (exact < held) | ((exact == held) & (row < held_index))
                    held = tl.where(better, exact, held)
                    held_index = tl.where(better, row, held_index)
                    reach = _reach(tl.min(held, 0), scale, MODE, COSINE)
                    nearest = tl.min(near, 0)
        reach = _reach(tl.min(held, 0), scale, MODE, COSINE)
        limit = _threshold(reach, size, half_norm, error, rounding, absolute, width, COSINE)
        few += 1
        few_tiles += 1
        if visited < FEW:
            low, number = tl.load(few), tl.load(few_tiles)
        else:
            low, number = _next_tile(minima, tiles, query_slots, low, number, SEGMENT)
    tl.store(best + at * SLOT_COUNT + slots, held)
    tl.store(index + at * SLOT_COUNT + slots, held_index)


@triton.jit
def _worst(held, held_index):
    """The entry to give up first: the farthest, of those the one with the highest index."""
    worst = tl.max(held, 0)
    return worst, tl.max(tl.where(held == worst, held_index, -1), 0)


@triton.jit
def _reach(best, scale, MODE: tl.constexpr, COSINE: tl.constexpr):
    """Scaled distance of the best key known; for cosine, that between the unit vectors."""
    if MODE == SLOTS:
        return best.to(tl.float32)
    if COSINE:
        return tl.sqrt(2 * tl.maximum(best, 0.0)).to(tl.float32)
    return (tl.sqrt(best) * scale).to(tl.float32)


@triton.jit
def _threshold(reach, size, half_norm, error, rounding, absolute, width, COSINE: tl.constexpr):
    """Least value of the sweep above which a tile holds no key within reach."""
    around = 2 * size + reach
    far = reach + rounding * around + absolute
    if not COSINE:  # there the sweep has taken it off already, key by key
        far += error
    # fp32 accumulation in the tensor cores, which may truncate, and of the norms.
    accumulation = (width * 0.125 + 8) * 1.2e-7
    return 0.5 * far * far - half_norm + accumulation * around * around
