"""Mutual information between subspaces, and which pairs merge."""

import math

import pytest
import torch

from ndm_fast.geometry.orthogonal import random_rotation
from ndm_fast.train.merge.mutual_information import mutual_information, subspace_variances
from ndm_fast.train.merge.pairs import choose_pairs, merge_scores


def test_information_of_gaussians_is_near_its_closed_form():
    """For two correlated Gaussians MI = -log(1 - rho^2)/2; independent ones share none."""
    generator = torch.Generator().manual_seed(0)
    rho = 0.9
    a, b, c = torch.randn(3, 9000, generator=generator)
    rows = torch.stack([a, rho * a + math.sqrt(1 - rho**2) * b, c], dim=1)
    found = mutual_information(rows[:1000], rows[1000:], torch.eye(3), [1, 1, 1])
    assert float(found[0, 1]) == pytest.approx(-0.5 * math.log(1 - rho**2), abs=0.08)
    assert abs(float(found[0, 2])) < 0.08
    assert abs(float(found[1, 2])) < 0.08
    assert torch.equal(found, found.T)


def test_information_is_the_same_in_rotated_coordinates():
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(600, 6, generator=generator)
    rotation = random_rotation(6, generator)
    straight = mutual_information(rows[:100], rows[100:], torch.eye(6), [3, 3])
    rotated = mutual_information(rows[:100] @ rotation.T, rows[100:] @ rotation.T, rotation, [3, 3])
    torch.testing.assert_close(straight, rotated, rtol=1e-3, atol=1e-3)


def test_only_asked_pairs_are_estimated():
    rows = torch.randn(200, 4)
    found = mutual_information(rows[:50], rows[50:], torch.eye(4), [2, 1, 1], pairs=[(0, 2)])
    assert found[0, 2] == found[2, 0] != 0
    assert found[0, 1] == found[1, 2] == 0


def test_variances_sum_to_the_whole():
    rows = torch.randn(300, 6) * torch.arange(1, 7)
    rotation = random_rotation(6, torch.Generator().manual_seed(2))
    parts = subspace_variances(rows, rotation, [3, 2, 1])
    assert float(parts.sum()) == pytest.approx(float(rows.var(0).sum()), rel=1e-5)
    assert float(parts[2]) == pytest.approx(float((rows @ rotation)[:, 5].var()), rel=1e-4)


def _scores(size, entries):
    scores = torch.zeros(size, size, dtype=torch.float64)
    for (a, b), value in entries.items():
        scores[a, b] = scores[b, a] = value
    return scores


def test_pairs_are_disjoint_and_descend():
    scores = _scores(24, {(0, 1): 0.5, (1, 2): 0.4, (2, 3): 0.3, (4, 5): 0.2, (6, 7): 0.05})
    assert choose_pairs(scores, 0.1) == [(0, 1), (2, 3), (4, 5)]


@pytest.mark.parametrize(("size", "allowed"), [(4, 1), (15, 1), (16, 2), (32, 4)])
def test_at_most_an_eighth_merges_per_round(size, allowed):
    scores = torch.rand(size, size, dtype=torch.float64) + 1
    assert len(choose_pairs(scores + scores.T, 0.0)) == allowed


def test_target_and_threshold_stop_merging():
    scores = _scores(16, {(0, 1): 0.5, (2, 3): 0.4})
    assert len(choose_pairs(scores, 0.0, target_subspaces=15)) == 1
    assert choose_pairs(scores, 0.0, target_subspaces=16) == []
    assert choose_pairs(scores, 0.6) == []
    assert choose_pairs(torch.full((4, 4), torch.nan, dtype=torch.float64), 0.0) == []


def test_scores_divide_by_the_widths():
    assert merge_scores(_scores(2, {(0, 1): 6.0}), [4, 2])[0, 1] == 1
