"""Odd arguments: the same line, or the same result, on every backend; each op, argument and oddity."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ndm_fast import ops
from ndm_fast.errors import InputError
from ndm_fast.geometry.orthogonal import random_rotation
from ndm_fast.ops import backends
from ndm_fast.train.merge.mutual_information import mutual_information

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Sparse:UserWarning", "ignore:.*nested tensors:UserWarning"),
    pytest.mark.filterwarnings(
        "ignore:(overflow|invalid value) encountered:RuntimeWarning"
    ),  # numpy, in Triton's interpreter
]

RUNNABLE = [name for name in backends.BACKENDS if backends.obstacle(name, "cpu") is None]
WIDTHS = [5, 3]
QUERIES, KEYS = 2, 20


def rows_of() -> dict[str, Any]:
    """Arguments that every op but one takes."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(QUERIES + KEYS, 8, generator=generator)
    rotation = random_rotation(8, generator)
    return {
        "queries": rows[:QUERIES].clone(),
        "keys": rows[QUERIES:].clone(),
        "rotation": rotation,
        "widths": WIDTHS,
    }


def case(op: str) -> dict[str, Any]:
    """Good arguments, anew at each call: some are changed in place."""
    generator = torch.Generator().manual_seed(1)
    if op == "lie_update":
        product, first, second = torch.randn(3, 8, 8, generator=generator)
        moments = {"product": product, "first": first - first.T, "second": (second * second.T) ** 2}
        return {**moments, "scale": 1e-3, "guard": 1e-8, "betas": (0.9, 0.999), "half": False}
    given = rows_of()
    if op == "nearest_neighbors":
        return {**given, "metric": "euclidean", "precision": "fp32", "keys_rotated": False}
    if op == "k_nearest_neighbors":
        exclude = torch.tensor([-1, 7])
        return {**given, "k": 3, "exclude": exclude, "metric": "euclidean", "keys_rotated": False}
    if op == "nearest_index":
        return {**given, "metric": "euclidean", "precision": "fp32"}
    if op == "loss_and_gradient":
        index = torch.randint(KEYS, (2, QUERIES), generator=generator)
        return {**given, "index": index, "metric": "euclidean", "counted": index % 2 == 0}
    if op == "mutual_information":
        return {**given, "pairs": [(0, 1)]}
    given |= {"variances": torch.tensor([5.0, 3.0]), "pairs": torch.tensor([[0, 1]])}
    return {**given, "radius": torch.full((1, QUERIES), 0.8)} if op == "ksg_counts" else given


OPS: dict[str, Callable[..., Any]] = {
    **{name: getattr(ops, name) for name in ops.__all__},
    "mutual_information": mutual_information,
}


def odd_tensors(good: Tensor) -> dict[str, Any]:
    """Name -> something that stands in the place of a tensor."""
    found: dict[str, Any] = {
        "None": None,
        "a list": good.tolist(),
        "an array": good.numpy(),
        "a number": 3,
        "a string": "rows",
        "meta": good.to("meta"),
        "sparse": good.to_sparse(),
        "nested": torch.nested.nested_tensor([good[0], good[-1]]) if good.ndim > 1 else torch.zeros(()),
        "flat": good.flatten(),
        "scalar": good.flatten()[0],
        "one more dimension": good[None],
        "one row": good[:1],
        "no rows": good[:0],
        "one column less": good[..., :-1],
        "one column more": torch.cat([good, good[..., :1]], -1),
        "no columns": good[..., :0],
        "transposed": good.T if good.ndim == 2 else good[None],
        "strided": torch.stack([good, good], -1).flatten(-2)[..., ::2],
        "strided rows": torch.cat([good, good], -1)[..., : good.shape[-1]],
        "expanded": good[:1].expand(good.shape),
        "zeros": torch.zeros_like(good),
        "twice": torch.cat([good, good]),
    }
    if good.ndim == 2:
        found["column-major"] = good.T.contiguous().T
    for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool):
        found[f"as {dtype}"] = good.to(dtype)
    found["as complex"] = good.to(torch.complex64)
    if good.is_floating_point():
        for value in (torch.nan, torch.inf, -torch.inf, 1e-30):
            found[f"holds {value}"] = good.clone().index_fill_(0, torch.tensor([0]), value)
        for power in (1e15, 1e19, 1e25, 1e-30):
            found[f"times {power:g}"] = good * power
        found |= {"negative": -good.abs(), "tracked": good.clone().requires_grad_()}
    elif good.dtype == torch.int64:
        for value in (-(2**63), -1, 2, KEYS, 70, 100_000, 10**9, 2**62):
            found[f"names {value}"] = good.clone().index_fill_(0, torch.tensor([0]), value)
    return found


