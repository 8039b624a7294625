"""Arrays of other libraries as tensors: NumPy, JAX, and whatever speaks DLPack."""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ndm_fast.errors import InputError


class HasDlpack(Protocol):
    """What lends its memory by DLPack: arrays of NumPy, JAX, CuPy and others."""

    def __dlpack__(self, *arguments: Any, **options: Any) -> Any: ...


Array: TypeAlias = Tensor | HasDlpack
"""What the ops take for a tensor that they only read."""


def as_tensor(name: str, value: object) -> Tensor:
    """The value as a tensor over the same memory, read only where it was.

    It is copied where torch has no such layout: negative strides, bytes in the other order.

    Raises:
        InputError: it is no tensor and no array, or an array that torch cannot hold.
    """
    if isinstance(value, Tensor):
        return value
    if not hasattr(value, "__dlpack__"):
        raise InputError(f"{name} is {in_short(value)}: give a tensor or an array")
    if isinstance(value, np.ma.MaskedArray):
        raise InputError(f"{name} is a masked array, whose mask no op sees: give its filled values")
    try:
        if isinstance(value, np.ndarray):
            return _from_numpy(value)
        return torch.from_dlpack(value)
    except Exception as error:  # whatever the other library raises
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"{name} is {in_short(value)} that torch cannot read: {reason}") from None


def _from_numpy(array: np.ndarray) -> Tensor:
    native = array.dtype.newbyteorder("=")
    whole = all(stride >= 0 and stride % array.itemsize == 0 for stride in array.strides)
    if not whole or array.dtype != native:  # torch ends the process at a negative stride
        array = np.array(array, dtype=native)
    try:
        return torch.from_dlpack(array)  # unlike from_numpy, without a warning where it is read-only
    except BufferError:  # NumPy before 2.1 lends nothing that is read-only
        return torch.from_numpy(array.copy())


def in_short(value: object) -> str:
    """What an argument is, in a few words of one line."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    return (
        repr(value) if value is None or isinstance(value, int | float | str) else f"a {type(value).__name__}"
    )
