"""Gradients of distances: gradcheck in fp64 on the reference, every backend in fp32 against the oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_backend import Backend
from oracle_inputs import heavy_tailed, rotation_of
from torch import Tensor

from ndm_fast import ops
from ndm_fast.errors import InputError
from ndm_fast.geometry import reference

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTHS = [3, 3, 1]
FORMS = {
    "raw": {},
    "keys rotated": {"keys_rotated": True},
    "both rotated": {"keys_rotated": True, "queries_rotated": True},
}
METRICS = pytest.mark.parametrize("metric", ["euclidean", "cosine"])
FORM = pytest.mark.parametrize("form", FORMS)
Search = Callable[..., reference.Neighbors]


def nearest(*given: Any, **options: Any) -> reference.Neighbors:
    return ops.nearest_neighbors(*given, **options)


def three_nearest(*given: Any, **options: Any) -> reference.Neighbors:
    return ops.k_nearest_neighbors(*given, 3, **options)


SEARCHES = pytest.mark.parametrize("search", [nearest, three_nearest])


def doubles(metric: str) -> list[Tensor]:
    """Queries, keys and a rotation; a cosine in one dimension has no gradient, but an edge at 0."""
    torch.manual_seed(3)
    rows = [torch.randn(n, 7, dtype=torch.float64) for n in (4, 12)]
    return [each.requires_grad_() for each in (*rows, rotation_of(7).double())]


@SEARCHES
@METRICS
@FORM
def test_gradcheck(search: Search, metric: str, form: str) -> None:
    def distance(queries: Tensor, keys: Tensor, rotation: Tensor) -> Tensor:
        given = (queries, keys, rotation, WIDTHS)
        found = search(*given, metric=metric, backend="reference", **FORMS[form])
        assert found.distance.dtype == torch.float64
        return found.distance

    assert torch.autograd.gradcheck(distance, doubles(metric))
    assert torch.autograd.gradgradcheck(distance, doubles(metric))


def by_autograd(
    index: Tensor, queries: Tensor, keys: Tensor, rotation: Tensor, metric: str, weight: Tensor, form: str
) -> tuple[list[Tensor], Tensor]:
    """Gradients of the oracle's distances to the keys named, by torch itself in fp64; and the distances."""
    inputs = [each.double().requires_grad_() for each in (queries, keys, rotation)]
    options = {"metric": metric, **FORMS[form]}
    each = index[..., None] if index.ndim == 2 else index
    distance = torch.stack(
        [reference.distance_to(*inputs, WIDE, of, **options) for of in each.unbind(-1)], -1
    )
    total = (distance.reshape(weight.shape) * weight.double()).sum()
    found = torch.autograd.grad(total, inputs, allow_unused=True)
    return [torch.zeros_like(i) if g is None else g for i, g in zip(inputs, found, strict=True)], distance


WIDE = [8, 8, 5]


@SEARCHES
@METRICS
@FORM
@pytest.mark.parametrize("rows", [torch.randn, heavy_tailed], ids=["normal", "heavy-tailed"])
def test_every_backend_has_the_oracles_gradient(
    search_backend: Backend, search: Search, metric: str, form: str, rows: Any
) -> None:
    queries, keys, rotation = rows(5, 21), rows(140, 21), rotation_of(21)
    inputs = [each.requires_grad_() for each in search_backend.on(queries, keys, rotation)]
    found = search(*inputs, WIDE, metric=metric, backend=search_backend.name, **FORMS[form])
    weight = torch.randn(found.distance.shape)
    (found.distance * weight.to(found.distance.device)).sum().backward()
    exact, distance = by_autograd(found.index.cpu(), queries, keys, rotation, metric, weight, form)
    torch.testing.assert_close(
        found.distance.detach().cpu().double().reshape(distance.shape),
        distance.detach(),
        rtol=1e-5,
        atol=1e-7,
    )
    for given, expected in zip(inputs, exact, strict=True):
        gradient = torch.zeros_like(given) if given.grad is None else given.grad
        assert gradient.dtype == torch.float32
        largest = float(expected.abs().max())
        torch.testing.assert_close(gradient.cpu().double(), expected, rtol=1e-6, atol=2e-6 * largest)


