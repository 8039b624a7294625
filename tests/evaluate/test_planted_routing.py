"""Edges of the planted model: every variable leads to itself, by weights and by data."""

import pytest
import torch

from ndm_fast.evaluate.baselines import baseline_partition
from ndm_fast.evaluate.truth import planted
from ndm_fast.evaluate.truth.planted_model import PlantedLanguage, planted_activations, train_planted_model
from ndm_fast.evaluate.truth.planted_pairs import planted_pairs
from ndm_fast.evaluate.truth.planted_routing import (
    ABOVE,
    BELOW,
    carriers,
    routing,
    run_routing,
    variable_subspaces,
    ways,
)

LANGUAGE = PlantedLanguage(variables=3, values=4, tail=6)
HEADS = [f"head {h}" for h in range(4)]


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Tiny tensors."""


@pytest.fixture(scope="module")
def model():
    return train_planted_model(LANGUAGE, width=32, steps=160, seed=0)[0]


@pytest.fixture(scope="module")
def rows(model):
    return [planted_activations(model, LANGUAGE, site, 4096, seed=0) for site in (BELOW, ABOVE)]


def routed(model, rows, below, above):
    carried = carriers(below, rows[0]), carriers(above, rows[1])
    return routing(model, LANGUAGE, (below, above), carried, 64, 0)


def test_a_counterfactual_changes_one_variable_and_not_the_token_that_is_read():
    pairs = planted_pairs(LANGUAGE, 1, 50, seed=0)
    here, there = pairs.prompts.tokens, pairs.counterfactuals.tokens
    about = (here - 1) // 4 == 1
    assert torch.equal(here != there, about & (here > 0))
    assert not about.gather(1, pairs.position).any()


def test_variables_go_straight_on_and_through_the_values_of_heads(model):
    taken = ways(model, LANGUAGE, 64, 0)
    assert taken.skip > 0.2 * taken.whole
    assert min(taken.heads["V"]) > 0.05 * taken.whole
    assert max(abs(drop) for side in "QK" for drop in taken.heads[side]) < 0.01 * taken.whole


def test_with_the_labels_subspaces_every_right_edge_comes_first(model, rows):
    found = routed(model, rows, *(variable_subspaces(one) for one in rows))
    assert found.carriers == ([0, 1, 2], [0, 1, 2])
    assert (found.distinct, found.pairs) == (3, 16)
    assert found.weights_area == dict.fromkeys(["skip", *HEADS], 1.0)
    assert found.weights_first == dict.fromkeys(["skip", *HEADS], 3)
    assert found.data == {way: [1, 1, 1] for way in ("skip", *HEADS, "MLP")}
    assert min(found.data_share[way] for way in ("skip", *HEADS)) > 0.9
    assert min(found.data_own[way] for way in ("skip", *HEADS)) > 0.9


def test_subspaces_that_mix_variables_are_told_by_what_their_edges_carry(model, rows):
    pca = routed(model, rows, *(baseline_partition("pca", [8] * 4, one.activations) for one in rows))
    random = routed(model, rows, *(baseline_partition("random", [8] * 4, one.activations, 1) for one in rows))
    assert pca.distinct == 0
    assert max(pca.data_own.values()) < 0.5
    assert max(random.data_share.values()) < 0.5


def test_from_model_to_ranks(monkeypatch):
    few = planted.PlantedSettings(
        32, 4096, 40, first_steps=8, escape_steps=8, last_steps=8, tries=2, more_tries=2
    )
    monkeypatch.setattr(planted, "_SETTINGS", few)
    found = run_routing(3, 4, starts=1, prompts=16)
    assert set(found["partitions"]) == {"labels", "ndm", "pca"}
    assert found["partitions"]["ndm"]["pairs"] == 16
    assert len(found["ways"]["heads"]["V"]) == 4
