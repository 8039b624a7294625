"""Who holds which rows: one process holds them all; ``ndm_fast.distributed`` deals them out to several.

The trainer, the pool and the estimate of mutual information call these methods at the places where several
processes have to meet. In one process every one of them hands back what it was given.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ndm_fast.config import RunSettings, TrainConfig
from ndm_fast.errors import InputError, RanksError

T = TypeVar("T")


class Ranks:
    """One process alone; the base of ``distributed.TorchRanks``, which overrides the collective operations.

    Rows are dealt out like cards: row number i is on rank ``i % size``, as its row ``i // size``. So any run
    of consecutive rows is shared evenly, and on each rank it is again a run of consecutive rows.
    """

    rank, size = 0, 1

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, the same bits on all of them; the argument may be overwritten."""
        return tensor

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over ranks; the argument may be overwritten."""
        return tensor if self.size == 1 else self.sum(tensor).div_(self.size)

    def least(self, tensor: Tensor) -> Tensor:
        """The least over ranks, element by element; the argument may be overwritten."""
        return tensor

    def of_first(self, tensor: Tensor) -> Tensor:
        """The tensor that rank 0 has; the argument may be overwritten."""
        return tensor

    def first(self, make: Callable[[], T]) -> T:
        """What rank 0 makes; its InputError is raised on every rank."""
        return make()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on some rank."""
        return flag if self.size == 1 else bool(self.sum(torch.tensor(int(flag))))

    def check_same(self, tensor: Tensor, what: str) -> None:
        """Compare checksums of an fp32 tensor over the ranks.

        Raises:
            RanksError: they differ.
        """
        if self.size == 1:
            return
        checksum = tensor.contiguous().view(torch.int32).sum(dtype=torch.int64).cpu()
        low, high = self.least(torch.stack([checksum, -checksum])).tolist()
        if low != -high:
            raise RanksError(
                f"{what} differs between the ranks: run them all on the same kind of machine, and go on from "
                "the last checkpoint with --resume"
            )

    def share(self, rows: Tensor) -> Tensor:
        """A view of this rank's part of rows that every rank has."""
        return rows[self.rank :: self.size]

    def local(self, start: int, stop: int) -> slice:
        """Which of the rows held here have the numbers from ``start`` to before ``stop``."""
        return slice(-((self.rank - start) // self.size), -((self.rank - stop) // self.size))

    def keep(self, rows: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Of [n, d] rows with these [n] numbers, those that belong here, and their places here."""
        if self.size == 1:
            return rows, numbers
        here = numbers % self.size == self.rank
        return rows[here], numbers[here] // self.size

    def gather(self, rows: Tensor, start: int, stop: int) -> Tensor:
        """[stop - start, d] the rows of these numbers, from all ranks; ``rows`` are those held here."""
        if self.size == 1:
            return rows
        whole = rows.new_zeros(stop - start, rows.shape[1])
        whole[(self.rank - start) % self.size :: self.size] = rows
        return self.sum(whole)  # of rows that are zero on all ranks but one: exact in any dtype

    def owned(self, numbers: Tensor) -> tuple[Tensor, Tensor | None]:
        """Places of rows on their own ranks, and which of them are here; None: all."""
        if self.size == 1:
            return numbers, None
        return numbers // self.size, numbers % self.size == self.rank


ALONE = Ranks()


@dataclass(frozen=True)
class Group:
    """The ranks that train one partition together, by what they share: queries, keys, or (alone) neither."""

    queries: Ranks = ALONE
    """Each takes its part of every batch's queries, and has all keys."""
    keys: Ranks = ALONE
    """Each has its part of the pool, and takes all queries."""

    @property
    def all(self) -> Ranks:
        """All ranks, whatever they share."""
        return self.keys if self.keys.size > 1 else self.queries

    def combine(self, part: Tensor) -> Tensor:
        """A mean over the queries of all ranks, from each rank's mean over its queries and neighbors."""
        return self.keys.sum(self.queries.mean(part))

    def check(self, train: TrainConfig, settings: RunSettings) -> None:
        """Refuse settings that the ranks cannot share evenly, or at all."""
        if settings.cuda_graph == "on" and self.all.size > 1:
            raise InputError("cuda_graph captures the steps of one rank: leave it off under torchrun")
        for name, ranks in (("queries", self.queries), ("keys", self.keys)):
            count = getattr(train, name)
            if count % ranks.size:
                raise InputError(
                    f"{ranks.size} ranks cannot share {count} {name} evenly: set --{name} to a multiple of "
                    f"{ranks.size}, or start another number of ranks"
                )


class Launch(NamedTuple):
    """This process among those that torchrun started; without torchrun, the only one."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    def device(self, name: str) -> str:
        """The device of this process: ``cuda`` means a card each."""
        return f"cuda:{self.local_rank}" if name == "cuda" and self.size > 1 else name

    def shared(self, parallel: str, sites: int) -> str:
        """What the ranks share: ``"sites"``, ``"queries"`` or ``"keys"``.

        Args:
            parallel: that, or ``"auto"``: sites, unless some rank would have none.
        """
        if parallel == "auto":
            return "sites" if self.size <= sites else "queries"
        if parallel == "sites" and self.size > sites:
            raise InputError(
                f"{self.size} ranks for {sites} site(s) leave ranks without one: start {sites}, or share "
                "--parallel queries or keys"
            )
        return parallel


def launched() -> Launch:
    """What torchrun's environment variables say."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if "WORLD_SIZE" not in os.environ:
        return Launch()
    try:
        return Launch(*(int(os.environ[name]) for name in names))
    except (KeyError, ValueError) as error:
        raise InputError(
            f"WORLD_SIZE is set, but not all of {', '.join(names)} ({error}): use torchrun, or unset it"
        ) from None
