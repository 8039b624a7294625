"""The compiled CPU extension ``ndm_fast._C``: whether it is there, and what it may be handed.

It takes raw addresses and knows nothing of torch, so device, dtype, shape and stride are checked here before
one is handed out.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

# After torch, so that the extension finds torch's OpenMP runtime and brings in none of its own.
_C: ModuleType | None


try:
    from ndm_fast import _C  # type: ignore[attr-defined, no-redef, unused-ignore]

    _OBSTACLE: str | None = None
except ImportError as error:
    _C = None
    _OBSTACLE = f"ndm_fast._C is not built ({error}): install with a C++17 compiler at hand"

ISA_VARIABLE = "NDM_FAST_CPU_ISA"
"""Environment variable that forces an instruction set: avx512bf16, avx512, avx2 or portable."""

_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def available() -> bool:
    """Whether the extension can be imported."""
    return _C is not None


def why_unavailable() -> str | None:
    """Why the extension cannot be used, or None where it can."""
    return _OBSTACLE


def isa() -> str:
    """Instruction set in use: ``"avx512bf16"``, ``"avx512"``, ``"avx2"`` or ``"portable"``.

    The fastest that the CPU has, or the one named by ``NDM_FAST_CPU_ISA``.

    Raises:
        ValueError: the extension is missing, the name is unknown, or the CPU cannot run it.
    """
    wanted = os.environ.get(ISA_VARIABLE, "")
    try:
        return extension().isa(wanted)
    except ValueError as error:
        raise ValueError(f"{ISA_VARIABLE}={wanted!r} cannot be used: {error}") from None


def extension() -> ModuleType:
    """``ndm_fast._C``, or the reason why there is none as a ``ValueError``."""
    if _C is None:
        raise ValueError(_OBSTACLE)
    return _C


def check_rows(queries: Tensor, keys: Tensor, rotation: Tensor, widths: Sequence[int]) -> list[int]:
    """Offsets of the subspaces, [S + 1]; everything whose neglect would read outside of memory is checked."""
    if not widths or min(widths) < 1:
        raise ValueError(f"widths {list(widths)} are empty or hold one below 1: give positive widths")
    width = sum(widths)
    for name, tensor in (("queries", queries), ("keys", keys), ("rotation", rotation)):
        if tensor.device.type != "cpu":
            raise ValueError(f"{name} is on {tensor.device}: move it to the CPU")
        if tensor.layout != torch.strided or tensor.ndim != 2 or tensor.shape[1] != width:
            raise ValueError(f"{name} has shape {list(tensor.shape)}: give dense rows of width {width}")
        if tensor.dtype not in _TYPES:
            raise ValueError(f"{name} has dtype {tensor.dtype}: give float32, float16 or bfloat16")
    if rotation.dtype != torch.float32 or rotation.shape[0] != width:
        raise ValueError(
            f"rotation is {rotation.dtype} {list(rotation.shape)}: give float32 {[width, width]}"
        )
    if len(keys) == 0:
        raise ValueError("keys has no rows: give at least one")
    offsets = [0]
    for one in widths:
        offsets.append(offsets[-1] + one)
    return offsets


def unit_columns(rows: Tensor) -> Tensor:
    """The same rows with neighboring columns next to each other; rows may stay strided."""
    rows = rows.detach()
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def rows_of(tensor: Tensor) -> tuple[int, int, int]:
    """Address, number of the type and stride of rows, as the extension takes them."""
    return tensor.data_ptr(), _TYPES[tensor.dtype], tensor.stride(0)
