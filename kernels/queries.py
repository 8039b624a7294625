"""What is asked of a search, and queries brought into the frame in which keys are compared with them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..geometry.precision import full_fp32
from .keys import FP16_MAX, KeyFrame, key_frame


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
    how = key_frame(keys, turn.float(), widths, search.cosine, search.keys_rotated)
    origin = how.origin.double()
    turned = None
    if exact or not search.in_half or search.cosine:
        turned = queries.double() if search.queries_rotated else queries.double() @ rotation.double()
    if search.in_half:
        with full_fp32():
            rotated = (queries.float() @ turn.float()).double()
        if not search.fused:  # the product takes it off in this type
            origin = how.origin.to(keys.dtype).double()
    else:
        assert turned is not None
        rotated = turned
        if how.raw_origin is not None and not search.fused:
            origin = how.raw_origin.double() @ rotation.double()
    rotated = rotated - origin
    return Frame(how, turn, rotated, rotated if turned is None else turned, queries, rotation)


class QueryPack(NamedTuple):
    """Queries in subspaces of one width."""

    main: Tensor
    """[s, slots, P1] fp16, scaled (cosine: unit vectors)."""
    rest: Tensor
    """[s, slots, P2] fp16, the columns from P1 on; zeros beyond the width."""
    sizes: Tensor
    """[s, Q] fp32 norms after scaling; inf where fp16 could not hold the query."""
    half_norms: Tensor
    """[s, Q] fp32 half squared norms of the fp16 queries."""


def pack_queries(
    rotated: Tensor, scales: Tensor, width: int, cosine: bool, main: int, rest: int, slots: int
) -> QueryPack:
    """Queries [Q, s * width] fp64 of s subspaces, packed for the sweep; ``slots`` is Q rounded up."""
    parts = rotated.unflatten(1, (len(scales), width)).transpose(0, 1)
    scaled = parts * scales[:, None, None]
    sizes = torch.linalg.vector_norm(scaled, dim=2)
    if cosine:
        scaled = scaled / torch.where(sizes > 0, sizes, 1)[..., None]
        sizes = torch.where(sizes.isnan(), sizes, 1.0)
    half = scaled.clamp(-FP16_MAX, FP16_MAX).half()
    packed = torch.zeros(len(scales), slots, main, dtype=torch.float16, device=rotated.device)
    packed[:, : len(rotated), : min(width, main)] = half[..., :main]
    # A kernel that takes no second part still takes an address.
    shape = (len(scales), slots if rest else 1, max(1, rest))
    packed_rest = torch.zeros(shape, dtype=torch.float16, device=rotated.device)
    if rest:
        packed_rest[:, : len(rotated), : width - main] = half[..., main:]
    beyond = scaled.abs().amax(2) > FP16_MAX
    half_norms = 0.5 * half.double().square().sum(2)
    if cosine:  # a zero vector has cosine 0 with everything
        half_norms = torch.where(half_norms == 0, 0.5, half_norms)
    return QueryPack(
        packed, packed_rest, torch.where(beyond, torch.inf, sizes).float().contiguous(), half_norms.float()
    )
