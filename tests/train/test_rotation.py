"""Optimisers on SO(d)."""

import pytest
import torch

from ndm_fast.geometry.orthogonal import principal_components, random_rotation
from ndm_fast.partition import orthogonality_error
from ndm_fast.train.rotation.make import make_rotation


def _descend(kind, steps, lr, target, start):
    """Minimise the squared distance to a target rotation."""
    rotation = make_rotation(kind, start, (0.9, 0.999))
    for _ in range(steps):
        rotation.step(rotation.matrix - target, lr)
    return rotation


@pytest.mark.parametrize("kind", ["lie", "lazy", "exp"])
def test_finds_a_target_rotation(kind):
    generator = torch.Generator().manual_seed(0)
    start = random_rotation(8, generator)
    skew = torch.randn(8, 8, generator=generator) * 0.3
    target = start @ torch.linalg.matrix_exp(skew - skew.T)
    found = _descend(kind, 400, 0.02, target, start)
    assert (found.matrix - target).abs().max() < 0.02
    assert orthogonality_error(found.matrix) < 1e-5


@pytest.mark.parametrize("coherent", [False, True], ids=["random", "coherent"])
@pytest.mark.parametrize("lr", [0.03, 1e-3])
@pytest.mark.parametrize("kind", ["lie", "lazy", "exp"])
def test_starts_where_it_is_told_and_stays_orthogonal(kind, lr, coherent):
    generator = torch.Generator().manual_seed(1)
    start = random_rotation(48, generator)
    rotation = make_rotation(kind, start, (0.9, 0.999))
    torch.testing.assert_close(rotation.matrix, start, rtol=0, atol=1e-5)
    always = torch.randn(48, 48, generator=generator)
    for _ in range(300):
        noise = torch.randn(48, 48, generator=generator)
        rotation.step(always if coherent else noise, lr)
        assert orthogonality_error(rotation.matrix) <= 1e-5
    assert torch.linalg.det(rotation.matrix.double()) == pytest.approx(
        float(torch.linalg.det(start)), abs=1e-3
    )


def test_a_gradient_of_rank_one_keeps_it_orthogonal_too():
    """Its first updates are sign matrices, the largest that Adam makes."""
    generator = torch.Generator().manual_seed(5)
    rotation = make_rotation("lie", torch.eye(256), (0.9, 0.999))
    left, right = torch.randn(2, 256, 1, generator=generator)
    for _ in range(24):
        rotation.step(rotation.matrix @ left @ right.T, 0.0063 / 16)
        assert orthogonality_error(rotation.matrix) <= 1e-6


def test_both_schemes_take_the_same_first_step():
    """From the base point the two parametrisations agree to second order in the rate."""
    generator = torch.Generator().manual_seed(2)
    start, gradient = random_rotation(16, generator), torch.randn(16, 16, generator=generator)
    moved = []
    for kind in ("lie", "exp"):
        rotation = make_rotation(kind, start, (0.9, 0.999))
        rotation.step(gradient, 1e-3)
        moved.append(rotation.matrix)
    assert (moved[0] - start).abs().max() > 1e-3
    torch.testing.assert_close(moved[0], moved[1], rtol=0, atol=5e-6)


@pytest.mark.parametrize("kind", ["lie", "lazy", "exp"])
def test_state_goes_on_bit_for_bit(kind):
    generator = torch.Generator().manual_seed(3)
    gradients = torch.randn(9, 12, 12, generator=generator)
    straight = make_rotation(kind, random_rotation(12, generator), (0.9, 0.999))
    for gradient in gradients[:5]:
        straight.step(gradient, 0.01)
    copied = make_rotation(kind, torch.eye(12), (0.9, 0.999))
    copied.load_state_dict({name: value.clone() for name, value in straight.state_dict().items()})
    for gradient in gradients[5:]:
        straight.step(gradient, 0.01)
        copied.step(gradient, 0.01)
    assert torch.equal(straight.matrix, copied.matrix)


