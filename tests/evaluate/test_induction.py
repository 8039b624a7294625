"""The induction model: what is told, what a counterfactual changes, and whether edges are found."""

from itertools import pairwise

import pytest
import torch

from ndm_fast.evaluate.truth.induction import (
    carriers,
    edge_ranks,
    labelled_partition,
    run_induction,
)
from ndm_fast.evaluate.truth.induction_model import (
    InductionLanguage,
    Labelled,
    head_roles,
    labelled_activations,
    train_induction_model,
)
from ndm_fast.evaluate.truth.induction_pairs import KINDS, induction_pairs

LANGUAGE = InductionLanguage()


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Tiny tensors."""


def test_what_is_told_was_said_before():
    tokens, told = LANGUAGE.draw(50, torch.Generator().manual_seed(0))
    assert tokens.shape == told.shape == (50, LANGUAGE.length)
    assert bool((tokens[:, 0] == 0).all())
    assert 0.3 < float(told.float().mean()) < 0.8
    for row, which in zip(tokens.tolist(), told.tolist(), strict=True):
        assert len(set(row)) <= 1 + LANGUAGE.ring
        for place in range(1, LANGUAGE.length):
            if which[place]:
                step = (row[place - 1], row[place])
                assert step in list(pairwise(row[:place]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_counterfactual_changes_one_thing_at_the_patched_positions(kind):
    made = induction_pairs(LANGUAGE, kind, 30, seed=1)
    for here, there, places, right, wrong in zip(
        made.prompts.tokens.tolist(),
        made.counterfactuals.tokens.tolist(),
        made.positions.tolist(),
        made.right.tolist(),
        made.wrong.tolist(),
        strict=True,
    ):
        asked = here[-1]
        assert here[here.index(asked) + 1] == right
        own = [here[place] == there[place] for place in places]
        before = [here[place - 1] == there[place - 1] for place in places]
        if kind == "previous":
            assert (own, before) == ([True] * 2, [False] * 2)
            assert there[there.index(asked) + 1] == wrong
        elif kind == "current":
            assert (own, before) == ([False], [True])
            assert there[there.index(asked) + 1] == wrong
        else:
            assert (places, own) == ([len(here) - 1], [False])
            assert here[here.index(there[-1]) + 1] == wrong


def test_labels_make_subspaces_that_carry_them():
    generator = torch.Generator().manual_seed(0)
    labels = {n: torch.randint(1, 30, (4000,), generator=generator) for n in ("previous", "current")}
    codes = torch.randn(2, 30, 16, generator=generator)
    rows = 0.3 * torch.randn(4000, 64, generator=generator)
    rows[:, :16] += codes[0, labels["previous"]]
    rows[:, 16:32] += codes[1, labels["current"]]
    labelled = Labelled(rows, labels)
    partition = labelled_partition(labelled)
    assert partition.orthogonality_error() < 1e-5
    assert carriers(partition, labelled) == {"previous": 0, "current": 1}


@pytest.mark.parametrize("mlp", [False, True])
def test_edges_of_a_model_of_few_steps_are_ranked(mlp):
    model, loss = train_induction_model(LANGUAGE, steps=30, seed=0, mlp=mlp)
    assert loss < 4
    roles = head_roles(model, LANGUAGE, count=4)
    assert len(roles) == 2
    assert all(0 <= share <= 1 for role in roles for share in role.previous + role.induction)
    labelled = labelled_activations(model, LANGUAGE, 600, seed=0)
    partition = labelled_partition(labelled)
    found = edge_ranks(model, LANGUAGE, partition, carriers(partition, labelled), [1], 4, 0)
    assert found.edges == 4 * 4 * 3
    assert all(1 <= rank <= 48 for rank in (*found.weights.values(), *found.data.values()))
    assert (found.mlp is not None) == mlp
    if mlp:
        assert len(found.mlp.times) == len(found.mlp.effects["query"]) == 4
        assert max(found.mlp.effects["previous"]) == 0  # the place that is read is not patched there


@pytest.mark.slow
def test_the_known_edge_comes_first():
    found = run_induction(seed=0)
    assert min(found["induction_heads"]) > 0.5
    for name in ("labels", "ndm"):
        ranks = found["partitions"][name]
        assert (ranks["weights"]["K"], ranks["data"]) == (1, {"Q": 1, "K": 1, "V": 1}), name
    assert found["partitions"]["labels"]["area"] >= 0.9
