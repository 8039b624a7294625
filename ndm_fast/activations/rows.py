"""Streams of activations, and the columns that say which token each row belongs to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ndm_fast.activations.packing import PackedRows
from ndm_fast.activations.pool_storage import LARGEST_FRACTION
from ndm_fast.errors import InputError


class TokenRows(NamedTuple):
    """Activations with the tokens they belong to; special tokens left out. [N, d] and [N] int64."""

    activations: Tensor
    token: Tensor
    previous_token: Tensor
    next_token: Tensor
    position: Tensor
    document: Tensor


class HarvestedRows(NamedTuple):
    """Packed rows of tokens with the activations of those that count."""

    packed: PackedRows
    kept: Tensor
    """[B, L] bool, on the CPU: neither special nor dropped as an outlier; ``rows`` holds these in order."""
    rows: TokenRows
    outliers: int
    """Rows that were dropped for their norm."""


def token_columns(rows: PackedRows) -> tuple[Tensor, ...]:
    """[B * L] each, for every token of packed rows: the columns of ``TokenRows`` beside the activations."""
    neighbors = torch.nn.functional.pad(rows.tokens, (1, 1), value=-1)
    positions = torch.arange(rows.tokens.shape[1]).expand_as(rows.tokens)
    columns = (rows.tokens, neighbors[:, :-2], neighbors[:, 2:], positions, rows.documents)
    return tuple(column.flatten() for column in columns)


class Stream(Protocol):
    """Numbered batches of activations; the same number always gives the same rows."""

    def batches(self, start: int = 0) -> Iterator[Tensor]:
        """[n, d] activations, from batch number ``start`` on."""
        ...


class SiteStream(Stream, Protocol):
    """Activations of one site: of a model, or from a cache."""

    site: str
    """Canonical name."""
    width: int
    outliers_dropped: int

    @property
    def text_skipped(self) -> dict[str, int]:
        """Records and documents of its text that were left out, by reason."""
        ...


@dataclass(frozen=True)
class TensorStream:
    """A stream of activations that are already at hand."""

    tensors: Sequence[Tensor]
    """[n, d] each."""

    def batches(self, start: int = 0) -> Iterator[Tensor]:
        """The tensors from number ``start`` on."""
        return iter(self.tensors[start:])


def too_short(held: int, rows: int) -> InputError:
    """The error for a stream that ends too early."""
    return InputError(
        f"the text ended after {held} activations, {rows} are needed: give more text (with --acts: "
        "harvest more --rows), lower --pool-rows, --keys or --max-steps, or use it again with --repeat-data"
    )


def take_rows(batches: Iterable[Tensor], rows: int) -> tuple[Tensor, int]:
    """[rows, d] first rows of a stream's batches, and the number of batches they came from.

    Raises:
        InputError: the batches end before.
    """
    parts: list[Tensor] = []
    held = 0
    for part in batches:
        parts.append(part)
        held += len(part)
        if held >= rows:
            return torch.cat(parts)[:rows], len(parts)
    raise too_short(held, rows)


def fitting_scale(largest: float, dtype: torch.dtype) -> float:
    """The power of two, 1 or less, that leaves values up to ``largest`` room to grow in a dtype."""
    scale = 1.0
    while largest * scale > torch.finfo(dtype).max * LARGEST_FRACTION:
        scale /= 2
    return scale