def test_random_rotation_is_a_rotation_and_follows_its_seed():
    matrix = random_rotation(20, torch.Generator().manual_seed(5))
    assert orthogonality_error(matrix) < 1e-5
    assert torch.linalg.det(matrix.double()) == pytest.approx(1, abs=1e-4)
    assert torch.equal(matrix, random_rotation(20, torch.Generator().manual_seed(5)))


def test_principal_components_are_ordered_by_variance():
    rows = torch.randn(500, 5) * torch.tensor([1.0, 5.0, 0.1, 3.0, 2.0])
    variances = (rows @ principal_components(rows)).var(0)
    assert (variances.diff() < 0).all()


@pytest.mark.parametrize("kind", ["lie", "lazy"])
def test_looks_ahead_along_the_last_update(kind: str) -> None:
    """Under a constant gradient updates keep their direction, so the guess is where the steps lead."""
    generator = torch.Generator().manual_seed(0)
    rotation = make_rotation(kind, random_rotation(24, generator), (0.9, 0.999))
    gradient = torch.randn(24, 24, generator=generator)
    assert torch.equal(rotation.ahead(10, 1e-4), rotation.matrix)  # there is no update yet
    for _ in range(5):
        rotation.step(gradient, 1e-4)
    before, guess = rotation.matrix.clone(), rotation.ahead(10, 1e-4)
    assert torch.equal(rotation.ahead(0, 1e-4), before)
    assert torch.equal(rotation.ahead(10, 1e-2), before)  # too high a rate
    assert orthogonality_error(rotation.ahead(10**6, 1e-4)) < 0.01
    assert torch.dist(rotation.ahead(10**6, 1e-4), before) > 10 * torch.dist(guess, before)
    for _ in range(10):
        rotation.step(gradient, 1e-4)
    assert torch.dist(guess, rotation.matrix) < 0.1 * torch.dist(before, rotation.matrix)


@pytest.mark.parametrize("lr", [1e-4, 0.02])
def test_a_search_every_step_takes_the_lazy_matrix_as_it_is(lr: float) -> None:
    """As long as it is orthogonal to 1 %: to restore it is more work than the step, and the host waits."""
    generator = torch.Generator().manual_seed(0)
    rotation = make_rotation("lazy", random_rotation(24, generator), (0.9, 0.999))
    as_it_is = []
    for _ in range(60):
        rotation.step(torch.randn(24, 24, generator=generator), lr)
        working = rotation.working
        searched = rotation.ahead(0, lr)
        assert orthogonality_error(searched) < 0.01
        as_it_is.append(searched is working)
    assert all(as_it_is) if lr < 1e-3 else 0 < sum(as_it_is) < 60


@pytest.mark.parametrize("kind", ["lie", "lazy"])
def test_is_orthogonal_where_the_program_wants_fast_products(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    rotation = make_rotation(kind, random_rotation(256, generator), (0.9, 0.999))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        for _ in range(8):
            rotation.step(torch.randn(256, 256, generator=generator), 1e-3)
        assert orthogonality_error(rotation.matrix) <= 1e-5
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("kind", ["lie", "lazy"])
def test_a_pace_slows_pairs_of_unlike_deviation(kind: str) -> None:
    """Adam's first step turns every pair by the rate; then the pace is all that differs."""
    gradient = torch.randn(12, 12, generator=torch.Generator().manual_seed(7))
    deviations = torch.tensor([100.0] * 4 + [10.0] * 4 + [1.0] * 4)
    rotation = make_rotation(kind, torch.eye(12), (0.9, 0.999))
    for loud in (torch.ones(12), deviations):  # the second call replaces the first
        rotation.pace(loud)
    rotation.step(gradient, 1e-3)
    ratios = torch.minimum(deviations[:, None], deviations) / torch.maximum(deviations[:, None], deviations)
    turned = rotation.matrix - torch.eye(12)
    unlike = ~torch.eye(12, dtype=torch.bool)
    torch.testing.assert_close(turned.abs()[unlike], 1e-3 * ratios[unlike], rtol=0.01, atol=1e-5)
