"""What the ops ask of their arguments: all of it is checked here, once, before any backend sees them.

Shapes, types and devices are checked by the public functions, so that ``torch.compile`` checks them as it
traces. What looks at values runs inside the ops (``ndm_fast.ops.library``), which tracing does not enter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from operator import index as as_index
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ndm_fast.errors import InputError
from ndm_fast.ops import backends
from ndm_fast.ops.arrays import Array, as_tensor, in_short

ROW_TYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Of activations; a rotation is fp32."""

_FLOATS = (torch.float32, torch.float64)


def check_widths(widths: Iterable[int]) -> list[int]:
    """The widths as a list of ints, at least one, all positive."""
    try:
        found = [as_index(width) for width in widths]
    except TypeError:
        raise InputError(f"widths is {in_short(widths)}: give a sequence of ints that sum to d") from None
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
    double: bool | None = None,
) -> Tensor:
    """A strided tensor of this shape (a string stands for any size), with one of these dtypes, on one device.

    Args:
        value: a tensor, or an array that becomes one.
        like: a tensor that was checked before, on whose device this one must be.
        because: where the shape comes from.
        double: whether fp64 is taken too; None where no backend takes it.
    """
    value = as_tensor(name, value)
    if value.is_nested or value.layout != torch.strided:
        raise InputError(f"{name} has layout {value.layout}, or is nested: give a dense tensor")
    if value.ndim != len(shape) or any(
        isinstance(size, int) and size != given for size, given in zip(shape, value.shape, strict=True)
    ):
        wanted = ", ".join(map(str, shape))  # not before: a tracer does not write a size that may change
        raise InputError(f"{name} has shape {list(value.shape)}{because}: give [{wanted}]")
    if value.dtype not in dtypes and not (double and value.dtype == torch.float64):
        or_else = "" if double is None else "; backend 'reference' takes float64"
        raise InputError(f"{name} has dtype {_name(value.dtype)}: give {_names(dtypes)}{or_else}")
    if value.device.type == "meta":
        raise InputError(f"{name} is on meta, without any data: give a tensor on a device")
    if like is not None and value.device != like.device:
        raise InputError(f"{name} is on {value.device}, others are on {like.device}: move them to one device")
    return value


class Rows(NamedTuple):
    """What every search has in common, checked."""

    queries: Tensor
    keys: Tensor
    rotation: Tensor
    """The identity, which nothing reads, where None was given."""
    widths: list[int]


def check_rows(
    queries: Array,
    keys: Array,
    rotation: Array | None,
    widths: Iterable[int],
    *,
    rotated: bool = False,
    backend: str | None = None,
    float64: bool = False,
) -> Rows:
    """Check what every search has in common.

    Args:
        rotated: both sides are rotated, so that ``rotation`` may be None.
        backend: as the op was given it. With ``float64`` the reference takes fp64 too.
    """
    widths = check_widths(widths)
    width = sum(widths)
    queries, keys = as_tensor("queries", queries), as_tensor("keys", keys)
    rotation = None if rotation is None else as_tensor("rotation", rotation)
    double = None
    if float64:
        asked = any(each is not None and each.dtype == torch.float64 for each in (queries, keys, rotation))
        on_device = queries.device.type != "meta"
        double = asked and on_device and backends.choose(queries.device, backend).name == "reference"
    form: dict[str, Any] = {"because": f", the widths sum to {width}", "double": double}
    queries = check_tensor("queries", queries, ("Q", width), ROW_TYPES, **form)
    keys = check_tensor("keys", keys, ("K", width), ROW_TYPES, queries, **form)
    if rotation is None and rotated:
        rotation = torch.eye(width, device=queries.device)
    elif rotation is None:
        raise InputError("rotation is None: give a tensor, or say that queries and keys are both rotated")
    rotation = check_tensor("rotation", rotation, (width, width), (torch.float32,), queries, **form)
    for name, rows in (("queries", queries), ("keys", keys)):
        if rows.shape[0] == 0:
            raise InputError(f"{name} has no rows: give at least one")
    return Rows(queries, keys, rotation, widths)


def check_rotated(keys_rotated: bool, queries_rotated: bool) -> None:
    if queries_rotated and not keys_rotated:
        raise InputError("queries_rotated goes with keys_rotated: rotate both, or give both raw")


