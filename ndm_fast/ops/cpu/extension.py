"""The compiled CPU extension ``ndm_fast._C``: whether it is there, and what it may be handed.

It takes raw addresses and knows nothing of torch: ``ndm_fast.ops`` has checked device, dtype and shape of
whatever comes here, and the modules beside this one see to strides.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import accumulate
from types import ModuleType

import torch
from torch import Tensor

from ndm_fast.errors import InputError

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
        InputError: the extension is missing, the name is unknown, or the CPU cannot run it.
    """
    wanted = os.environ.get(ISA_VARIABLE, "")
    try:
        return extension().isa(wanted)
    except ValueError as error:
        raise InputError(f"{ISA_VARIABLE}={wanted!r} cannot be used: {error}") from None


def extension() -> ModuleType:
    """``ndm_fast._C``, or the reason why there is none as an ``InputError``."""
    if _C is None:
        raise InputError(str(_OBSTACLE))
    return _C


def offsets_of(widths: Sequence[int]) -> list[int]:
    """[S + 1] where each subspace begins, and where the last one ends."""
    return [0, *accumulate(widths)]


def rows_of(tensor: Tensor) -> tuple[int, int, int]:
    """Address, number of the type and stride of rows, as the extension takes them."""
    return tensor.data_ptr(), _TYPES[tensor.dtype], tensor.stride(0)