ODD: dict[str, dict[str, Any]] = {
    "widths": {
        **{
            str(w): w
            for w in (None, 3, "53", [], [8, 0], [-1, 9], [5, 4], [4, 3], [8.0], [5, 3.0], [None, 8])
        },
        "a tuple": (5, 3),
        "a tensor": torch.tensor([5, 3]),
        "an array": np.array([5, 3]),
        "one": [8],
        "all": [1] * 8,
        "nested": [[5], [3]],
        "huge": [2**62, 2**62],
    },
    "metric": {
        str(m): m for m in (None, "cosine", "cosin", "EUCLIDEAN", "euclidean ", "", b"cosine", 3, [1])
    },
    "precision": {str(m): m for m in (None, "bf16", "fp16", "FP32", "", 32, ["fp32"])},
    "keys_rotated": {"True": True, "1": 1},
    "betas": {
        str(b): b
        for b in (
            None,
            0.9,
            (0.9,),
            (0.9, 0.99, 0.999),
            (1.0, 0.9),
            (0.9, -0.1),
            (float("nan"), 0.9),
            "ab",
            (0, 0),
        )
    },
    "half": {"True": True, "1": 1},
    "k": {str(k): k for k in (None, 0, -1, 1, KEYS - 1, KEYS, KEYS + 1, 2.0, "3", [3], True)},
}
FACTOR = {
    **{str(v): v for v in (None, 0, 1, "1", 0.0, -1e-3, 1e30)},
    "a tensor": torch.tensor(1e-3),
    "fp64": torch.tensor(1e-3, dtype=torch.float64),
    "[1]": torch.tensor([1e-3]),
    "meta": torch.tensor(1e-3, device="meta"),
}
PAIRS = {
    str(p): p
    for p in (None, [], 3, "ab", [(0, 0)], [(0, 2)], [(-1, 1)], [(0,)], [(0, 1, 1)], [(0.0, 1)], [(1, 0)])
}


UNLIKE: dict[str, dict[str, str | tuple[str, ...]]] = {
    # One side far larger than the other: squares overflow in fp32. Both sides: test_nearest.py.
    "nearest_neighbors": dict.fromkeys(("queries", "keys", "rotation"), ("times", "as torch.float64")),
    # All backends run the same code, and one takes fp64 (test_differentiable.py).
    "k_nearest_neighbors": dict.fromkeys(("queries", "keys", "rotation"), "as torch.float64"),
    "loss_and_gradient": {
        **dict.fromkeys(("queries", "keys"), ("times", "holds nan", "holds inf", "holds -inf")),
        "rotation": ("times", "holds"),
    },
    # Nothing looks at these: NaN and Inf in, anything out.
    "nearest_index": dict.fromkeys(("queries", "keys", "rotation"), ("times", "holds")),
    "lie_update": dict.fromkeys(("product", "first", "second"), ("times", "holds")),
    # No rotation at all.
    **{op: {"rotation": "times"} for op in ("ksg_radius", "ksg_counts", "ksg_radius_and_counts")},
}
"""Oddities, by how their names begin, whose results are garbage that differs by backend."""


