"""Settings: checks, and how they come from flat values."""

from __future__ import annotations

import dataclasses
import json
from itertools import chain

import pytest

from ndm_fast.config import GROUPS, HarvestConfig, MergeConfig, RunConfig, TrainConfig, from_flat
from ndm_fast.errors import InputError
from ndm_fast.fields import meanings

FIELDS = [field for cls in GROUPS.values() for field in dataclasses.fields(cls)]


def test_names_are_unique_and_every_field_is_described():
    names = [field.name for field in FIELDS]
    assert len(set(names)) == len(names)
    assert [*chain(*(meanings(cls) for cls in GROUPS.values()))] == names
    assert all(text.endswith(".") for cls in GROUPS.values() for text in meanings(cls).values())


def test_flat_values_survive_json():
    config = from_flat({"site": ["x0.post", "m1"], "betas": [0.8, 0.9], "initial_widths": [8, 4], "seed": 3})
    assert config.harvest.site == ("x0.post", "m1")
    assert from_flat(json.loads(json.dumps(config.flat()))) == config
    assert set(config.flat()) == {field.name for field in FIELDS}
    assert from_flat({}) == RunConfig()


@pytest.mark.parametrize(
    ("name", "value", "meant"),
    [
        ("site", "x0.post", ("x0.post",)),
        ("lr", "3e-4", 3e-4),  # what YAML makes of 3e-4
        ("lr", 1, 1.0),
        ("initial_widths", 32, (32,)),
        ("merge_start", None, None),
        ("max_norm_ratio", 10, 10.0),
    ],
)
def test_values_take_the_type_of_their_field(name, value, meant):
    found = from_flat({name: value}).flat()[name]
    assert found == (list(meant) if isinstance(meant, tuple) else meant)
    assert type(found) is type(list(meant) if isinstance(meant, tuple) else meant)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"kees": 3}, "unknown setting 'kees'"),
        ({7: 3}, "unknown setting 7"),
        ({"keys": "many"}, "keys is 'many'"),
        ({"keys": 16.5}, "keys is 16.5"),
        ({"keys": True}, "keys is True"),
        ({"keys": None}, "keys is None"),
        ({"lr": "fast"}, "lr is 'fast'"),
        ({"lr": True}, "lr is True"),
        ({"bos": "yes"}, "bos is 'yes'"),
        ({"seed": "x"}, "seed is 'x'"),
        ({"site": 5}, "site is 5"),
        ({"site": ["x0.post", None]}, "site is None"),
        ({"model": ["a"]}, "model is ['a']"),
        ({"initial_widths": ["8", 8]}, "initial_widths is '8'"),
        ({"partial": True}, "--partial takes an unfinished harvest"),
    ],
)
def test_what_cannot_be_meant_is_refused(values, says):
    with pytest.raises(InputError) as refusal:
        from_flat(values)
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)


BAD = [
    (HarvestConfig, {"dtype": "float8"}, "float32, bfloat16, float16"),
    (HarvestConfig, {"rows_per_batch": 0}, "above 0"),
    (HarvestConfig, {"context_length": 3}, "at least 4"),
    (HarvestConfig, {"max_norm_ratio": 1.0}, "above 1"),
    (TrainConfig, {"metric": "manhattan"}, "euclidean, cosine"),
    (TrainConfig, {"rotation": "cayley"}, "lie, lazy, exp"),
    (TrainConfig, {"start": "zero"}, "identity, random, pca"),
    (TrainConfig, {"schedule": "step"}, "constant, linear"),
    (TrainConfig, {"pool_dtype": "int8"}, "float32, bfloat16, float16"),
    (TrainConfig, {"precision": "fp8"}, "fp32, bf16"),
    (TrainConfig, {"unit_size": 0}, "above 0"),
    (TrainConfig, {"lr": float("nan")}, "above 0"),
    (TrainConfig, {"lr": float("inf")}, "finite"),
    (TrainConfig, {"lr": -1.0}, "above 0"),
    (TrainConfig, {"max_steps": 0}, "above 0"),
    (TrainConfig, {"warmup_steps": -1}, "0 or more"),
    (TrainConfig, {"escape_tries": -1}, "0 or more"),
    (TrainConfig, {"betas": (0.9,)}, "two numbers"),
    (TrainConfig, {"betas": (0.9, 1.0)}, "below 1"),
    (TrainConfig, {"pool_rows": 16384}, "raise pool_rows or lower keys"),
    (MergeConfig, {"merge_interval": 0}, "above 0"),
    (MergeConfig, {"merge_start": -5}, "above 0"),
    (MergeConfig, {"target_subspaces": 0}, "above 0"),
    (MergeConfig, {"mi_keys": 0}, "above 0"),
]


@pytest.mark.parametrize(("cls", "values", "says"), BAD, ids=lambda v: str(v) if isinstance(v, dict) else "")
def test_values_out_of_range_are_refused_with_a_remedy(cls, values, says):
    with pytest.raises(InputError, match=says) as refusal:
        cls(**values)
    assert next(iter(values)) in str(refusal.value)


def test_widths_at_the_start():
    assert TrainConfig(unit_size=8).widths(32) == (8, 8, 8, 8)
    assert TrainConfig(initial_widths=(4, 20, 8)).widths(32) == (20, 8, 4)


@pytest.mark.parametrize(
    ("values", "width", "says"),
    [
        ({"unit_size": 10}, 32, "take one of 4, 8, 16, or give initial_widths"),
        ({"unit_size": 64}, 32, "take one of 8, 16, 32"),
        ({"initial_widths": (16, 8)}, 32, "sum to 24, but the activations are 32 wide"),
        ({"initial_widths": (40, -8)}, 32, "give positive widths"),
        ({"initial_widths": ()}, 32, "sum to 0"),
    ],
)
def test_widths_that_do_not_fit_are_refused(values, width, says):
    with pytest.raises(InputError, match=says):
        TrainConfig(**values).widths(width)
