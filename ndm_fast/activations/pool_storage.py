"""Where the rows of a pool are kept: whether they fit, on which device, and at which scale."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ndm_fast.errors import InputError

logger = logging.getLogger("ndm_fast")

LARGEST_FRACTION = 0.25
"""Share of the storage dtype's range that the first rows may use; later rows may be larger."""


_USABLE_SHARE = 0.9
"""Share of the free memory that a pool may take; the search needs some beside it."""


class Place(NamedTuple):
    """Where a pool is kept."""

    device: torch.device
    pinned: bool
    """Host memory that a GPU copies from by itself."""
    spare: bool
    """There is room for a second buffer, which is filled while the first one is used."""


def memory_line(rows: int, width: int, dtype: torch.dtype, device: torch.device | str) -> str:
    """What a pool takes, in words."""
    size = rows * width * dtype.itemsize / 2**30
    return f"pool: {rows:,} rows x {width} x {str(dtype).removeprefix('torch.')} = {size:.2f} GiB on {device}"


def choose_place(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Place:
    """The device itself where the pool fits; for a GPU else pinned host memory, which is logged.

    Of pinned memory torch takes the next power of two.

    Raises:
        InputError: it fits nowhere; the message says how many rows would.
    """
    size = rows * width * dtype.itemsize
    free = int(free_memory(device) * _USABLE_SHARE)
    if size <= free:
        return Place(device, False, device.type == "cuda" and 2 * size <= free)
    fitting, in_host = free, ""
    if device.type == "cuda":
        host = int(free_memory(torch.device("cpu")) * _USABLE_SHARE)
        pinned = _pinned_block(size)
        if pinned <= host:
            logger.warning(
                "a pool of %.2f GiB does not fit the %.2f GiB free on %s: it is kept in pinned host memory, "
                "of which torch takes %.2f GiB, a power of two, and keys are copied for every search",
                *(size / 2**30, free / 2**30, device, pinned / 2**30),
            )
            return Place(torch.device("cpu"), True, 2 * pinned <= host)
        in_host = f" ({pinned / 2**30:.2f} GiB, a power of two, pinned in host memory)"
        fitting = max(free, 1 << host.bit_length() >> 1)
        free = max(free, host)
    raise InputError(
        f"a pool of {rows} rows takes {size / 2**30:.2f} GiB{in_host}, and {free / 2**30:.2f} GiB can be "
        f"used: set --pool-rows to {fitting // (width * dtype.itemsize)} or less, or --pool-dtype bfloat16"
    )


def _pinned_block(size: int) -> int:
    """Bytes that torch takes for pinned memory of this size."""
    return 1 << (size - 1).bit_length()


def allocate(rows: int, width: int, dtype: torch.dtype, place: Place) -> Tensor:
    """[rows, width] uninitialised."""
    return torch.empty(rows, width, dtype=dtype, device=place.device, pin_memory=place.pinned)


def free_memory(device: torch.device) -> int:
    """Bytes that can be had: of the GPU, or of the machine and the container we are in."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return min(available, _left_in_control_group(available))


def _left_in_control_group(otherwise: int) -> int:
    """What the limit of a container leaves (cgroup v2); files that were read do not count, they can go."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())  # "max" where there is none
        used = int((group / "memory.current").read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return otherwise
    return limit - used + int(statistics.get("inactive_file", 0))