def every_oddity(op: str, argument: str) -> dict[str, Any]:
    good = case(op)[argument]
    if isinstance(good, Tensor):
        return odd_tensors(good)
    if argument in ("scale", "guard"):
        return FACTOR
    return PAIRS if argument == "pairs" else ODD[argument]


def oddities(op: str, argument: str) -> dict[str, Any]:
    unlike = UNLIKE.get(op, {}).get(argument, ())
    return {name: odd for name, odd in every_oddity(op, argument).items() if not name.startswith(unlike)}


def outcome(op: str, given: dict[str, Any]) -> str | list[Tensor]:
    """The error's text, or all that the op gives and changes."""
    try:
        found = OPS[op](**given)
    except InputError as error:
        return str(error)
    results = list(found) if isinstance(found, tuple) else [found]
    return results + [given[name] for name in ("first", "second") if name in given]


def differ(one: str | list[Tensor], other: str | list[Tensor]) -> bool:
    if isinstance(one, str) or isinstance(other, str):
        return one != other
    for a, b in zip(one, other, strict=True):
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            return True
        rtol = 1e-2 if a.dtype == torch.bfloat16 else 1e-4
        if not torch.allclose(a.double(), b.double(), rtol=rtol, atol=1e-6, equal_nan=True):
            return True
    return False


def own(value: Any) -> Any:
    """A copy of what an op may change in place, with its strides."""
    strided = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_nested
    if not strided or not value.is_contiguous():
        return value
    return value.detach().clone().requires_grad_(value.requires_grad)


@pytest.mark.parametrize(("op", "argument"), [(op, argument) for op in OPS for argument in case(op)])
def test_every_backend_answers_alike(op: str, argument: str) -> None:
    wrong = []
    for name, value in oddities(op, argument).items():
        found = {}
        for backend in RUNNABLE:
            try:
                found[backend] = outcome(op, {**case(op), argument: own(value), "backend": backend})
            except Exception as error:
                wrong.append(f"{name} on {backend}: {type(error).__name__}: {error}")
        first = next(iter(found.values()), None)
        if any(differ(first, each) for each in found.values()):
            wrong.append(f"{name}: {found}")
        wrong += [f"{name}: {each}" for each in found.values() if isinstance(each, str) and "\n" in each]
    assert not wrong, "\n".join(wrong)


def test_the_table_is_long() -> None:
    assert sum(len(oddities(op, argument)) for op in OPS for argument in case(op)) > 800


