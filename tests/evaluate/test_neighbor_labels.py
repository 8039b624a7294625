"""Purity with more neighbors, any labels and intervals."""

import json

import pytest
import torch

from ndm_fast.activations.rows import TokenRows
from ndm_fast.errors import InputError
from ndm_fast.evaluate.purity.labels import agreement, bootstrap_intervals, nearest_keys, read_labels
from ndm_fast.evaluate.purity.purity import SHARES, neighbor_purity
from ndm_fast.geometry.orthogonal import random_rotation
from ndm_fast.partition import SubspacePartition

ROTATION = random_rotation(8, torch.Generator().manual_seed(0))
PARTITION = SubspacePartition(ROTATION, [5, 3])


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Tiny tensors."""


def rows(count, seed):
    """Tokens lie in the first subspace, positions in the second; the rest of the columns is noise."""
    generator = torch.Generator().manual_seed(seed)
    token = torch.randint(12, (count,), generator=generator)
    position = torch.randint(20, (count,), generator=generator)
    codes = torch.randn(12, 5, generator=torch.Generator().manual_seed(9))
    inside = torch.cat([codes[token], position[:, None] * torch.ones(1, 3)], 1)
    noise = 0.01 * torch.randn(count, 8, generator=generator)
    other = torch.randint(50, (3, count), generator=generator)
    return TokenRows((inside + noise) @ ROTATION.T, token, other[0], other[1], position, other[2])


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("top", [1, 4])
def test_nearest_keys_are_those_of_sorted_distances(top, metric):
    generator = torch.Generator().manual_seed(1)
    queries, keys = torch.randn(30, 8, generator=generator), torch.randn(200, 8, generator=generator)
    found = nearest_keys(queries, keys, PARTITION, top, metric=metric)
    assert found.shape == (2, 30, top)
    for s, (q, k) in enumerate(zip(PARTITION.split(queries), PARTITION.split(keys), strict=True)):
        if metric == "cosine":
            q, k = q / q.norm(dim=1, keepdim=True), k / k.norm(dim=1, keepdim=True)
        expected = (q[:, None] - k).norm(dim=2).argsort(1)[:, :top]
        assert torch.equal(found[s], expected)


def test_top_out_of_range_is_refused():
    for top in (0, 201):
        with pytest.raises(InputError, match="nearest of 200 keys"):
            nearest_keys(torch.randn(3, 8), torch.randn(200, 8), PARTITION, top)


def test_subspaces_are_read_by_what_they_hold():
    table = neighbor_purity(rows(300, 1), rows(3000, 2), PARTITION, top=3)
    assert [row["reading"] for row in table] == ["current token", "position"]
    for row in table:
        for name in SHARES:
            low, high = row["intervals"][name]
            assert low <= row[name] <= high
            assert high - low < 0.15


def test_own_labels_count_like_the_others():
    queries, keys = rows(300, 1), rows(3000, 2)
    labels = {"parity": (queries.position % 2, keys.position % 2)}
    table = neighbor_purity(queries, keys, PARTITION, labels=labels)
    assert table[1]["same_parity"] > 0.95
    assert 0.35 < table[0]["same_parity"] < 0.65
    assert "same_parity" in table[0]["intervals"]


def test_random_coordinates_are_unclear():
    noise = torch.randn(2, 500, 8, generator=torch.Generator().manual_seed(3))
    queries, keys = rows(500, 1)._replace(activations=noise[0]), rows(500, 2)._replace(activations=noise[1])
    assert {row["reading"] for row in neighbor_purity(queries, keys, PARTITION)} == {"unclear"}


def test_agreement_is_a_share_of_neighbors():
    index = torch.tensor([[[0, 1], [2, 3]]])
    assert agreement(index, torch.tensor([5, 6]), torch.tensor([5, 5, 6, 0])).tolist() == [[1.0, 0.5]]


def test_intervals_cover_the_truth_and_shrink():
    """Of 200 samples of a fair coin, about 95 % of the intervals hold one half."""
    generator = torch.Generator().manual_seed(0)
    coins = torch.randint(2, (200, 100), generator=generator).double()
    low, high = bootstrap_intervals(coins, generator).unbind(1)
    covered = float(((low <= 0.5) & (high >= 0.5)).double().mean())
    assert 0.88 <= covered <= 0.99
    assert float((high - low).mean()) == pytest.approx(2 * 1.96 * 0.05, rel=0.1)


def test_labels_come_by_token(loaded, tmp_path):
    tokenizer = loaded[1]
    file = tmp_path / "labels.json"
    file.write_text(json.dumps({"cat": "animal", "dog": "animal", "tree": "plant"}))
    labels = read_labels(file, tokenizer)
    cat, dog, tree, old = (tokenizer(f" {word}")["input_ids"][0] for word in ("cat", "dog", "tree", "old"))
    assert labels[cat] == labels[dog] != labels[tree]
    assert labels[old] == -1
    for content, message in (
        ("{", "cannot read"),
        ("[1]", "cannot read"),
        ('{"zebra crossing": "x"}', "no token"),
    ):
        file.write_text(content)
        with pytest.raises(InputError, match=message):
            read_labels(file, tokenizer)
