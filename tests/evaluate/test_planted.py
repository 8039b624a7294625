"""The planted language, its effects, and the way from model to table."""

import pytest
import torch

from ndm_fast.errors import InputError
from ndm_fast.evaluate.truth import planted
from ndm_fast.evaluate.truth.planted import SITE, planted_scores, run_planted, variable_effects
from ndm_fast.evaluate.truth.planted_model import PlantedLanguage, planted_activations, train_planted_model
from ndm_fast.evaluate.truth.planted_routing import variable_subspaces
from ndm_fast.partition import SubspacePartition
from ndm_fast.seeds import seeded

LANGUAGE = PlantedLanguage(variables=3, values=4, tail=6)


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Tiny tensors."""


@pytest.fixture(scope="module")
def model():
    return train_planted_model(LANGUAGE, width=32, steps=160, seed=0)


def test_every_cue_comes_once_and_the_rest_repeats_them():
    values, places = LANGUAGE.draw(200, seeded(0, 1))
    tokens = LANGUAGE.tokens(values, places)
    assert tokens.shape == (200, LANGUAGE.length)
    assert not tokens[:, 0].any()
    assert int(tokens.max()) == LANGUAGE.vocabulary - 1
    variable, value = (tokens[:, 1:] - 1) // 4, (tokens[:, 1:] - 1) % 4
    assert torch.equal(variable[:, :3].sort(1).values, torch.arange(3).expand(200, 3))
    assert torch.equal(value, values.gather(1, variable))


def test_the_model_learns_the_language(model):
    assert LANGUAGE.floor == pytest.approx(1.0986, abs=1e-4)
    assert model[1] < LANGUAGE.floor + 0.3


def truth(model):
    return variable_subspaces(planted_activations(model, LANGUAGE, SITE, 6000, seed=0))


def test_patching_tells_a_good_partition_from_a_bad_one(model):
    good = planted_scores(variable_effects(model[0], LANGUAGE, SITE, truth(model[0])))
    bad = planted_scores(
        variable_effects(model[0], LANGUAGE, SITE, SubspacePartition(torch.eye(32), [3, 3, 3, 23]))
    )
    assert good.top_subspace == [0, 1, 2]
    assert good.top_share > 0.8
    assert good.gini > bad.gini + 0.1


def test_effects_repeat_with_the_seed(model):
    partition = SubspacePartition(torch.eye(32), [16, 16])
    one, same = (variable_effects(model[0], LANGUAGE, SITE, partition, prompts=32) for _ in range(2))
    assert torch.equal(one, same)
    assert one.shape == (3, 2)


def test_the_command(monkeypatch, tmp_path, ndm):
    """With everything that takes long made small; the figures are checked in docs/evaluation.md."""
    small = dict.fromkeys(("first_steps", "escape_steps", "last_steps", "merge_interval"), 8)
    few = planted.PlantedSettings(32, 4096, 40, **small, tries=2, more_tries=2)
    monkeypatch.setattr(planted, "_SETTINGS", few)
    arguments = ["--variables", 3, "--values", 4, "--starts", 1, "--merge", "--out", tmp_path]
    outcome = ndm("evaluate", "planted", *arguments)
    assert outcome.code == 0, outcome.err
    assert "ndm_merged" in outcome.out
    assert (tmp_path / "planted.json").exists()


def test_what_makes_no_language_is_refused(ndm):
    assert "1 variables" in ndm("evaluate", "planted", "--variables", 1).refusal()
    with pytest.raises(InputError, match="at least 1 start"):
        run_planted(starts=0)