REFUSED = [
    ("nearest_neighbors", "queries", "as torch.float64", "queries has dtype float64: give float32 or"),
    ("nearest_neighbors", "keys", "as torch.int64", "keys has dtype int64"),
    (
        "nearest_neighbors",
        "keys",
        "one column less",
        "keys has shape [20, 7], the widths sum to 8: give [K, 8]",
    ),
    ("nearest_neighbors", "keys", "meta", "keys is on meta"),
    ("nearest_neighbors", "keys", "sparse", "keys has layout torch.sparse_coo"),
    ("nearest_neighbors", "keys", "no rows", "keys has no rows: give at least one"),
    ("nearest_neighbors", "queries", "no rows", "queries has no rows: give at least one"),
    ("nearest_neighbors", "queries", "holds nan", "queries holds NaN or Inf"),
    ("nearest_neighbors", "rotation", "as torch.bfloat16", "rotation has dtype bfloat16: give float32"),
    ("nearest_neighbors", "rotation", "None", "rotation is None"),
    (
        "nearest_neighbors",
        "rotation",
        "one row",
        "rotation has shape [1, 8], the widths sum to 8: give [8, 8]",
    ),
    ("nearest_neighbors", "widths", "None", "widths is None"),
    ("nearest_neighbors", "widths", "[8, 0]", "widths [8, 0] are empty or hold one below 1"),
    ("nearest_neighbors", "metric", "cosin", "metric is 'cosin': take euclidean or cosine"),
    ("nearest_neighbors", "precision", "fp16", "precision is 'fp16': take fp32 or bf16"),
    ("k_nearest_neighbors", "k", "None", "k is None: give an int"),
    ("k_nearest_neighbors", "k", "0", "k is 0 of 20 keys, one of them excluded: give from 1"),
    ("k_nearest_neighbors", "k", "20", "k is 20 of 20 keys, one of them excluded: give from 1"),
    ("k_nearest_neighbors", "exclude", "names 20", "exclude names row 20 of 20 keys: give rows from -1 on"),
    ("k_nearest_neighbors", "exclude", "one row", "exclude has shape [1]: give [2]"),
    ("k_nearest_neighbors", "exclude", "as torch.int32", "exclude has dtype int32: give int64"),
    ("nearest_neighbors", "queries", "a list", "queries is a list: give a tensor or an array"),
    ("ksg_radius", "variances", "a number", "variances is 3: give a tensor or an array"),
    ("lie_update", "first", "an array", "first is changed in place, it is a ndarray: give a tensor"),
    ("nearest_index", "rotation", "as torch.float16", "rotation has dtype float16: give float32"),
    ("nearest_index", "metric", "EUCLIDEAN", "metric is 'EUCLIDEAN'"),
    ("nearest_index", "widths", "[5, 4]", "the widths sum to 9"),
    ("loss_and_gradient", "index", "meta", "index is on meta"),
    ("loss_and_gradient", "index", "as torch.int32", "index has dtype int32: give int64"),
    ("loss_and_gradient", "index", "one column less", "index has shape [2, 1]: give [2, 2]"),
    ("loss_and_gradient", "index", "names -1", "index names row -1 of 20 keys"),
    ("loss_and_gradient", "index", "names 20", "index names row 20 of 20 keys"),
    ("loss_and_gradient", "counted", "one column less", "counted has shape [2, 1]: give [2, 2]"),
    ("loss_and_gradient", "counted", "as torch.int64", "counted has dtype int64: give bool"),
    ("loss_and_gradient", "widths", "[4, 3]", "the widths sum to 7"),
    ("loss_and_gradient", "metric", "cosin", "metric is 'cosin'"),
    ("lie_update", "product", "meta", "product is on meta"),
    ("lie_update", "first", "column-major", "first is changed in place"),
    ("lie_update", "second", "as torch.float64", "second has dtype float64: give float32"),
    ("lie_update", "betas", "(1.0, 0.9)", "betas are 1.0, 0.9"),
    ("lie_update", "scale", "a tensor", "give two numbers or two [] tensors"),
    ("ksg_radius", "pairs", "names 2", "pairs name subspaces outside 0 … 1"),
    ("ksg_radius", "variances", "negative", "variances hold one below 0"),
    ("ksg_counts", "radius", "one column less", "radius has shape [1, 1]: give [1, 2]"),
    ("mutual_information", "keys", "one row", "keys has one row, and no variance: give at least two"),
    ("mutual_information", "pairs", "[(0, 2)]", "pairs name (0, 2)"),
]


@pytest.mark.parametrize(("op", "argument", "oddity", "message"), REFUSED, ids=lambda x: str(x)[:20])
def test_refuses_by_name(op: str, argument: str, oddity: str, message: str) -> None:
    found = outcome(op, {**case(op), argument: every_oddity(op, argument)[oddity]})
    assert isinstance(found, str)
    assert message in found


@pytest.mark.parametrize("op", OPS)
def test_an_unknown_backend_is_named(op: str) -> None:
    for name in ("abacus", 3, ["cpu"]):
        with pytest.raises(InputError, match="unknown backend"):
            OPS[op](**case(op), backend=name)


def test_first_and_second_must_differ() -> None:
    given = case("lie_update")
    with pytest.raises(InputError, match="not three tensors"):
        ops.lie_update(**{**given, "second": given["first"]})
