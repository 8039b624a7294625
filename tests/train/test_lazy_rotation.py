"""The optimiser that restores orthogonality only where someone looks."""

import pytest
import torch

from ndm_fast.geometry.orthogonal import random_rotation
from ndm_fast.ops.backends import has_fast_bf16
from ndm_fast.partition import orthogonality_error
from ndm_fast.train.rotation.lazy import LazyRotation
from ndm_fast.train.rotation.lie import LieRotation

WIDTH, BETAS = 64, (0.9, 0.999)


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Small matrices."""


def _gradients(kind, generator):
    """An endless stream of [d, d] gradients, given the rotation."""
    always, left, right = torch.randn(3, WIDTH, WIDTH, generator=generator)
    return {
        "noise": lambda matrix: torch.randn(WIDTH, WIDTH, generator=generator),
        "coherent": lambda matrix: always,
        "rank one": lambda matrix: matrix @ left[:, :1] @ right[:1],
    }[kind]


@pytest.mark.parametrize("half", [False, pytest.param(True, id="bf16")])
@pytest.mark.parametrize("lr", [3e-4, 3e-3, 0.03])
@pytest.mark.parametrize("kind", ["noise", "coherent", "rank one"])
def test_is_orthogonal_wherever_it_is_read(kind, lr, half):
    generator = torch.Generator().manual_seed(0)
    rotation = LazyRotation(random_rotation(WIDTH, generator), BETAS)
    rotation._half = half
    gradient = _gradients(kind, generator)
    for _ in range(4):
        for _ in range(32):
            rotation.step(gradient(rotation.working), lr)
        assert orthogonality_error(rotation.matrix) <= 1e-5


def test_moves_as_the_eager_one_does():
    generator = torch.Generator().manual_seed(1)
    start = random_rotation(WIDTH, generator)
    lazy, eager = LazyRotation(start, BETAS), LieRotation(start, BETAS)
    for gradient in torch.randn(64, WIDTH, WIDTH, generator=generator):
        lazy.step(gradient, 1e-3)
        eager.step(gradient, 1e-3)
    moved = float((eager.matrix - start).norm())
    assert float((lazy.matrix - eager.matrix).norm()) < 0.03 * moved


def test_a_small_step_is_the_polar_factor_of_its_first_order():
    generator = torch.Generator().manual_seed(2)
    start, gradient = random_rotation(WIDTH, generator), torch.randn(WIDTH, WIDTH, generator=generator)
    rotation = LazyRotation(start, BETAS)
    rotation._half = False
    rotation.step(gradient, 1e-3)
    tangent = start.T @ gradient
    left, _, right = torch.linalg.svd(start - 1e-3 * start @ (tangent - tangent.T).sign())
    torch.testing.assert_close(rotation.matrix, left @ right, rtol=0, atol=2e-6)


def test_reading_twice_changes_nothing():
    generator = torch.Generator().manual_seed(3)
    rotation = LazyRotation(random_rotation(WIDTH, generator), BETAS)
    for _ in range(20):
        rotation.step(torch.randn(WIDTH, WIDTH, generator=generator), 1e-3)
    assert orthogonality_error(rotation.working) > 1e-5
    first = rotation.matrix
    assert rotation.matrix is first
    assert rotation.working is first


def test_a_matrix_far_from_orthogonal_is_brought_back():
    rotation = LazyRotation(torch.eye(WIDTH), BETAS)
    rotation.step(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(4)), 1e-3)
    rotation._matrix = 3 * rotation._matrix
    assert orthogonality_error(rotation.matrix) <= 1e-5


def test_nan_stays_nan():
    rotation = LazyRotation(torch.eye(WIDTH), BETAS)
    rotation.step(torch.full((WIDTH, WIDTH), torch.nan), 1e-3)
    assert rotation.matrix.isnan().any()


def test_bf16_is_used_where_it_is_fast(monkeypatch):
    monkeypatch.setenv("NDM_FAST_CPU_ISA", "portable")
    assert not has_fast_bf16(torch.device("cpu"))
    assert has_fast_bf16(torch.device("cuda"))
