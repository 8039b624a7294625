"""The oracle itself, against loops that cannot be wrong."""

import pytest
import torch

from ndm_fast.geometry import reference
from ndm_fast.geometry.orthogonal import random_rotation


def _loop_distance(q, k, metric):
    if metric == "euclidean":
        return float(((q - k) ** 2).sum() ** 0.5)
    size = float(q.norm() * k.norm())
    return 1 - float(q @ k) / size if size else 1.0


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("keys_rotated", [False, True])
def test_nearest_neighbors_equals_a_loop(metric, keys_rotated):
    generator = torch.Generator().manual_seed(1)
    queries = torch.randn(7, 12, generator=generator, dtype=torch.float64)
    keys = torch.randn(29, 12, generator=generator, dtype=torch.float64)
    queries[0] = 0
    keys[3] = 0
    rotation, widths = random_rotation(12, generator).double(), [5, 4, 2, 1]
    given = keys @ rotation if keys_rotated else keys
    found = reference.nearest_neighbors(
        queries, given, rotation, widths, metric=metric, keys_rotated=keys_rotated
    )
    start = 0
    for s, width in enumerate(widths):
        basis = rotation[:, start : start + width]
        start += width
        for i, q in enumerate(queries):
            distances = [_loop_distance(q @ basis, k @ basis, metric) for k in keys]
            assert float(found.distance[s, i]) == pytest.approx(min(distances), rel=1e-7, abs=1e-9)
            assert distances[int(found.index[s, i])] == pytest.approx(min(distances), rel=1e-7, abs=1e-9)


def test_ties_go_to_the_lowest_index_also_across_blocks(monkeypatch):
    monkeypatch.setattr(reference, "KEY_BLOCK", 4)
    keys = torch.randn(3, 6).repeat(4, 1)
    found = reference.nearest_neighbors(keys[:3], keys, random_rotation(6, torch.Generator()), [3, 3])
    assert found.index.tolist() == [[0, 1, 2]] * 2
    assert float(found.distance.max()) == 0


def test_a_zero_key_is_not_nearer_than_a_key_with_positive_cosine():
    queries = torch.tensor([[1.0, 0.0]])
    keys = torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    found = reference.nearest_neighbors(queries, keys, torch.eye(2), [2], metric="cosine")
    assert found.index.tolist() == [[1]]


def test_ksg_equals_a_loop():
    generator = torch.Generator().manual_seed(2)
    queries = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    keys = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    rotation, widths = random_rotation(6, generator), [3, 2, 1]
    variances = torch.tensor([2.0, 0.5, 1.0])
    pairs = torch.tensor([[0, 1], [2, 1]])
    radius = reference.ksg_radius(queries, keys, rotation, widths, variances, pairs)
    counts = reference.ksg_counts(queries, keys, rotation, widths, variances, pairs, radius)
    starts = [0, 3, 5]
    for p, pair in enumerate(pairs.tolist()):
        for i, q in enumerate(queries):
            scaled = [
                ((q - keys) @ rotation.double()[:, starts[s] : starts[s] + widths[s]]).norm(dim=1)
                / variances[s].double().sqrt()
                for s in pair
            ]
            expected = torch.maximum(*scaled).min()
            assert float(radius[p, i]) == pytest.approx(float(expected), rel=1e-9)
            # Strictly inside: the key that sets the radius is in one ball at most.
            inside = [int((d < expected * (1 - 1e-9)).sum()) for d in scaled]
            assert counts[p, :, i].tolist() == inside


def test_a_subspace_without_variance_has_distance_zero():
    scaled = reference.scaled_distances(
        torch.ones(2, 3), torch.ones(4, 3), torch.eye(3), [2, 1], torch.tensor([0.0, 0.0])
    )
    assert scaled.abs().max() == 0


def test_mean_distance_passes_gradcheck():
    generator = torch.Generator().manual_seed(3)
    rotation = random_rotation(6, generator).double().requires_grad_()
    queries = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    neighbors = torch.randn(2, 4, 6, generator=generator, dtype=torch.float64)
    for metric in ("euclidean", "cosine"):
        assert torch.autograd.gradcheck(
            lambda r, metric=metric: reference.mean_distance(queries, neighbors, r, [4, 2], metric=metric),
            (rotation,),
        )
