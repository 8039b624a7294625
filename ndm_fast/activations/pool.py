"""ActivationPool: shuffled activations; queries leave it, keys are views of what is left.

The pool is filled once per *generation*. Generation ``g`` is a pure function of the stream's batch at
which it starts and of the seed, so a checkpoint needs two numbers, not the rows, to restore it.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ndm_fast.activations.fill_ahead import Ahead
from ndm_fast.activations.pool_storage import Place, allocate, choose_place
from ndm_fast.activations.rows import Stream, fitting_scale, too_short
from ndm_fast.errors import InputError
from ndm_fast.ranks import ALONE, Ranks
from ndm_fast.seeds import Draw, seeded


@dataclass(frozen=True)
class PoolConfig:
    """What a pool holds, and where."""

    rows: int
    """Rows held at once."""
    keys: int
    """Rows that :meth:`ActivationPool.next_keys` returns; never fewer are left."""
    dtype: torch.dtype = torch.float32
    """Of the stored rows."""
    device: torch.device | str = "cpu"
    """Where queries and keys are wanted."""
    seed: int = 0
    """Order of the rows."""
    first_batch: int = 0
    """Number of the stream's batch to start from."""
    queries: int | None = None
    """How many will be taken in all; None: no generation is filled ahead."""
    ahead: bool = False
    """Fill ahead on the CPU too; the rows are the same."""
    site: str = "the stream"
    """What error messages call the origin of the rows."""

    def __post_init__(self) -> None:
        if self.rows <= self.keys:
            raise InputError(
                f"a pool of {self.rows} rows has none beside its {self.keys} keys: raise pool_rows"
            )