@METRICS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_have_the_type_of_their_rows(metric: str, dtype: torch.dtype) -> None:
    queries, keys = (torch.randn(n, 21).to(dtype).requires_grad_() for n in (5, 40))
    rotation = rotation_of(21).requires_grad_()
    found = ops.nearest_neighbors(queries, keys, rotation, WIDE, metric=metric)
    found.distance.sum().backward()
    weight = torch.ones(3, 5)
    exact, _ = by_autograd(
        found.index, queries.detach(), keys.detach(), rotation.detach(), metric, weight, "raw"
    )
    for given, expected in zip((queries, keys, rotation), exact, strict=True):
        assert given.grad is not None
        assert given.grad.dtype == given.dtype
        rtol = 2 * torch.finfo(given.dtype).eps if given is not rotation else 1e-4
        torch.testing.assert_close(given.grad.double(), expected, rtol=rtol, atol=1e-5)


@SEARCHES
@METRICS
@FORM
def test_a_distance_of_zero_has_no_gradient(search: Search, metric: str, form: str) -> None:
    keys = heavy_tailed(40, 21)
    keys[7:] = keys[:33].flip(0)  # every row has a twin
    keys[3] = 0
    queries = keys[:4].clone()
    inputs = [each.requires_grad_() for each in (queries, keys, rotation_of(21))]
    found = search(*inputs, WIDE, metric=metric, **FORMS[form])
    gradients = torch.autograd.grad(found.distance.sum(), inputs, allow_unused=True)
    assert all(each is None or bool(each.isfinite().all()) for each in gradients)
    if search is nearest and metric == "euclidean" and form != "keys rotated":
        assert not found.distance.any()
        assert all(each is None or not each.any() for each in gradients)


def test_the_gradient_is_that_of_the_loss(search_backend: Backend) -> None:
    queries, keys, rotation = search_backend.on(heavy_tailed(9, 21), heavy_tailed(140, 21), rotation_of(21))
    rotation.requires_grad_()
    found = ops.nearest_neighbors(queries, keys, rotation, WIDE, backend=search_backend.name)
    found.distance.mean().backward()
    closed = ops.loss_and_gradient(
        queries, keys, found.index, rotation.detach(), WIDE, backend=search_backend.name
    )
    assert rotation.grad is not None
    largest = 1e-4 * float(closed.gradient.abs().max())
    torch.testing.assert_close(rotation.grad, closed.gradient, rtol=1e-4, atol=largest)


@SEARCHES
def test_only_what_asks_for_it_has_a_gradient(search: Search) -> None:
    queries, keys, rotation = torch.randn(4, 21), torch.randn(30, 21), rotation_of(21)
    assert search(queries, keys, rotation, WIDE).distance.grad_fn is None
    found = search(queries, keys.requires_grad_(), rotation, WIDE)
    assert found.distance.requires_grad
    assert not found.index.requires_grad
    found.distance.sum().backward()
    assert keys.grad is not None
    assert int((keys.grad != 0).any(1).sum()) == len(found.index.unique())
    with torch.no_grad():
        assert not search(queries, keys, rotation, WIDE).distance.requires_grad


def test_ops_without_a_gradient_say_so() -> None:
    rotation = rotation_of(21).requires_grad_()
    rest = (WIDE, torch.ones(3), torch.tensor([[0, 1]]))
    radius = ops.ksg_radius(torch.randn(4, 21), torch.randn(30, 21), rotation, *rest)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        radius.sum().backward()


@SEARCHES
def test_fp64_goes_by_the_reference_alone(search: Search) -> None:
    queries, keys, rotation = doubles("euclidean")
    for name in ("cpu", "triton"):
        with pytest.raises(
            InputError, match=r"queries has dtype float64: .* backend 'reference' takes float64"
        ):
            search(queries, keys, rotation, WIDTHS, backend=name)
    found = search(
        queries.detach(), keys.detach().float(), rotation.detach().float(), WIDTHS, backend="reference"
    )
    assert found.distance.dtype == torch.float64
    oracle = reference.k_nearest_neighbors(queries, keys.float(), rotation.float(), WIDTHS, 3)
    expected = oracle.distance if found.distance.ndim == 3 else oracle.distance[..., 0]
    torch.testing.assert_close(found.distance, expected.detach(), rtol=1e-12, atol=0)
