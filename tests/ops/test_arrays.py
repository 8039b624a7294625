"""Arrays of other libraries, taken where an op only reads: same results, and no copy that can be spared."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from oracle_inputs import rotation_of
from torch import Tensor

from ndm_fast import mutual_information, ops
from ndm_fast.errors import InputError
from ndm_fast.ops.arrays import as_tensor

pytestmark = pytest.mark.usefixtures("one_thread", "no_warning")

WIDTHS = [5, 3]


@pytest.fixture
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


class OnlyDlpack:
    """What a library shows that has no more in common with torch."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def __dlpack__(self, **options: Any) -> Any:
        return self._tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._tensor.__dlpack_device__()


def read_only(tensor: Tensor) -> np.ndarray:
    array = tensor.numpy().copy()
    array.flags.writeable = False
    return array


def of_jax(tensor: Tensor) -> Any:
    jax = pytest.importorskip("jax")
    jax.config.update("jax_enable_x64", True)  # it has no int64 before
    return jax.numpy.asarray(tensor.numpy())


MAKERS = {"numpy": Tensor.numpy, "read-only": read_only, "dlpack": OnlyDlpack, "jax": of_jax}
MADE = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def given_to(op: str) -> dict[str, Any]:
    torch.manual_seed(0)
    given: dict[str, Any] = {
        "queries": torch.randn(6, 8),
        "keys": torch.randn(40, 8),
        "rotation": rotation_of(8),
    }
    if op == "loss_and_gradient":
        index = torch.arange(12).view(2, 6)
        given |= {"index": index, "counted": index > 2, "log_floor": torch.ones(2)}
    elif op.startswith("ksg"):
        given |= {"variances": torch.tensor([5.0, 3.0]), "pairs": torch.tensor([[0, 1]])}
        given |= {"radius": torch.ones(1, 6)} if op == "ksg_counts" else {}
    elif op == "k_nearest_neighbors":
        given |= {"exclude": torch.arange(6)}
    return given


OPS = {name: getattr(ops, name) for name in ops.__all__ if name != "lie_update"}
OPS["mutual_information"] = mutual_information


@MADE
@pytest.mark.parametrize("op", OPS)
def test_every_op_takes_them(op: str, make: Any) -> None:
    given = given_to(op)
    rest = {"widths": WIDTHS, **({"k": 3} if op == "k_nearest_neighbors" else {})}
    found = OPS[op](**{name: make(each) for name, each in given.items()}, **rest)
    torch.testing.assert_close(found, OPS[op](**given, **rest), rtol=0, atol=0)


@MADE
def test_the_update_reads_its_product(make: Any) -> None:
    product, moments = torch.randn(8, 8), torch.rand(2, 2, 8, 8)
    rest = (1e-3, 1e-8, (0.9, 0.999))
    found = ops.lie_update(make(product), *moments[0].clone(), *rest)
    assert torch.equal(found, ops.lie_update(product, *moments[0].clone(), *rest))
    with pytest.raises(InputError, match=r"first is changed in place, it is a .*: give a tensor"):
        ops.lie_update(product, make(moments[0, 0]), moments[0, 1], *rest)


@MADE
def test_nothing_is_copied(make: Any) -> None:
    array = make(torch.randn(6, 8))
    again = torch.from_dlpack(array)
    assert as_tensor("queries", array).data_ptr() == again.data_ptr()


LAYOUTS = {
    "columns": np.asfortranarray,
    "every other": lambda a: np.repeat(a, 2, 0)[::2],
    "a part": lambda a: np.pad(a, 3)[3:-3, 3:-3],
    "one row for all": lambda a: np.broadcast_to(a[:1], a.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_are_taken_as_they_are(layout: str) -> None:
    array = LAYOUTS[layout](np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32))
    tensor = as_tensor("keys", array)
    assert tensor.data_ptr() == array.__array_interface__["data"][0]
    np.testing.assert_array_equal(tensor.numpy(), array)


COPIED = {
    "backwards": lambda a: a[::-1, ::-1],
    "in the other order of bytes": lambda a: a.astype(a.dtype.newbyteorder()),
    "between other fields": lambda a: np.zeros(a.shape, [("flag", "i1"), ("value", "f4")])["value"],
}


@pytest.mark.parametrize("layout", COPIED)
def test_what_torch_cannot_hold_is_copied(layout: str) -> None:
    """Torch ends the process where a stride is negative."""
    array = COPIED[layout](np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32))
    np.testing.assert_array_equal(as_tensor("keys", array).numpy(), array)


def test_numpy_that_lends_nothing_read_only() -> None:
    class Older(np.ndarray):
        def __dlpack__(self, **options: Any) -> Any:
            raise BufferError("Cannot export readonly array")

    array = read_only(torch.randn(6, 8))
    np.testing.assert_array_equal(as_tensor("keys", array.view(Older)).numpy(), array)


REFUSED = {
    "a list": ([[1.0, 2.0]], "keys is a list: give a tensor or an array"),
    "None": (None, "keys is None: give a tensor or an array"),
    "a scalar": (np.float32(3), "keys is a float32: give a tensor or an array"),
    "text": (np.array([["a"]]), "keys is a ndarray that torch cannot read: "),
    "objects": (np.array([[None]]), "keys is a ndarray that torch cannot read: "),
    "masked": (np.ma.masked_array(np.ones((4, 8)), mask=np.eye(4, 8)), "keys is a masked array"),
    "fp64": (np.ones((4, 8)), "keys has dtype float64: give float32"),
    "another shape": (np.ones((4, 7), np.float32), r"keys has shape \[4, 7\]"),
}


@pytest.mark.parametrize("odd", REFUSED)
def test_others_are_refused_in_one_line(odd: str) -> None:
    value, words = REFUSED[odd]
    with pytest.raises(InputError, match=words) as caught:
        ops.nearest_neighbors(torch.randn(2, 8), value, torch.eye(8), WIDTHS)
    assert "\n" not in str(caught.value)


def test_a_library_that_fails_is_named() -> None:
    class Broken:
        def __dlpack__(self, **options: Any) -> Any:
            raise RuntimeError("no memory is lent\nto anybody")

        def __dlpack_device__(self) -> Any:
            return (1, 0)

    with pytest.raises(InputError, match=r"queries is a Broken that torch cannot read: no memory is lent$"):
        ops.nearest_index(Broken(), torch.randn(2, 8), torch.eye(8), WIDTHS)


def test_gradients_go_to_tensors_beside_arrays() -> None:
    given = given_to("nearest_neighbors")
    rotation = given["rotation"].requires_grad_()
    found = ops.nearest_neighbors(given["queries"].numpy(), read_only(given["keys"]), rotation, WIDTHS)
    found.distance.sum().backward()
    assert rotation.grad is not None
    assert rotation.grad.any()
