"""The exact pass over the few keys that ``resolve.py`` kept for each query, or for some of the queries."""

import triton
import triton.language as tl
from ndm_fast.kernels.nearest import NO_ROW, inverse_norm


@triton.jit
def _operands(
    raw_queries,
    raw_query_stride,
    raw_keys,
    raw_key_stride,
    q,  # [N]
    row,  # [N]
    real,  # [N]
    rotation,
    rotation_stride,
    columns,  # [P]
    inside,  # [P]
    deep,  # [D] coordinates of raw rows
    depth,
    DOUBLE: tl.constexpr,
    COSINE: tl.constexpr,
):
    """[N, D] differences of raw rows (cosine: keys) and [D, P] of the rotation, fp64 or fp32."""
    mask = real[:, None] & (deep < depth)[None, :]
    part = tl.load(raw_keys + row[:, None] * raw_key_stride + deep[None, :], mask=mask, other=0.0)
    part = part.to(tl.float64 if DOUBLE else tl.float32)
    if not COSINE:
        query = tl.load(raw_queries + q[:, None] * raw_query_stride + deep[None, :], mask=mask, other=0.0)
        part = query.to(part.dtype) - part
    basis = tl.load(
        rotation + deep[:, None] * rotation_stride + columns[None, :],
        mask=(deep < depth)[:, None] & inside[None, :],
        other=0.0,
    )
    return part, basis.to(part.dtype)


@triton.jit
def _query(listed, place, count, LISTED: tl.constexpr):
    """[N] int64 numbers of the queries at these places."""
    if LISTED:
        return tl.load(listed + place, mask=place < count, other=0).to(tl.int64)
    return place


@triton.jit
def rerank_kernel(
    raw_queries,  # [Q, d]
    raw_query_stride,
    query_count,
    raw_keys,  # [K, d]
    raw_key_stride,
    rotation,  # [d, d] fp32, from the first column of these subspaces on
    rotation_stride,
    depth,
    queries,  # [Q, d] fp64 rotated, COSINE only
    query_stride,
    candidates,  # [S, Q, SLOT_COUNT] int64, -1 for none
    listed,  # [S, Q] int32 the queries to look at, LISTED only
    listed_counts,  # [S] int32 how many of them count
    best,  # [S, Q] fp64: squared distance, or 1 - cos
    index,  # [S, Q] int64
    WIDTH: tl.constexpr,
    P: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    SLOT_COUNT: tl.constexpr,
    DEPTH_BLOCK: tl.constexpr,
    LISTED: tl.constexpr,
    DOUBLE: tl.constexpr,
    COSINE: tl.constexpr,
):
    """Grid (query blocks, S). The nearest of each query's candidates, from the raw rows.

    Projects ``q - k``, so that what query and key share cancels before it is rounded. Sums over blocks of the
    depth are in fp64; with DOUBLE the products are too.
    """
    s = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * QUERY_BLOCK
    count = query_count
    if LISTED:
        count = tl.load(listed_counts + s)
        if first >= count:
            return
    entries = tl.arange(0, QUERY_BLOCK * SLOT_COUNT)
    place = first + entries // SLOT_COUNT
    q = _query(listed + s * query_count, place, count, LISTED)
    row = tl.load(
        candidates + (s * query_count + q) * SLOT_COUNT + entries % SLOT_COUNT, mask=place < count, other=-1
    )
    real = row >= 0
    found = tl.zeros([QUERY_BLOCK * SLOT_COUNT], tl.float64)
    query_norm = tl.zeros([QUERY_BLOCK * SLOT_COUNT], tl.float64)
    key_norm = tl.zeros([QUERY_BLOCK * SLOT_COUNT], tl.float64)
    for piece in range(0, WIDTH, P):
        columns = piece + tl.arange(0, P)
        inside = columns < WIDTH
        total = tl.zeros([QUERY_BLOCK * SLOT_COUNT, P], tl.float64)
        # Carried from one turn to the next: triton 3.6 fails to compile an fp64 product of what it sees was
        # narrower when it was loaded.
        part, basis = _operands(
            raw_queries, raw_query_stride, raw_keys, raw_key_stride, q, row, real, rotation, rotation_stride,
            s * WIDTH + columns, inside, tl.arange(0, DEPTH_BLOCK), depth, DOUBLE, COSINE,
        )  # fmt: skip
        for start in range(0, depth, DEPTH_BLOCK):
            if DOUBLE:
                total = tl.dot(part, basis, total, out_dtype=tl.float64)
            else:
                total += tl.dot(part, basis, input_precision="ieee").to(tl.float64)
            part, basis = _operands(
                raw_queries, raw_query_stride, raw_keys, raw_key_stride, q, row, real, rotation,
                rotation_stride, s * WIDTH + columns, inside, start + DEPTH_BLOCK + tl.arange(0, DEPTH_BLOCK),
                depth, DOUBLE, COSINE,
            )  # fmt: skip
        if COSINE:
            query = tl.load(
                queries + q[:, None] * query_stride + (s * WIDTH + columns)[None, :],
                mask=real[:, None] & inside[None, :],
                other=0.0,
            )
            found += tl.sum(total * query, 1)
            key_norm += tl.sum(total * total, 1)
            query_norm += tl.sum(query * query, 1)
        else:
            found += tl.sum(total * total, 1)
    if COSINE:
        found = 1 - found * inverse_norm(key_norm * query_norm)
    found = tl.where(real & (found == found), found, float("inf"))
    found = tl.reshape(found, [QUERY_BLOCK, SLOT_COUNT])
    row = tl.reshape(row, [QUERY_BLOCK, SLOT_COUNT])
    nearest = tl.min(found, 1)
    chosen = tl.min(tl.where(found == nearest[:, None], row, NO_ROW), 1)
    place = first + tl.arange(0, QUERY_BLOCK)
    q = _query(listed + s * query_count, place, count, LISTED)
    tl.store(best + s * query_count + q, nearest, mask=place < count)
    tl.store(index + s * query_count + q, chosen, mask=place < count)
