"""Several processes that train one partition, on torch.distributed: gloo between CPUs, NCCL between GPUs.

``docs/distributed.md`` says what travels and what does not. Nothing here is imported without torchrun.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import wraps
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ndm_fast.errors import InputError, RanksError
from ndm_fast.ranks import Group, Ranks, T, launched

TIMEOUT_VARIABLE = "NDM_FAST_TIMEOUT"
"""Environment variable: seconds that a rank waits for the others before it gives up, default 60."""

_FAILED = "ndm_fast/failed"


_STORE_SECONDS = 5

Method = TypeVar("Method", bound=Callable[..., Any])


def _meeting(method: Method) -> Method:
    """A method in which all ranks meet; torch's errors become a RanksError."""

    @wraps(method)
    def meet(*arguments: Any) -> Any:
        try:
            return method(*arguments)
        except RuntimeError as error:  # torch has no narrower class for a peer that is gone
            raise lost(error) from None

    return cast(Method, meet)


class TorchRanks(Ranks):
    """The ranks of the default process group."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    @_meeting
    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks."""
        tensor = tensor.contiguous()
        dist.all_reduce(tensor)
        return tensor

    @_meeting
    def least(self, tensor: Tensor) -> Tensor:
        """The least over ranks."""
        tensor = tensor.contiguous()
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
        return tensor

    @_meeting
    def of_first(self, tensor: Tensor) -> Tensor:
        """The tensor that rank 0 has."""
        tensor = tensor.contiguous()
        dist.broadcast(tensor, src=0)
        return tensor

    def first(self, make: Callable[[], T]) -> T:
        """What rank 0 makes; its InputError is raised on every rank."""
        made: list[Any] = [None, None]
        if self.rank == 0:
            try:
                made[0] = make()
            except InputError as error:
                made[1] = error
        self._broadcast(made)
        if made[1]:
            raise made[1]
        return cast(T, made[0])

    @_meeting
    def _broadcast(self, objects: list[Any]) -> None:
        dist.broadcast_object_list(objects, src=0, device=torch.device("cpu"))


@contextmanager
def together(shared: str, device: str) -> Iterator[Group]:
    """The group of all ranks that torchrun started, sharing ``"queries"`` or ``"keys"``.

    Raises:
        RanksError: not all of them came in time.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if torch.device(device).type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=_timeout()))
    except (RuntimeError, ValueError) as error:
        raise lost(error) from None
    try:
        ranks = TorchRanks()
        yield Group(keys=ranks) if shared == "keys" else Group(queries=ranks)
    finally:
        dist.destroy_process_group()


def lost(error: Exception) -> RanksError:
    """The error for a rank that waits in vain."""
    # Gloo begins with a source line and ends with advice.
    reason = re.sub(r"^\[\S*\] ", "", str(error)).partition(". ")[0].splitlines()[0]
    return RanksError(
        f"rank {launched().rank} lost another rank, which failed, was killed or hangs ({reason}): "
        "go on from the last checkpoint with --resume"
    )


def first_to_fail() -> bool:
    """Whether no other rank has failed before, so that the job prints one error and not one per rank.

    Where torchrun's store cannot be asked, true.
    """
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, timeout=timedelta(seconds=_STORE_SECONDS))
        return bool(store.add(f"{_FAILED}/{os.environ.get('TORCHELASTIC_RESTART_COUNT')}", 1) == 1)
    except (RuntimeError, KeyError, ValueError):
        return True


def _timeout() -> float:
    value = os.environ.get(TIMEOUT_VARIABLE, "60")
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise InputError(f"{TIMEOUT_VARIABLE} is {value!r}: give seconds above 0")
    return seconds
