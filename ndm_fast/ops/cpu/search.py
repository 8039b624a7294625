"""Compiled CPU ops of the search and the MI estimate: rotates through BLAS, and calls ``ndm_fast._C``.

Shapes and names as in ``ndm_fast.geometry.reference``, which says what each op means;
``docs/kernels-cpu.md`` says how they are made fast.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ndm_fast.geometry import shadow
from ndm_fast.geometry.centring import sample_mean
from ndm_fast.geometry.columns import unit_columns
from ndm_fast.geometry.reference import Neighbors
from ndm_fast.ops.cpu.extension import extension, isa, offsets_of, rows_of
from ndm_fast.ops.cpu.product import rotate_centred

_UNIT = 2.0**-24
"""Unit roundoff of fp32."""


_EXACT_ELEMENTS = 1 << 20
"""Elements of the rotation that are in fp64 at once: 8 MB."""


_QUERY_ELEMENTS = 5 << 19
"""Elements of a block of queries searched at once; 20 MB in fp64, 10 MB packed in fp32."""


_NO_ROWS = (0, 0, 0)


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
    """Nearest key of every query inside every subspace, exact (see ``docs/kernels-cpu.md`` for the bounds).

    Args:
        queries: [Q, d] fp32, fp16 or bf16, on the CPU.
        keys: [K, d] likewise, or ``keys @ rotation`` where ``keys_rotated``. Rows may be strided.
        rotation: [d, d] fp32, orthogonal.
        widths: S widths that sum to d.
        metric: ``"euclidean"``, or ``"cosine"`` for which the distance is ``1 - cos``.
        precision: ``"fp32"``, or ``"bf16"``: neighbors up to 1 % farther than the nearest will do, which the
            ``avx512bf16`` instruction set finds faster. Other sets, and the cosine, stay in fp32 and exact.
        keys_rotated, queries_rotated: they are rotated already; the queries only where the keys are.

    Returns:
        ``Neighbors(distance [S, Q] fp32, index [S, Q] int64)``; ties go to the lowest index. NaN in a row
        gives NaN distances.
    """
    queries, keys, rotation = unit_columns(queries), unit_columns(keys), rotation.detach().contiguous()
    call = _Search(extension(), offsets_of(widths), metric == "cosine", precision == "bf16", shadows=False)
    origin = None if call.cosine else sample_mean(keys)
    if keys_rotated:
        return _search_given(call, queries, keys, None if queries_rotated else rotation, origin)
    turn = None
    if not _in_half(call) and shadow.pays(len(queries), len(keys), widths):
        turn = _worthwhile_turn(rotation, keys, origin, widths)
        call = call._replace(shadows=turn is not None)
    prepared = _PreparedKeys(origin, turn, *_rotate_with_bound(keys, rotation, origin, turn))
    blocks = [_search_raw(call, rows, keys, rotation, prepared) for rows in _query_blocks(queries)]
    if len(blocks) == 1:
        return blocks[0]
    return Neighbors(torch.cat([b.distance for b in blocks], 1), torch.cat([b.index for b in blocks], 1))


def nearest_index(
    queries: Tensor, keys: Tensor, rotation: Tensor, widths: Sequence[int], metric: str, precision: str
) -> Tensor:
    """[S, Q] int64 rows that are nearest, up to the rounding of an fp32 rotation of both sides."""
    if metric == "cosine":
        return nearest_neighbors(queries, keys, rotation, widths, metric=metric, precision=precision).index
    origin = sample_mean(keys)
    call = _Search(extension(), offsets_of(widths), False, precision == "bf16", shadows=False)
    if not _in_half(call) and shadow.pays(len(queries), len(keys), widths):
        turn = _worthwhile_turn(rotation, keys, origin, widths)
        call, rotation = call._replace(shadows=turn is not None), rotation if turn is None else turn
    queries, keys = (rotate_centred(rows, rotation, origin) for rows in (queries, keys))
    found = [
        _search_rotated(call, rows.double(), keys, sample_mean(keys)).index for rows in _query_blocks(queries)
    ]
    return torch.cat(found, 1)


class _Search(NamedTuple):
    """What the calls for several blocks of queries have in common."""

    extension: ModuleType
    offsets: list[int]
    cosine: bool
    bf16: bool
    shadows: bool
    """Propose by a part of the columns first: they come in the order of their variance."""


def _in_half(call: _Search) -> bool:
    """Whether keys are proposed by products in bf16, which save what shadows do without looking for axes."""
    return call.bf16 and not call.cosine and isa() == "avx512bf16"


class _PreparedKeys(NamedTuple):
    origin: Tensor | None
    """[d] fp32."""
    turn: Tensor | None
    """[d, d] fp32 the rotation with each subspace turned to its axes, where shadows are used."""
    rotated: Tensor
    """[K, d] fp32 keys, ``(keys - origin)`` times the rotation, or times ``turn``."""
    error: Tensor
    """[K] fp32 bound on the norm of the rotation's rounding error."""