def check_finite(queries: Tensor, keys: Tensor, rotation: Tensor) -> None:
    """Looks at the values, all of which must be finite."""
    for name, values in (("queries", queries), ("keys", keys), ("rotation", rotation)):
        check_largest(name, values)


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


def check_log_floor(log_floor: Array | None, metric: str, subspaces: int, queries: Tensor) -> Tensor | None:
    """Floors [S] fp32 of the logarithm, which is of euclidean distances."""
    if log_floor is None:
        return None
    if metric != "euclidean":
        raise InputError(f"log_floor goes with metric 'euclidean', not {metric!r}: leave one of them out")
    return check_tensor("log_floor", log_floor, (subspaces,), (torch.float32,), queries)


def check_precision(precision: str) -> None:
    _check_choice("precision", precision, ("fp32", "bf16"))


def check_pairs(variances: Array, pairs: Array, subspaces: int, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Variances [S] and numbers of subspaces [P, 2]."""
    variances = check_tensor("variances", variances, (subspaces,), _FLOATS, queries)
    pairs = check_tensor("pairs", pairs, ("P", 2), (torch.int64,), queries)
    if pairs.shape[0] == 0:
        raise InputError("pairs has no rows: give at least one")
    return variances, pairs


def check_pair_values(variances: Tensor, pairs: Tensor) -> None:
    """Looks at the values: variances are finite and none is below 0, subspaces are there."""
    subspaces = variances.shape[0]
    if not isinstance(pairs, FakeTensor):
        low, high = torch.aminmax(pairs)
        if int(low) < 0 or int(high) >= subspaces:
            raise InputError(f"pairs name subspaces outside 0 … {subspaces - 1}: give numbers of subspaces")
    check_largest("variances", variances)
    if not isinstance(variances, FakeTensor) and float(variances.detach().min()) < 0:
        raise InputError("variances hold one below 0: give none or positive ones")


def check_neighbors(
    index: Array, counted: Array | None, subspaces: int, queries: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Rows of the keys [S, Q], and which of them count."""
    shape = (subspaces, queries.shape[0])
    index = check_tensor("index", index, shape, (torch.int64,), queries)
    if counted is not None:
        counted = check_tensor("counted", counted, shape, (torch.bool,), queries)
    return index, counted


def check_index(name: str, index: Tensor, keys: int, least: int = 0) -> None:
    """Looks at the values, which name rows of the keys; ``least`` is -1 where that stands for none."""
    if isinstance(index, FakeTensor):
        return
    low, high = torch.stack(torch.aminmax(index)).tolist()  # one wait for the device, not two
    if low < least or high >= keys:
        raise InputError(
            f"{name} names row {low if low < least else high} of {keys} keys: give rows from {least} on"
        )


def check_moments(product: Array | None, first: Tensor, second: Tensor) -> Tensor | None:
    """Moments [d, d] that can be changed in place, and the product that moves them, which is returned."""
    for name, moment in (("first", first), ("second", second)):
        if not isinstance(moment, Tensor):
            raise InputError(f"{name} is changed in place, it is {in_short(moment)}: give a tensor")
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
        product = check_tensor("product", product, (size, size), ROW_TYPES, first)
    if first is second or product is first or product is second:
        raise InputError("product, first and second are not three tensors: two of them are changed in place")
    return product


def check_factors(scale: Any, guard: Any, first: Tensor) -> None:
    """Two numbers, or two [] fp32 tensors."""
    numbers = [isinstance(value, int | float) for value in (scale, guard)]
    if all(numbers):
        return
    for name, value in (("scale", scale), ("guard", guard)):
        if any(numbers) or not isinstance(value, Tensor):
            raise InputError(
                f"scale is {in_short(scale)}, guard is {in_short(guard)}: give two numbers or two [] tensors"
            )
        check_tensor(name, value, (), (torch.float32,), first)


def check_betas(betas: Sequence[float]) -> tuple[float, float]:
    """Two decays from 0 to below 1."""
    try:
        fast, slow = (float(beta) for beta in betas)
    except (TypeError, ValueError):
        raise InputError(f"betas is {in_short(betas)}: give two numbers") from None
    if not (0 <= fast < 1 and 0 <= slow < 1):
        raise InputError(f"betas are {fast}, {slow}: give numbers from 0 to below 1")
    return fast, slow


def _check_choice(name: str, value: object, choices: tuple[str, str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise InputError(f"{name} is {in_short(value)}: take {' or '.join(choices)}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(map(_name, dtypes))
