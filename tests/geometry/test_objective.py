"""Closed-form gradient against autograd through the oracle."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ndm_fast.geometry import reference
from ndm_fast.geometry.columns import equal_width_runs
from ndm_fast.geometry.objective import loss_and_gradient, loss_weights
from ndm_fast.geometry.orthogonal import random_rotation


def _case(widths, queries=9, keys=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    width = sum(widths)
    q = torch.randn(queries, width, generator=generator, dtype=torch.float64)
    k = torch.randn(keys, width, generator=generator, dtype=torch.float64)
    index = torch.randint(keys, (len(widths), queries), generator=generator)
    return q, k, index, random_rotation(width, generator).double()


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@given(widths=st.lists(st.integers(1, 7), min_size=1, max_size=6), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_gradient_equals_autograd(metric, widths, seed):
    q, k, index, rotation = _case(widths, seed=seed)
    tracked = rotation.clone().requires_grad_()
    loss = reference.mean_distance(q, k[index], tracked, widths, metric=metric)
    loss.backward()
    found = loss_and_gradient(q, k, index, rotation, widths, metric)
    torch.testing.assert_close(found.gradient, tracked.grad, rtol=1e-9, atol=1e-11)
    weighted = loss_weights(widths, by_width=metric == "cosine").double() @ found.by_subspace
    expected = loss.detach() + (1 if metric == "cosine" else 0)  # the weights sum to 1, the loss is -cos
    torch.testing.assert_close(weighted, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_zero_distance_and_zero_vectors_have_zero_gradient(metric):
    q, k, index, rotation = _case([3, 2])
    q[:] = k[3] = 0
    found = loss_and_gradient(q, k, torch.full_like(index, 3), rotation, [3, 2], metric)
    assert torch.equal(found.gradient, torch.zeros_like(rotation))


def test_nan_stays_nan():
    q, k, index, rotation = _case([3, 2])
    q[0, 0] = torch.nan
    assert loss_and_gradient(q, k, index, rotation, [3, 2], "euclidean").gradient.isnan().any()


def test_runs_of_equal_widths():
    runs = list(equal_width_runs([4, 4, 2, 1, 1]))
    assert runs == [
        (slice(0, 2), slice(0, 8)),
        (slice(2, 3), slice(8, 10)),
        (slice(3, 5), slice(10, 12)),
    ]