def _query_blocks(queries: Tensor) -> Iterator[Tensor]:
    """Even blocks of queries, few enough that their copies stay small."""
    blocks = max(1, math.ceil(queries.numel() / _QUERY_ELEMENTS))
    return iter(queries.split(max(1, math.ceil(len(queries) / blocks))))


def _rotate_exactly(rows: Tensor, rotation: Tensor) -> Tensor:
    """[N, c] float64 product, with only blocks of the rotation's columns in float64 at a time."""
    rows = rows.double()
    exact = rows.new_empty(len(rows), rotation.shape[1])
    width = max(64, _EXACT_ELEMENTS // rotation.shape[0])
    for start in range(0, rotation.shape[1], width):
        exact[:, start : start + width] = rows @ rotation[:, start : start + width].double()
    return exact


def _rotate_with_bound(
    rows: Tensor, rotation: Tensor, origin: Tensor | None, turn: Tensor | None
) -> tuple[Tensor, Tensor]:
    """[N, d] fp32 ``(rows - origin) @ rotation``, and [N] a bound on the norm of its error in any subspace.

    Each of d additions is off by 2^-24 of a partial sum whose norm is at most that of the row; the errors
    have random signs, so they add to sqrt(d) of that (Higham & Mary 2019), times 2 for safety. A bound in
    probability, then, not for every input. A ``turn`` of the rotation takes its place; what rounding has
    made of it moves a row by less than that once more.
    """
    norms = torch.empty(len(rows))
    rotated = rotate_centred(rows, rotation if turn is None else turn, origin, norms=norms)
    return rotated, norms.mul_((2 if turn is None else 4) * _UNIT * math.sqrt(rows.shape[1] + 4))


def _empty_neighbors(subspaces: int, queries: int) -> Neighbors:
    return Neighbors(torch.empty(subspaces, queries), torch.empty(subspaces, queries, dtype=torch.int64))


def _search_raw(
    call: _Search, queries: Tensor, keys: Tensor, rotation: Tensor, prepared: _PreparedKeys
) -> Neighbors:
    found = _empty_neighbors(len(call.offsets) - 1, len(queries))
    rotated, query_error = _rotate_with_bound(queries, rotation, prepared.origin, prepared.turn)
    call.extension.nearest_neighbors(
        *(isa(), torch.get_num_threads(), len(queries), len(keys), *call[1:]),
        *(rows_of(prepared.rotated), _NO_ROWS, 0, rotated.data_ptr(), 0),
        *(rows_of(queries), rows_of(keys), rotation.data_ptr()),
        *(query_error.data_ptr(), prepared.error.data_ptr()),
        *(found.distance.data_ptr(), found.index.data_ptr()),
    )
    return found


def _worthwhile_turn(
    rotation: Tensor, keys: Tensor, origin: Tensor | None, widths: Sequence[int]
) -> Tensor | None:
    """[d, d] the rotation with each subspace turned to its axes, or None where shadows would save nothing."""
    axes = shadow.axes_of(rotation, keys, origin, widths)
    return axes.turned if shadow.saved(axes.rest, widths) > 0 else None


def _search_given(
    call: _Search, queries: Tensor, keys: Tensor, rotation: Tensor | None, origin: Tensor | None
) -> Neighbors:
    """Keys come rotated, and queries where there is no rotation; ``origin`` [d] is subtracted from the keys.

    Subspaces where it pays are searched one by one, over shadows of a turned copy; others together.
    """
    offsets, found = call.offsets, _empty_neighbors(len(call.offsets) - 1, len(queries))
    for first, last, axes in _parts(call, len(queries), keys, origin):
        columns, begin = slice(offsets[first], offsets[last]), 0
        part = call._replace(offsets=[each - columns.start for each in offsets[first : last + 1]])
        some, centre = keys[:, columns], None if origin is None else origin[columns]
        turned = None if axes is None else _turned_keys(some, axes, centre)
        for rows in _query_blocks(queries):
            if rotation is None:
                exact = rows[:, columns].double().contiguous()
            else:
                exact = _rotate_exactly(rows, rotation[:, columns])
            if turned is None:
                near = _search_rotated(part, exact, some, centre)
            else:
                near = _search_turned(part, exact, some, turned)
            for whole, piece in zip(found, near, strict=True):
                whole[first:last, begin : begin + len(rows)] = piece
            begin += len(rows)
    return found


def _parts(
    call: _Search, queries: int, keys: Tensor, origin: Tensor | None
) -> Iterator[tuple[int, int, Tensor | None]]:
    """Runs of subspaces, from the first to before the last: with axes those to turn, one by one."""
    offsets, begin = call.offsets, 0
    for s, (start, stop) in enumerate(itertools.pairwise(offsets)):
        width, sizes = stop - start, (queries, len(keys), stop - start)
        if _in_half(call) or not shadow.turning_pays(*sizes):
            continue
        columns = slice(start, stop)
        axes = shadow.axes_of(
            torch.eye(width), keys[:, columns], None if origin is None else origin[columns], [width]
        )
        if shadow.turning_pays(*sizes, shadow.saved(axes.rest, [width])):
            if begin < s:
                yield begin, s, None
            yield s, s + 1, axes.turned
            begin = s + 1
    if begin < len(offsets) - 1:
        yield begin, len(offsets) - 1, None


def _turned_keys(keys: Tensor, axes: Tensor, origin: Tensor | None) -> _PreparedKeys:
    error = torch.empty(len(keys))
    turned = rotate_centred(keys, axes, origin, norms=error)
    return _PreparedKeys(origin, axes, turned, error.mul_(_turning_error(len(axes))))


def _turning_error(width: int) -> float:
    """Share of a row's length that turning it gets wrong at most, for every input.

    Width additions, a subtraction and a rounding, each by 2^-24 of at most the row, and sqrt(width) of it for
    the products and again for the axes, which are rounded too.
    """
    return (width + 2 * math.sqrt(width) + 4) * _UNIT


def _search_turned(call: _Search, exact_queries: Tensor, keys: Tensor, turned: _PreparedKeys) -> Neighbors:
    """As :func:`_search_rotated`, of one subspace: neighbors are proposed from a copy, turned to its axes."""
    assert turned.turn is not None
    centred = exact_queries if turned.origin is None else exact_queries - turned.origin
    queries = (centred @ turned.turn.double()).float()
    error = torch.linalg.vector_norm(centred, dim=1).float().mul_(_turning_error(len(turned.turn)))
    found = _empty_neighbors(1, len(queries))
    call.extension.nearest_neighbors(
        *(isa(), torch.get_num_threads(), len(queries), len(keys), *call._replace(shadows=True)[1:]),
        *(rows_of(keys), rows_of(turned.rotated), 0, queries.data_ptr(), exact_queries.data_ptr()),
        *(_NO_ROWS, _NO_ROWS, 0, error.data_ptr(), turned.error.data_ptr()),
        *(found.distance.data_ptr(), found.index.data_ptr()),
    )
    return found


def _search_rotated(call: _Search, exact_queries: Tensor, keys: Tensor, origin: Tensor | None) -> Neighbors:
    """``exact_queries`` is [Q, d] float64, rotated; ``origin`` [d] fp32 is subtracted from the keys."""
    exact_queries = exact_queries.contiguous()
    found = _empty_neighbors(len(call.offsets) - 1, len(exact_queries))
    call.extension.nearest_neighbors(
        *(isa(), torch.get_num_threads(), len(exact_queries), len(keys), *call[1:]),
        *(rows_of(keys), _NO_ROWS, 0 if origin is None else origin.data_ptr(), 0, exact_queries.data_ptr()),
        *(_NO_ROWS, _NO_ROWS, 0, 0, 0),
        *(found.distance.data_ptr(), found.index.data_ptr()),
    )
    return found
