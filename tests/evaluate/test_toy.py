"""The toy model of superposition, from its inputs to the shares of energy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ndm_fast.errors import InputError
from ndm_fast.evaluate.truth import toy, toy_model
from ndm_fast.partition import SubspacePartition
from ndm_fast.seeds import seeded


def test_features_of_a_group_exclude_each_other_and_are_uniform() -> None:
    features = toy_model.sample_features([5, 3], 40_000, seeded(0))
    assert features.shape == (40_000, 8)
    first, second = features.split([5, 3], 1)
    for part, size in ((first, 5), (second, 3)):
        on = part > 0
        assert int(on.sum(1).max()) == 1
        assert float(on.any(1).float().mean()) == pytest.approx(0.75, abs=0.01)
        assert (on.float().mean(0) - 0.75 / size).abs().max() < 0.01
        values = part[on]
        assert float(values.min()) > 0
        assert float(values.max()) <= 1
        assert float(values.mean()) == pytest.approx(0.5, abs=0.01)
        assert float(values.var()) == pytest.approx(1 / 12, abs=0.005)


def test_groups_are_independent() -> None:
    first, second = toy_model.sample_features([4, 4], 40_000, seeded(1)).split(4, 1)
    on, also = (first > 0).any(1).float(), (second > 0).any(1).float()
    assert float((on * also).mean()) == pytest.approx(0.75**2, abs=0.01)


def test_energy_shares_of_a_hand_made_case() -> None:
    # Two features on the axes of subspace 0; two that lie at 3 : 4 between subspace 0 and 1.
    weight = torch.tensor([[1.0, 0, 0], [0, 2, 0], [3, 0, 4], [0, 0.3, 0.4]])
    shares = toy.energy_shares(weight, [2, 2], SubspacePartition(torch.eye(3), [2, 1]))
    assert torch.allclose(shares, torch.tensor([[1, 0], [0.36, 0.64]], dtype=torch.float64))


def test_energy_shares_follow_the_rotation() -> None:
    swapped = torch.eye(3)[:, [2, 1, 0]]
    weight = torch.tensor([[0.0, 0, 1], [0, 1, 0], [1, 0, 0], [2, 0, 0]])
    shares = toy.energy_shares(weight, [2, 2], SubspacePartition(swapped, [2, 1]))
    assert torch.allclose(shares, torch.eye(2, dtype=torch.float64))


@pytest.mark.parametrize("dim", range(2, 40))
def test_initial_widths_fill_the_hidden_layer(dim: int) -> None:
    widths = toy.initial_widths(dim)
    assert sum(widths) == dim
    assert len(widths) >= 2
    assert list(widths) == sorted(widths, reverse=True)
    assert max(widths) <= 3
    assert min(widths) >= 1 + (dim > 3)


@pytest.mark.parametrize(
    ("groups", "dim", "message"),
    [
        ([], 4, "below 2 features"),
        ([5, 1], 4, "below 2 features"),
        ([5, -5], 4, "below 2 features"),
        ([5, 5], 1, "dim is 1"),
        ([5, 5], 10, "fewer than the 10 features"),
    ],
)
def test_sizes_that_make_no_toy_model_are_refused(
    groups: list[int], dim: int, message: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match=message) as error:
        toy.run_toy(groups, dim, out=out)
    assert "\n" not in str(error.value)
    assert not out.exists()


@pytest.mark.parametrize("name", ["config.json", "result.json"])
def test_a_folder_of_another_run_is_left_alone(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match="holds another run"):
        toy.run_toy([5, 5], 4, out=tmp_path)
    assert (tmp_path / name).read_text() == "{}"
    assert len(list(tmp_path.iterdir())) == 1


def test_the_model_depends_on_the_seed_alone() -> None:
    first, same, other = (toy_model.train_toy_model([4, 4], 4, seed=seed, steps=20) for seed in (0, 0, 1))
    assert torch.equal(first.weight, same.weight)
    assert torch.equal(first.bias, same.bias)
    assert first.loss == same.loss
    assert not torch.equal(first.weight, other.weight)


def _check(groups: list[int], dim: int, seed: int, out: Path) -> dict[str, Any]:
    result = toy.run_toy(groups, dim, seed=seed, out=out).record()
    assert json.loads((out / "result.json").read_text()) == result
    assert Path(result["figure"]).stat().st_size > 0
    assert [row["features"] for row in result["groups"]] == groups
    assert min(row["energy_share"] for row in result["groups"]) >= 0.97, result
    assert len({row["subspace"] for row in result["groups"]}) == len(result["widths"]) == len(groups), result
    return result


def test_two_groups_end_in_two_subspaces(tmp_path: Path) -> None:
    assert _check([20, 20], 12, 0, tmp_path / "new" / "folder")["widths"] == [6, 6]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_two_groups_end_in_two_subspaces_for_other_seeds(seed: int, tmp_path: Path) -> None:
    assert _check([20, 20], 12, seed, tmp_path)["widths"] == [6, 6]


@pytest.mark.slow
@pytest.mark.parametrize(("groups", "dim"), [([24, 16, 8], 12), ([20, 14, 10, 8], 15)])
def test_groups_of_unequal_size_end_in_subspaces_of_their_own(
    groups: list[int], dim: int, tmp_path: Path
) -> None:
    _check(groups, dim, 0, tmp_path)
