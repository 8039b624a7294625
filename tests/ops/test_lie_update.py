"""The contract of Adam on the Lie algebra, on every backend, against fp64 torch."""

from __future__ import annotations

import pytest
import torch
from op_backend import Backend
from torch import Tensor

from ndm_fast import ops
from ndm_fast.errors import InputError
from ndm_fast.geometry import reference

pytestmark = pytest.mark.usefixtures("one_thread")

BETAS = (0.9, 0.999)


def moments(width: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A product, moments such as earlier steps leave, and factors."""
    product, first, second = torch.randn(3, width, width) * 1e-3
    first, second = first - first.T, (second * second.T) ** 2
    return tuple(each.to(device) for each in (product, first, second, torch.tensor([3e-3, 1e-7])))


def update_of(first: Tensor, second: Tensor, factors: Tensor) -> Tensor:
    """[d, d] fp64."""
    scale, guard = factors.double()
    return -scale * first.double() / (second.double().sqrt() + guard)


@pytest.mark.parametrize("width", [1, 7, 33, 72, 100])
@pytest.mark.parametrize("half", [False, pytest.param(True, id="bf16")])
def test_matches_fp64(backend: Backend, width: int, half: bool) -> None:
    product, first, second, factors = moments(width, backend.device)
    product[0] *= 1e3
    tangent = (product - product.T).double()
    moment, square = 0.9 * first.double() + 0.1 * tangent, 0.999 * second.double() + 0.001 * tangent**2
    scale, guard = factors.tolist()
    update = ops.lie_update(product, first, second, scale, guard, BETAS, half=half, backend=backend.name)
    assert update.dtype == (torch.bfloat16 if half else torch.float32)
    # The two terms of the first moment may cancel.
    torch.testing.assert_close(first.double(), moment, rtol=1e-6, atol=1e-7 * float(tangent.abs().max()))
    torch.testing.assert_close(second.double(), square, rtol=1e-6, atol=0)
    # bf16 keeps 8 bits, of which Triton's interpreter truncates.
    expected = update_of(first, second, factors)
    torch.testing.assert_close(update.double(), expected, rtol=8e-3 if half else 1e-6, atol=0)
    for skew in (update, first):
        assert torch.equal(skew, -skew.T)
    assert torch.equal(second, second.T)


@pytest.mark.parametrize("width", [1, 7, 16, 63, 64, 100, 130])
def test_is_adams_over_several_steps(backend: Backend, width: int) -> None:
    first, second = backend.on(torch.zeros(width, width), torch.zeros(width, width))
    exact = [first.double(), second.double()]
    arguments = (1e-3, 1e-8, BETAS)
    for product in torch.randn(3, width, width).to(backend.device) * 100:
        update = ops.lie_update(product, first, second, *arguments, backend=backend.name)
        expected = reference.lie_update(product.double(), *exact, *arguments)
        torch.testing.assert_close(update.double(), expected, rtol=1e-4, atol=1e-8)
        torch.testing.assert_close(first.double(), exact[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(second.double(), exact[1], rtol=1e-5, atol=1e-5)
        assert torch.equal(update, -update.T)
    again = ops.lie_update(None, first, second, *arguments, backend=backend.name)
    assert torch.equal(again, update)
    half = ops.lie_update(None, first, second, *arguments, half=True, backend=backend.name)
    torch.testing.assert_close(half.float(), update, rtol=8e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_takes_a_product_in_half_precision(backend: Backend, dtype: torch.dtype) -> None:
    product, *rest, factors = moments(40, backend.device)
    other = [each.clone() for each in rest]
    form = (*factors.tolist(), BETAS)
    given = ops.lie_update(product.to(dtype), *rest, *form, backend=backend.name)
    assert torch.equal(given, ops.lie_update(product.to(dtype).float(), *other, *form, backend=backend.name))


def test_takes_a_product_of_any_layout(backend: Backend) -> None:
    product, *rest, factors = moments(40, backend.device)
    other = [each.clone() for each in rest]
    form = (*factors.tolist(), BETAS)
    given = ops.lie_update(product.T, *rest, *form, backend=backend.name)
    assert torch.equal(given, ops.lie_update(product.T.contiguous(), *other, *form, backend=backend.name))


def test_factors_may_be_numbers_or_single_elements(backend: Backend) -> None:
    product, first, second, factors = moments(40, backend.device)
    given = [
        ops.lie_update(product, first.clone(), second.clone(), *each, BETAS, backend=backend.name)
        for each in (factors.unbind(), factors.tolist())
    ]
    assert torch.equal(given[0], given[1])


def test_without_a_product_the_moments_stay(backend: Backend) -> None:
    _, first, second, factors = moments(40, backend.device)
    before = first.clone(), second.clone()
    update = ops.lie_update(None, first, second, *factors.tolist(), BETAS, backend=backend.name)
    assert torch.equal(first, before[0])
    assert torch.equal(second, before[1])
    torch.testing.assert_close(update.double(), update_of(first, second, factors), rtol=1e-6, atol=0)


def test_keeps_nan(backend: Backend) -> None:
    product, first, second, factors = moments(40, backend.device)
    product[3, 35] = torch.nan
    update = ops.lie_update(product, first, second, *factors.tolist(), BETAS, backend=backend.name)
    assert update.isnan().nonzero().tolist() == [[3, 35], [35, 3]]


def test_refuses_moments_it_cannot_change(backend: Backend) -> None:
    product, first, second, _ = moments(20, backend.device)
    before = first.clone(), second.clone()
    for wrong in (
        first.double(),
        first.T,
        torch.zeros(20, 40, device=backend.device)[:, ::2],
        torch.zeros(20, 19, device=backend.device),
        torch.zeros(0, 0, device=backend.device),
        second,
    ):
        for moved in ((wrong, second), (first, wrong))[: 1 if wrong is second else 2]:
            with pytest.raises(InputError, match=r"first|second"):
                ops.lie_update(product, *moved, 1e-3, 1e-8, BETAS, backend=backend.name)
    assert torch.equal(first, before[0])
    assert torch.equal(second, before[1])


def test_writes_every_output(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs start as NaN; none may survive."""
    product, first, second, factors = moments(33, backend.device)
    for name in ("empty", "empty_like"):
        made = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, made=made, **k: made(*a, **k).fill_(torch.nan))
    update = ops.lie_update(product, first, second, *factors.tolist(), BETAS, backend=backend.name)
    assert bool(update.isfinite().all())
