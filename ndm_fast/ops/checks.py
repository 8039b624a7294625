"""What the ops ask of their arguments: all of it is checked here, once, before any backend sees them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from operator import index as as_index
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ndm_fast.errors import InputError

ROW_TYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Of activations; a rotation is fp32."""

_FLOATS = (torch.float32, torch.float64)


def check_widths(widths: Iterable[int]) -> list[int]:
    """The widths as a list of ints, at least one, all positive."""
    try:
        found = [as_index(width) for width in widths]
    except TypeError:
        raise InputError(f"widths is {_short(widths)}: give a sequence of ints that sum to d") from None
    if not found or min(found) < 1:
        raise InputError(f"widths {found} are empty or hold one below 1: give positive widths")
    return found


def check_tensor(
    name: str,
    value: object,
    shape: Sequence[int | str],
    dtypes: Sequence[torch.dtype],
    like: Tensor | None = None,
    *,
    because: str = "",
) -> None:
    """A strided tensor of this shape (a string stands for any size), with one of these dtypes, on one device.

    Args:
        like: a tensor that was checked before, on whose device this one must be.
        because: where the shape comes from.
    """
    if not isinstance(value, Tensor):
        raise InputError(f"{name} is {_short(value)}: give a tensor")
    if value.is_nested or value.layout != torch.strided:
        raise InputError(f"{name} has layout {value.layout}, or is nested: give a dense tensor")
    wanted = f"[{', '.join(map(str, shape))}]"
    if value.ndim != len(shape) or any(
        isinstance(size, int) and size != given for size, given in zip(shape, value.shape, strict=True)
    ):
        raise InputError(f"{name} has shape {list(value.shape)}{because}: give {wanted}")
    if value.dtype not in dtypes:
        raise InputError(f"{name} has dtype {_name(value.dtype)}: give {_names(dtypes)}")
    if value.device.type == "meta":
        raise InputError(f"{name} is on meta, without any data: give a tensor on a device")
    if like is not None and value.device != like.device:
        raise InputError(f"{name} is on {value.device}, others are on {like.device}: move them to one device")


def check_rows(
    queries: Tensor,
    keys: Tensor,
    rotation: Tensor | None,
    widths: Sequence[int],
    *,
    check_finite: bool,
    rotated: bool = False,
) -> tuple[Tensor, list[int]]:
    """Check what every search has in common.

    Args:
        rotated: both sides are rotated, so that ``rotation`` may be None.

    Returns:
        The rotation (where None was given, the identity, which nothing reads), and the widths as a list.
    """
    widths = check_widths(widths)
    width = sum(widths)
    because = f", the widths sum to {width}"
    check_tensor("queries", queries, ("Q", width), ROW_TYPES, because=because)
    check_tensor("keys", keys, ("K", width), ROW_TYPES, queries, because=because)
    if rotation is None and rotated:
        rotation = torch.eye(width, device=queries.device)
    elif rotation is None:
        raise InputError("rotation is None: give a tensor, or say that queries and keys are both rotated")
    check_tensor("rotation", rotation, (width, width), (torch.float32,), queries, because=because)
    for name, rows in (("queries", queries), ("keys", keys)):
        if rows.shape[0] == 0:
            raise InputError(f"{name} has no rows: give at least one")
    if check_finite:
        for name, rows in (("queries", queries), ("keys", keys), ("rotation", rotation)):
            check_largest(name, rows)
    return rotation, widths


def check_largest(name: str, values: Tensor) -> float:
    """The largest absolute value, which must be finite; 0 of a tracer's fake tensor, which holds none."""
    if isinstance(values, FakeTensor):
        return 0.0
    low, high = torch.aminmax(values.detach())  # one pass that writes nothing; NaN stays NaN
    largest = float(torch.maximum(high, -low))
    if not math.isfinite(largest):
        raise InputError(f"{name} holds NaN or Inf: drop these rows or use a wider dtype")
    return largest


def check_metric(metric: str) -> None:
    _check_choice("metric", metric, ("euclidean", "cosine"))


