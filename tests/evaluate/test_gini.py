"""The Gini coefficient against the published effects, and at its ends."""

import json
import math
from pathlib import Path

import pytest

from ndm_fast.errors import InputError
from ndm_fast.evaluate.gini import NORMALISATIONS, effect_ginis, gini, top_share

PUBLISHED = json.loads((Path(__file__).parents[1] / "data" / "published_effects.json").read_text())
TESTS = PUBLISHED["circuit_tests"]
METHODS = ("ndm", "identity", "random", "pca_ascending", "pca_descending")


def of(method):
    return effect_ginis(method["effect"], method["partition"], method["variance"])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("test", TESTS)
def test_every_published_gini_is_reproduced(test, method):
    published = TESTS[test]["methods"][method]
    assert of(published) == pytest.approx(published["gini"], abs=1e-6)
    assert len(published["gini"]) == len(NORMALISATIONS)


def test_the_mean_of_the_paper_is_over_tests_and_normalisations():
    found = [value for test in TESTS.values() for value in of(test["methods"]["ndm"]).values()]
    assert len(found) == 15
    assert sum(found) / len(found) == pytest.approx(0.71, abs=0.005)


def test_ends_of_the_scale():
    assert gini([2.0] * 5) == 0
    assert gini([0, 0, 3, 0]) == pytest.approx(1 - 1 / 4)
    assert math.isnan(gini([0.0, 0.0]))
    assert gini([1, 2]) == pytest.approx(2 * 1 / (2 * 2 * 3))


def test_signs_and_units_do_not_count():
    signed = effect_ginis([-1, 2, 3], [2, 1, 1], [1, 1, 2])
    assert signed == pytest.approx(effect_ginis([10, 20, -30], [4, 2, 2], [0.1, 0.1, 0.2]))
    assert top_share([-6, 2, 0]) == 0.75


@pytest.mark.parametrize("values", [[], [1, -1], [1, math.nan], [[1, 2]]])
def test_what_is_no_list_of_sizes_is_refused(values):
    with pytest.raises(InputError, match="at least one value, all finite"):
        gini(values)


def test_shares_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="3 effects need as many values of variance, got 2"):
        effect_ginis([1, 2, 3], [1, 1, 1], [1, 1])
    with pytest.raises(InputError, match="variance of a subspace is not above 0"):
        effect_ginis([1, 2, 3], [1, 1, 1], [1, 0, 1])