class ActivationPool:
    """Rows of a stream, shuffled as a whole, in one preallocated tensor; filled at its first use.

    Rows are stored as ``activation * scale``, with a power of two that keeps half precision from
    overflowing; distances between stored rows are ``scale`` times those between activations.

    A GPU without room for them has the rows in pinned host memory; queries and keys are then copies. Where
    there is room for two buffers on a GPU, the next generation is filled while this one is used.

    Args:
        stream: where the rows come from.
        config: how many rows, in which dtype and order, and where.
        ranks: those that share the rows: each reads the whole stream and keeps its part of the shuffled rows.

    Raises:
        InputError: from any method that fills the pool: the stream ends too early, a value overflows the
            storage dtype, or the pool does not fit into memory.
    """

    def __init__(self, stream: Stream, config: PoolConfig, ranks: Ranks = ALONE) -> None:
        self._stream, self._config, self._ranks = stream, config, ranks
        self._rows, self._keys = config.rows, config.keys
        # Windows of keys end with the last row and are multiples of ``ranks.size`` long. Numbers that are a
        # multiple of it at the end put the i-th key of every window on rank ``i % size``.
        self._before = -config.rows % ranks.size
        self._held = -(-config.rows // ranks.size)
        self._device = torch.device(config.device)
        self._place: Place | None = None
        self._live: Tensor | None = None
        self._spare: Tensor | None = None
        self._ahead: Ahead[tuple[Tensor, int]] | None = None
        self._queries = config.queries
        self.scale: float | None = None
        self._generation, self._first_batch, self._next_batch = 0, config.first_batch, config.first_batch
        self._taken = self._searches = 0

    def reserve(self, width: int) -> None:
        """Find room for rows of this width, before anything is read.

        Raises:
            InputError: there is none; the message says how many rows would fit.
        """
        self._place = choose_place(self._held, width, self._config.dtype, self._device)

    def fill(self) -> None:
        """Read the rows now instead of at their first use."""
        if self._live is None:
            self._live, self._next_batch = self._filled(self._generation, self._first_batch, None)
            self._begin_ahead()

    def take(self, count: int) -> Tensor:
        """[count, d] queries; they leave the pool, which is filled anew when too few rows are left.

        Valid until the next call of :meth:`take`; of several ranks all get the same.
        """
        if count > self._rows - self._keys:
            raise InputError(
                f"{count} queries at once do not fit a pool of {self._rows} rows, {self._keys} of them keys: "
                "raise pool_rows"
            )
        self.fill()
        if self._taken + count > self._rows - self._keys:
            self._next_generation()
        self._taken += count
        if self._queries is not None:
            self._queries -= count
        start, stop = self._before + self._taken - count, self._before + self._taken
        return self._ranks.gather(self._between(start, stop), start, stop)

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
        return self._between(stop - self._keys, stop)

    def state_dict(self) -> dict[str, Any]:
        """Position in the stream and in the pool, plain JSON values."""
        return {
            "generation": self._generation,
            "first_batch": self._first_batch,
            "taken": self._taken,
            "searches": self._searches,
            "scale": self.scale,
        }

    def load_state_dict(self, state: dict[str, Any], queries: int | None = None) -> None:
        """Go on from a ``state_dict``; its generation is harvested once more, at the first use.

        Args:
            queries: how many will be taken from now on; None: no generation is filled ahead.
        """
        self.close()
        self._live = None
        self._generation, self._first_batch = state["generation"], state["first_batch"]
        self._taken, self._searches, self.scale = state["taken"], state["searches"], state["scale"]
        self._queries = queries

    def close(self) -> None:
        """End the filling of a generation that nobody will ask for."""
        if self._ahead is not None:
            self._ahead.cancel()
            self._ahead = None

    def stored(self, rows: Tensor) -> Tensor:
        """[n, d] rows as the pool holds them: scaled, in its dtype, on its device.

        Raises:
            InputError: a value overflows the dtype, or is not finite.
        """
        largest, dtype = float(rows.abs().max()), self._config.dtype
        if self.scale is None:
            self.scale = fitting_scale(largest, dtype)
        if not largest * self.scale <= torch.finfo(dtype).max:
            raise InputError(
                f"an activation of {largest:.3g} at {self._config.site} overflows {dtype} (or is not "
                "finite): set --pool-dtype bfloat16 or float32"
            )
        return (rows.to(self._device) * self.scale).to(dtype)

    def _between(self, start: int, stop: int) -> Tensor:
        """Rows of these numbers that are held here, where they are wanted: a view if they are there."""
        self.fill()
        assert self._live is not None
        return self._live[self._ranks.local(start, stop)].to(self._device, non_blocking=True)

    def _next_generation(self) -> None:
        used, first_batch = self._live, self._next_batch
        if self._ahead is None:
            self._live, self._next_batch = self._filled(self._generation + 1, first_batch, used)
        else:
            self._live, self._next_batch = self._ahead.result()
            self._spare = used
        self._generation, self._first_batch, self._taken = self._generation + 1, first_batch, 0
        self._begin_ahead()

    def _begin_ahead(self) -> None:
        """Begin to fill the next generation, where there will be one and room for it."""
        self._ahead = None
        assert self._place is not None
        room = self._place.spare or self._config.ahead
        if not room or self._queries is None or self._queries <= self._rows - self._keys - self._taken:
            return
        generation, batch, spare = self._generation + 1, self._next_batch, self._spare
        self._ahead = Ahead(lambda gone: self._filled(generation, batch, spare, gone), self._device)

    def _filled(
        self, generation: int, batch: int, storage: Tensor | None, gone: threading.Event | None = None
    ) -> tuple[Tensor, int]:
        """The rows of a generation that starts at a batch, written to the storage; the batch after them."""
        order = (
            torch.randperm(self._rows, generator=seeded(self._config.seed, Draw.POOL, generation))
            + self._before
        )
        filled = 0
        for activations in self._stream.batches(batch):
            batch += 1
            rows = activations[: self._rows - filled]
            if len(rows) == 0:
                continue  # all of its tokens were special ones
            if storage is None:
                if self._place is None:
                    self.reserve(rows.shape[1])
                assert self._place is not None
                storage = allocate(self._held, rows.shape[1], self._config.dtype, self._place)
            if filled == 0:
                order = order.to(storage.device)
            mine, places = self._ranks.keep(self.stored(rows), order[filled : filled + len(rows)])
            storage[places] = mine.to(storage.device)
            filled += len(rows)
            if filled == self._rows or (gone is not None and gone.is_set()):
                return storage, batch
        raise too_short(filled, self._rows)
