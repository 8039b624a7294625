"""Steps call a backend's functions, with no library op around them and the results of one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ndm_fast import ops
from ndm_fast.config import TrainConfig
from ndm_fast.errors import InputError
from ndm_fast.ops import backends
from ndm_fast.ops.gradient import direct_gradient
from ndm_fast.ops.lie_update import direct_update
from ndm_fast.ops.nearest import direct_index
from ndm_fast.ranks import Group
from ndm_fast.train.rotation.base import Rotation
from ndm_fast.train.rotation.make import make_rotation
from ndm_fast.train.steps import Steps

WIDTHS = [8, 8, 5]
RUNNABLE = [name for name in backends.BACKENDS if backends.obstacle(name, "cpu") is None]


class Ops(TorchDispatchMode):
    """Names of the package's library ops that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "ndm_fast":
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def _steps(kind: str, cuda_graph: bool, **changes: Any) -> tuple[Steps, Rotation]:
    config = TrainConfig(queries=16, search_every=4, rotation=kind, **changes)
    rotation = make_rotation(kind, torch.linalg.qr(torch.randn(21, 21)).Q, (0.9, 0.999))
    return Steps(config, Group(), WIDTHS, rotation, 1.0, cuda_graph=cuda_graph), rotation


@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize("changes", [{}, {"metric": "cosine"}, {"objective": "log"}], ids=str)
@pytest.mark.parametrize("kind", ["lie", "lazy"])
def test_steps_and_their_search_call_no_library_op(kind: str, changes: Any, cuda_graph: bool) -> None:
    steps, rotation = _steps(kind, cuda_graph, **changes)
    keys = torch.randn(500, 21)
    with Ops() as seen:
        for queries in torch.randn(3, 64, 21):
            index = steps.neighbors(queries, keys, rotation.ahead(2.0, 1e-4))
            steps.take_steps(queries, keys, index, [rotation.next_turn(1e-4) for _ in range(4)])
        assert not seen.names
        ops.nearest_index(queries, keys, rotation.matrix, WIDTHS)
    assert seen.names  # it would have seen one


def _rows(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    queries, keys = torch.randn(30, 21).to(dtype), torch.randn(200, 21).to(dtype)
    return {"queries": queries, "keys": keys, "rotation": torch.linalg.qr(torch.randn(21, 21)).Q}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("backend", RUNNABLE)
def test_gives_the_bits_of_the_op(monkeypatch: pytest.MonkeyPatch, backend: str, dtype: torch.dtype) -> None:
    """Also under autocast, and of rows that ask for a gradient, which none of them carries."""
    monkeypatch.setenv("NDM_FAST_BACKEND", backend)
    for metric in ("euclidean", "cosine"):
        given = {**_rows(dtype), "widths": WIDTHS, "metric": metric}
        given["rotation"].requires_grad_()
        index = ops.nearest_index(**given)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(direct_index()(**given, precision="fp32"), index)
            found = direct_gradient()(**given, index=index, counted=None, log_floor=None)
        for one, other in zip(found, ops.loss_and_gradient(**given, index=index), strict=True):
            assert torch.equal(one, other)
            assert not one.requires_grad
    product, *moments = torch.randn(3, 21, 21).abs().unbind()
    others = [moment.clone() for moment in moments]
    update = direct_update()(**_adam(product, *moments))
    assert torch.equal(update, ops.lie_update(**_adam(product, *others)))
    assert torch.equal(torch.stack(moments), torch.stack(others))


def _adam(product: Tensor | None, first: Tensor, second: Tensor, half: bool = False) -> dict[str, Any]:
    given = {"product": product, "first": first, "second": second, "scale": 1e-3, "guard": 1e-8}
    return {**given, "betas": [0.9, 0.999], "half": half}


def test_arguments_are_checked_once_for_each_form(monkeypatch: pytest.MonkeyPatch) -> None:
    from ndm_fast.ops import checks

    calls = []
    check_rows = checks.check_rows
    monkeypatch.setattr(checks, "check_rows", lambda *given: calls.append(1) or check_rows(*given))
    find = direct_index()
    form = {"widths": WIDTHS, "metric": "euclidean", "precision": "fp32"}
    for _ in range(3):
        find(**_rows(), **form)
    assert len(calls) == 1
    find(**_rows(torch.float16), **form)
    assert len(calls) == 2
    with pytest.raises(InputError, match="the widths sum to 20"):
        find(**_rows(), **{**form, "widths": [8, 8, 4]})
    with pytest.raises(InputError, match="keys has dtype float64"):
        find(**{**_rows(), "keys": torch.zeros(200, 21).double()}, **form)
    move = direct_update()
    moments = torch.zeros(2, 6, 6)
    for product in (torch.randn(6, 6), None):
        move(**_adam(product, *moments))
    with pytest.raises(InputError, match="second is changed in place, its strides"):
        move(**_adam(None, moments[0], moments[1].T))
