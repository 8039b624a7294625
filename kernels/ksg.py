"""Distances and reductions of the KSG estimator (Kraskov, Stögbauer & Grassberger 2004, algorithm 1, k = 1).

The distances of a block of queries are written once, [S, Q, K], and both passes read what this one kernel
wrote: so a key that sets a radius is never below it, and a pair costs a maximum and a minimum, not a product.
"""

import triton
import triton.language as tl


@triton.jit
def distances_kernel(
    queries,  # [d, Q] fp32 rotated and centred, from the first row of these subspaces on
    query_stride,
    query_count,
    keys,  # [d, K] likewise
    key_stride,
    key_count,
    inverse_variances,  # [S] fp32, 0 for a subspace without variance
    distances,  # [S, Q, K] fp32
    WIDTH: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
):
    """Grid (key blocks, query blocks, S). From differences, which do not cancel; scaled after the sum."""
    s = tl.program_id(2).to(tl.int64)
    q = tl.program_id(1).to(tl.int64) * QUERY_BLOCK + tl.arange(0, QUERY_BLOCK)
    k = tl.program_id(0).to(tl.int64) * KEY_BLOCK + tl.arange(0, KEY_BLOCK)
    total = tl.zeros([QUERY_BLOCK, KEY_BLOCK], tl.float32)
    for column in range(WIDTH):
        at = s * WIDTH + column
        query = tl.load(queries + at * query_stride + q, mask=q < query_count, other=0.0)
        key = tl.load(keys + at * key_stride + k, mask=k < key_count, other=0.0)
        delta = query[:, None] - key[None, :]
        total += delta * delta
    tl.store(
        distances + (s * query_count + q[:, None]) * key_count + k[None, :],
        tl.sqrt_rn(total * tl.load(inverse_variances + s)),
        mask=(q < query_count)[:, None] & (k < key_count)[None, :],
    )


@triton.jit
def radius_kernel(
    distances,  # [S, Q, K] fp32
    query_count,
    key_count,
    pairs,  # [P, 2] int64
    radius,  # [P, Q] fp32
    KEY_BLOCK: tl.constexpr,
):
    """Grid (P, Q): neighbouring blocks share a query, whose distances stay in the caches. NaN stays NaN."""
    pair, q = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    a = distances + (tl.load(pairs + 2 * pair) * query_count + q) * key_count
    b = distances + (tl.load(pairs + 2 * pair + 1) * query_count + q) * key_count
    least = tl.full([KEY_BLOCK], float("inf"), tl.float32)
    for start in range(0, key_count, KEY_BLOCK):
        k = start + tl.arange(0, KEY_BLOCK)
        one = tl.load(a + k, mask=k < key_count, other=float("inf"))
        two = tl.load(b + k, mask=k < key_count, other=float("inf"))
        farther = tl.maximum(one, two, propagate_nan=tl.PropagateNan.ALL)
        least = tl.minimum(least, farther, propagate_nan=tl.PropagateNan.ALL)
    has_nan = tl.sum((least != least).to(tl.int32), 0) > 0
    tl.store(radius + pair * query_count + q, tl.where(has_nan, float("nan"), tl.min(least, 0)))


@triton.jit
def counts_kernel(
    distances,  # [S, Q, K] fp32
    query_count,
    key_count,
    pairs,  # [P, 2] int64
    limits,  # [P, Q] fp32
    counts,  # [P, 2, Q] int64
    KEY_BLOCK: tl.constexpr,
):
    """Grid (P, Q). Keys strictly below the limit, in each subspace of the pair."""
    pair, q = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    a = distances + (tl.load(pairs + 2 * pair) * query_count + q) * key_count
    b = distances + (tl.load(pairs + 2 * pair + 1) * query_count + q) * key_count
    limit = tl.load(limits + pair * query_count + q)
    below_a = tl.zeros([KEY_BLOCK], tl.int32)
    below_b = tl.zeros([KEY_BLOCK], tl.int32)
    for start in range(0, key_count, KEY_BLOCK):
        k = start + tl.arange(0, KEY_BLOCK)
        below_a += (tl.load(a + k, mask=k < key_count, other=float("inf")) < limit).to(tl.int32)
        below_b += (tl.load(b + k, mask=k < key_count, other=float("inf")) < limit).to(tl.int32)
    tl.store(counts + (2 * pair) * query_count + q, tl.sum(below_a, 0).to(tl.int64))
    tl.store(counts + (2 * pair + 1) * query_count + q, tl.sum(below_b, 0).to(tl.int64))
