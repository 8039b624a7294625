"""ActivationPool: shuffled activations; queries leave it, keys are views of what is left.

The pool is filled once per *generation*. Generation ``g`` is a pure function of the stream's batch at
which it starts and of the seed, so a checkpoint needs two numbers, not the rows, to restore it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ndm_fast.errors import InputError
from ndm_fast.ranks import ALONE, Ranks

_LARGEST_FRACTION = 0.25
"""Share of the storage dtype's range that the first rows may use; later rows may be larger."""


class Stream(Protocol):
    """Numbered batches of activations; the same number always gives the same rows."""

    def batches(self, start: int = 0) -> Iterator[Tensor]:
        """[n, d] activations, from batch number ``start`` on."""
        ...


@dataclass(frozen=True)
class TensorStream:
    """A stream of activations that are already at hand."""

    tensors: Sequence[Tensor]
    """[n, d] each."""

    def batches(self, start: int = 0) -> Iterator[Tensor]:
        """The tensors from number ``start`` on."""
        return iter(self.tensors[start:])


def seeded(seed: int, *purpose: int) -> torch.Generator:
    """A generator on the CPU that depends on the seed and on what it is for, and on nothing else."""
    state = seed & 0xFFFFFFFF
    for number in purpose:
        state = (state * 6364136223846793005 + 1442695040888963407 + number) & 0x7FFFFFFFFFFFFFFF
    return torch.Generator().manual_seed(state)


def too_short(held: int, rows: int) -> InputError:
    """The error for a stream that ends too early."""
    return InputError(
        f"the text ended after {held} activations, {rows} are needed: give more text, lower --pool-rows, "
        "--keys or --max-steps, or pass --repeat-data to use it again"
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


class ActivationPool:
    """Rows of a stream, shuffled as a whole, in one preallocated tensor.

    Rows are stored as ``activation * scale``, with a power of two that keeps half precision from
    overflowing; distances between stored rows are ``scale`` times those between activations.

    Args:
        stream: where the rows come from.
        rows: rows held at once.
        keys: rows that :meth:`next_keys` returns; never fewer are left.
        dtype, device: storage.
        seed: order of the rows.
        first_batch: number of the stream's batch to start from.
        state: a ``state_dict`` to go on from; that generation is harvested once more.
        site: what error messages call the origin of the rows.
        ranks: those that share the rows: each reads the whole stream and keeps its part of the shuffled rows.

    Raises:
        InputError: the stream ends before the pool is full; a value overflows the storage dtype.
    """

    def __init__(
        self,
        stream: Stream,
        rows: int,
        keys: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        seed: int = 0,
        first_batch: int = 0,
        state: dict[str, Any] | None = None,
        site: str = "the stream",
        ranks: Ranks = ALONE,
    ) -> None:
        if rows <= keys:
            raise InputError(f"a pool of {rows} rows has none beside its {keys} keys: raise pool_rows")
        self._stream, self._rows, self._keys, self._seed = stream, rows, keys, seed
        self._site, self._ranks = site, ranks
        # Windows of keys end with the last row and are multiples of ``ranks.size`` long. Numbers that are a
        # multiple of it at the end put the i-th key of every window on rank ``i % size``.
        self._before = -rows % ranks.size
        self._dtype, self._device = dtype, torch.device(device)
        self._storage: Tensor | None = None
        self.scale: float | None = state["scale"] if state else None
        self._generation = state["generation"] if state else 0
        self._next_batch = state["first_batch"] if state else first_batch
        self._fill()
        self._taken = state["taken"] if state else 0
        self._searches = state["searches"] if state else 0

    def take(self, count: int) -> Tensor:
        """[count, d] queries; they leave the pool, which is filled anew when too few rows are left.

        A view, valid until the next call of :meth:`take`; of several ranks all get the same.
        """
        if count > self._rows - self._keys:
            raise InputError(
                f"{count} queries at once do not fit a pool of {self._rows} rows, {self._keys} of them keys: "
                "raise pool_rows"
            )
        if self._taken + count > self._rows - self._keys:
            self._generation += 1
            self._fill()
            self._taken = 0
        self._taken += count
        start, stop = self._before + self._taken - count, self._before + self._taken
        return self._ranks.gather(self._live[self._ranks.local(start, stop)], start, stop)

    def next_keys(self) -> Tensor:
        """[K, d] keys: a view of rows that have not been queries; each call gives the next window.

        Of several ranks each gets its part, see :class:`ndm_fast.ranks.Ranks`.
        """
        self._searches += 1
        return self.peek_keys()

    def peek_keys(self) -> Tensor:
        """[K, d] the window that :meth:`next_keys` gave last."""
        windows = (self._rows - self._taken) // self._keys
        stop = self._before + self._rows - self._searches % windows * self._keys
        return self._live[self._ranks.local(stop - self._keys, stop)]

    def state_dict(self) -> dict[str, Any]:
        """Position in the stream and in the pool, plain JSON values."""
        return {
            "generation": self._generation,
            "first_batch": self._first_batch,
            "taken": self._taken,
            "searches": self._searches,
            "scale": self.scale,
        }

    @property
    def _live(self) -> Tensor:
        assert self._storage is not None
        return self._storage

    def _fill(self) -> None:
        self._first_batch = self._next_batch
        shuffled = torch.randperm(self._rows, generator=seeded(self._seed, 1, self._generation))
        places = (shuffled + self._before).to(self._device)
        held = -(-self._rows // self._ranks.size)
        filled = 0
        for batch in self._stream.batches(self._first_batch):
            self._next_batch += 1
            rows = batch[: self._rows - filled]
            if len(rows) == 0:
                continue  # all of its tokens were special ones
            if self._storage is None:
                self._storage = torch.empty(held, rows.shape[1], dtype=self._dtype, device=self._device)
            mine, where = self._ranks.keep(self.stored(rows), places[filled : filled + len(rows)])
            self._storage[where] = mine
            filled += len(rows)
            if filled == self._rows:
                return
        raise too_short(filled, self._rows)

    def stored(self, rows: Tensor) -> Tensor:
        """[n, d] rows as the pool holds them: scaled, in its dtype, on its device.

        Raises:
            InputError: a value overflows the dtype, or is not finite.
        """
        largest = float(rows.abs().max())
        limit = torch.finfo(self._dtype).max
        if self.scale is None:
            self.scale = 1.0
            while largest * self.scale > limit * _LARGEST_FRACTION:
                self.scale /= 2
        if not largest * self.scale <= limit:
            raise InputError(
                f"an activation of {largest:.3g} at {self._site} overflows {self._dtype} (or is not finite): "
                "set --pool-dtype bfloat16 or float32"
            )
        return (rows.to(self._device) * self.scale).to(self._dtype)