def check_log_floor(log_floor: Tensor | None, metric: str, subspaces: int, queries: Tensor) -> None:
    """Floors [S] fp32 of the logarithm, which is of euclidean distances."""
    if log_floor is None:
        return
    if metric != "euclidean":
        raise InputError(f"log_floor goes with metric 'euclidean', not {metric!r}: leave one of them out")
    check_tensor("log_floor", log_floor, (subspaces,), (torch.float32,), queries)


def check_precision(precision: str) -> None:
    _check_choice("precision", precision, ("fp32", "bf16"))


def check_pairs(variances: Tensor, pairs: Tensor, subspaces: int, queries: Tensor) -> None:
    """Variances [S], finite and none below 0, and numbers of subspaces [P, 2]."""
    check_tensor("variances", variances, (subspaces,), _FLOATS, queries)
    check_tensor("pairs", pairs, ("P", 2), (torch.int64,), queries)
    if pairs.shape[0] == 0:
        raise InputError("pairs has no rows: give at least one")
    if not isinstance(pairs, FakeTensor):
        low, high = torch.aminmax(pairs)
        if int(low) < 0 or int(high) >= subspaces:
            raise InputError(f"pairs name subspaces outside 0 … {subspaces - 1}: give numbers of subspaces")
    check_largest("variances", variances)
    if not isinstance(variances, FakeTensor) and float(variances.detach().min()) < 0:
        raise InputError("variances hold one below 0: give none or positive ones")


def check_neighbors(
    index: Tensor, counted: Tensor | None, subspaces: int, queries: Tensor, keys: Tensor, *, check_index: bool
) -> None:
    """Rows of the keys [S, Q], and which of them count."""
    shape = (subspaces, queries.shape[0])
    check_tensor("index", index, shape, (torch.int64,), queries)
    if counted is not None:
        check_tensor("counted", counted, shape, (torch.bool,), queries)
    if check_index and not isinstance(index, FakeTensor):
        low, high = torch.stack(torch.aminmax(index)).tolist()  # one wait for the device, not two
        if low < 0 or high >= keys.shape[0]:
            raise InputError(
                f"index names row {low if low < 0 else high} of {keys.shape[0]} keys: give rows from 0 on"
            )


def check_moments(product: Tensor | None, first: Tensor, second: Tensor) -> None:
    """Moments [d, d] that can be changed in place, and the product that moves them."""
    check_tensor("first", first, ("d", "d"), (torch.float32,))
    size = first.shape[0]
    for name, moment in (("first", first), ("second", second)):
        check_tensor(name, moment, (size, size), (torch.float32,), first)
        if not moment.is_contiguous():
            raise InputError(
                f"{name} is changed in place, its strides are {moment.stride()}: give a contiguous one"
            )
    if size == 0:
        raise InputError("first has no rows: give at least one")
    if product is not None:
        check_tensor("product", product, (size, size), ROW_TYPES, first)
    if first is second or product is first or product is second:
        raise InputError("product, first and second are not three tensors: two of them are changed in place")


def check_factors(scale: Any, guard: Any, first: Tensor) -> None:
    """Two numbers, or two [] fp32 tensors."""
    numbers = [isinstance(value, int | float) for value in (scale, guard)]
    if all(numbers):
        return
    for name, value in (("scale", scale), ("guard", guard)):
        if any(numbers) or not isinstance(value, Tensor):
            raise InputError(
                f"scale is {_short(scale)}, guard is {_short(guard)}: give two numbers or two [] tensors"
            )
        check_tensor(name, value, (), (torch.float32,), first)


def check_betas(betas: Sequence[float]) -> tuple[float, float]:
    """Two decays from 0 to below 1."""
    try:
        fast, slow = (float(beta) for beta in betas)
    except (TypeError, ValueError):
        raise InputError(f"betas is {_short(betas)}: give two numbers") from None
    if not (0 <= fast < 1 and 0 <= slow < 1):
        raise InputError(f"betas are {fast}, {slow}: give numbers from 0 to below 1")
    return fast, slow


def _check_choice(name: str, value: object, choices: tuple[str, str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise InputError(f"{name} is {_short(value)}: take {' or '.join(choices)}")


def _short(value: object) -> str:
    """What an argument is, in a few words of one line."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    return (
        repr(value) if value is None or isinstance(value, int | float | str) else f"a {type(value).__name__}"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(map(_name, dtypes))
