"""The loss of logarithms: every backend against fp64 torch, and that against autograd."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ndm_fast import ops
from ndm_fast.errors import InputError
from ndm_fast.geometry import objective
from ndm_fast.geometry.orthogonal import random_rotation
from ndm_fast.ops import backends

BACKENDS = [name for name in ("reference", "cpu", "triton") if backends.obstacle(name, "cpu") is None]
pytestmark = pytest.mark.usefixtures("one_thread")


def log_loss(
    queries: Tensor, neighbors: Tensor, rotation: Tensor, widths: list[int], floor: Tensor
) -> Tensor:
    """The formula of docs/method.md, for autograd; neighbors [S, Q, d]."""
    parts = rotation.split(widths, dim=1)
    squared = [((queries - n) @ part).square().sum(1) for n, part in zip(neighbors, parts, strict=True)]
    logs = [(s + f.square()).log().mean() / 2 for s, f in zip(squared, floor, strict=True)]
    return sum(width * log for width, log in zip(widths, logs, strict=True)) / sum(widths)  # type: ignore[return-value]


def case(widths: list[int], queries: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Heavy-tailed rows with a copy among the neighbors: queries, keys, index, rotation, floors."""
    generator = torch.Generator().manual_seed(seed)
    width = sum(widths)
    rows = torch.randn(queries + 40, width, generator=generator)
    rows[:, 0] *= 300
    rows[::7] *= 30
    q, k = rows[:queries].clone(), rows[queries:]
    index = torch.randint(40, (len(widths), queries), generator=generator)
    q[0] = k[index[0, 0]]
    floor = torch.rand(len(widths), generator=generator) + 0.1
    return q, k, index, random_rotation(width, generator), floor


@given(widths=st.lists(st.integers(1, 7), min_size=1, max_size=5), seed=st.integers(0, 99))
@settings(max_examples=25)
def test_gradient_equals_autograd(widths: list[int], seed: int) -> None:
    q, k, index, rotation, floor = (x.double() if x.is_floating_point() else x for x in case(widths, 9, seed))
    tracked = rotation.clone().requires_grad_()
    loss = log_loss(q, k[index], tracked, widths, floor)
    loss.backward()
    found = objective.loss_and_gradient(q, k, index, rotation, widths, "euclidean", None, floor)
    torch.testing.assert_close(found.gradient, tracked.grad, rtol=1e-9, atol=1e-11)
    weights = objective.loss_weights(widths, by_width=True)
    torch.testing.assert_close(weights @ found.by_subspace, loss.detach(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("widths", [[3, 2], [16, 8, 8], [40, 1]], ids=str)
def test_every_backend(backend: str, masked: bool, dtype: torch.dtype, widths: list[int]) -> None:
    q, k, index, rotation, floor = case(widths, 140, seed=3)
    q, k = q.to(dtype), k.to(dtype)
    counted = torch.rand(index.shape, generator=torch.Generator().manual_seed(1)) > 0.3 if masked else None
    given = (q, k, index, rotation, widths, "euclidean", counted)
    found = ops.loss_and_gradient(*given, log_floor=floor, backend=backend)
    exact = objective.loss_and_gradient(
        q.double(), k.double(), index, rotation.double(), widths, "euclidean", counted, floor.double()
    )
    torch.testing.assert_close(found.by_subspace.double(), exact.by_subspace, rtol=1e-5, atol=1e-5)
    # A term is delta' r / (|r|^2 + f^2): fp32 rounds r by the size of delta.
    reach = (q.double() - k.double()[index]).norm(dim=2)
    limit = 2e-6 * (reach**2 / floor.double()[:, None] ** 2).mean(1).max()
    assert float((found.gradient - exact.gradient).abs().max()) <= float(limit)


@pytest.mark.parametrize("backend", BACKENDS)
def test_copies_without_a_floor_have_no_gradient(backend: str) -> None:
    q, _, index, rotation, _ = case([3, 2], 9, seed=0)
    floor = torch.zeros(2)
    index = torch.arange(9).expand(2, 9).contiguous()
    found = ops.loss_and_gradient(q, q, index, rotation, [3, 2], log_floor=floor, backend=backend)
    assert torch.equal(found.gradient, torch.zeros(5, 5))
    assert torch.equal(found.by_subspace, torch.zeros(2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_nan(backend: str) -> None:
    q, k, index, rotation, floor = case([3, 2], 9, seed=0)
    q[4, 1] = torch.nan
    found = ops.loss_and_gradient(q, k, index, rotation, [3, 2], log_floor=floor, backend=backend)
    assert bool(found.by_subspace.isnan().all())
    assert bool(found.gradient[1].isnan().all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_odd_floors_are_refused_alike(backend: str) -> None:
    q, k, index, rotation, floor = case([3, 2], 9, seed=0)
    for odd, said in ((floor.double(), "dtype"), (floor[:1], "shape")):
        with pytest.raises(InputError, match=f"log_floor.*{said}"):
            ops.loss_and_gradient(q, k, index, rotation, [3, 2], log_floor=odd, backend=backend)
    with pytest.raises(InputError, match="log_floor goes with metric 'euclidean'"):
        ops.loss_and_gradient(q, k, index, rotation, [3, 2], "cosine", log_floor=floor, backend=backend)


def test_the_scale_of_a_subspace_does_not_matter() -> None:
    """Ten times louder in one subspace: the mean distance follows it, the logarithm's gradient does not."""
    q, k, index, _, _ = case([4, 4], 60, seed=1)
    q[:, 0] /= 300
    k[:, 0] /= 300
    loud = torch.cat([torch.full((4,), 10.0), torch.ones(4)])
    floor = torch.full((2,), 1e-3)
    plain = objective.loss_and_gradient(q, k, index, torch.eye(8), [4, 4], "euclidean", None, floor).gradient
    scaled = objective.loss_and_gradient(
        q * loud, k * loud, index, torch.eye(8), [4, 4], "euclidean", None, floor * loud[[0, 4]]
    ).gradient
    torch.testing.assert_close(scaled[:4, :4], plain[:4, :4])
    torch.testing.assert_close(scaled[4:, 4:], plain[4:, 4:])
