"""Presets carry the published settings (docs/method.md)."""

from __future__ import annotations

import pytest

from ndm_fast.config import from_flat
from ndm_fast.errors import InputError
from ndm_fast.run.presets import PRESETS, TWINS, preset
from ndm_fast.train.schedule import Schedule

PUBLISHED = {
    # name: (width, unit, subspaces, threshold, merge start, interval, steps)
    "gpt2": (768, 32, 24, 0.04, 20_000, 8_000, 100_000),
    "qwen2.5-1.5b": (1536, 64, 24, 0.02, 20_000, 8_000, 100_000),
    "gemma-2-2b": (2304, 72, 32, 0.01, 10_000, 4_000, 150_000),
}


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_is_a_valid_configuration(name):
    config = from_flat(preset(name))
    schedule = Schedule(config.train, config.merge)
    assert schedule.learning_rate(0) > 0


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_settings(name):
    width, unit, subspaces, threshold, start, interval, steps = PUBLISHED[name]
    config = from_flat(preset(f"{name}-published"))
    train, merge = config.train, config.merge
    assert train.widths(width) == (unit,) * subspaces
    assert (merge.merge_threshold, merge.merge_start, merge.merge_interval) == (threshold, start, interval)
    assert (train.max_steps, train.queries, train.keys) == (steps, 128, 409_600)
    assert (train.lr, train.betas, train.grad_clip) == (3e-4, (0.9, 0.999), 100.0)
    assert (train.rotation, train.search_every, train.metric) == ("exp", 1, "euclidean")
    assert (train.schedule, train.warmup_steps, train.escape_tries) == ("constant", 0, 0)
    assert (train.pool_rows, train.pool_dtype) == (4_194_304, "float16")
    assert not config.harvest.bos
    assert Schedule(train, merge).learning_rate(steps - 1) == 3e-4


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_twin_changes_how_a_step_is_taken_and_nothing_else(name):
    fast, published = preset(name), preset(TWINS[name])
    changed = {key: value for key, value in fast.items() if published.get(key) != value}
    assert changed == {"rotation": "lazy", "search_every": 32, "precision": "bf16"}
    assert fast.keys() - published.keys() == {"precision"}


def test_a_preset_can_be_changed_without_changing_the_next_one():
    preset("gpt2")["lr"] = 1.0
    assert preset("gpt2")["lr"] == 3e-4


def test_unknown_presets_are_refused():
    with pytest.raises(InputError, match=r"unknown preset 'gpt5': take one of gpt2"):
        preset("gpt5")
