"""The automatic threshold: the tree of merges, its noise, and a run that uses it."""

import math

import pytest
import torch

from ndm_fast.activations.rows import TensorStream
from ndm_fast.config import MergeConfig, RunSettings, TrainConfig, from_flat
from ndm_fast.errors import InputError
from ndm_fast.train.merge.tree import MergeTree, merge_tree
from ndm_fast.train.trainer import Observer, Trainer


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Eight columns are too few for two threads to help."""


def twins(rows=3000, pairs=4, noise=0.1, seed=0):
    """[rows, 2 * pairs]: columns 2i and 2i + 1 tell of one variable, different pairs of independent ones."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(rows, pairs, generator=generator).repeat_interleave(2, 1)
    return common + noise * torch.randn(rows, 2 * pairs, generator=generator)


def tree_of(rows, widths):
    identity = torch.eye(rows.shape[1])
    return merge_tree(rows[:256], rows[256:], identity, widths, torch.Generator().manual_seed(0))


def test_the_gap_lies_where_the_variables_are_whole():
    tree = tree_of(twins(), [1] * 8)
    assert len(tree.heights) == 7
    assert tree.heights == sorted(tree.heights, reverse=True)
    assert min(tree.heights[:4]) > tree.threshold > max(tree.heights[4], tree.noise)
    assert min(tree.heights[:4]) > 0.5
    assert tree.noise < 0.2


def test_independent_subspaces_do_not_merge():
    rows = torch.randn(2000, 6, generator=torch.Generator().manual_seed(1))
    tree = tree_of(rows, [2, 2, 2])
    assert tree.threshold >= max(tree.heights)


def test_the_widest_relative_gap_counts_and_noise_bounds_it():
    assert MergeTree([0.8, 0.4, 0.1, 0.08], 0.01).threshold == pytest.approx(math.sqrt(0.4 * 0.1))
    # Below the noise a gap means nothing, however wide.
    assert MergeTree([0.8, 0.4, 0.1, 0.00001], 0.05).threshold == pytest.approx(math.sqrt(0.4 * 0.1))
    assert MergeTree([0.01, 0.001], 0.05).threshold == math.inf
    assert MergeTree([0.9], 0.01).threshold == math.inf
    assert MergeTree([], 0.01).threshold == math.inf


class Recorder(Observer):
    def __init__(self):
        self.records, self.states = [], []

    def event(self, record):
        self.records.append(record)

    def checkpoint(self, trainer):
        self.states.append(trainer.state_dict())


SETTINGS = {
    "unit_size": 1,
    "queries": 16,
    "keys": 256,
    "heldout_queries": 256,
    "heldout_keys": 256,
    "pool_rows": 1024,
    "max_steps": 100,
    "lr": 1e-6,
}

RARELY = RunSettings(eval_every=1000, checkpoint_every=20)


def test_a_run_finds_its_threshold_once_and_keeps_it():
    merge = MergeConfig("auto", merge_start=10, merge_interval=10, mi_queries=256, mi_keys=768)
    stream = TensorStream(twins(6000).split(500))
    trainer, seen = Trainer(stream, TrainConfig(**SETTINGS), merge, RARELY), Recorder()
    partition = trainer.run(seen)
    assert partition.widths == (2, 2, 2, 2)
    (found,) = [r for r in seen.records if r["event"] == "merge_tree"]
    assert found["threshold"] == trainer.merger.threshold
    assert all(r["threshold"] == found["threshold"] for r in seen.records if r["event"] == "merge")
    resumed, again = (
        Trainer.resumed(stream, TrainConfig(**SETTINGS), merge, RARELY, state=seen.states[0]),
        Recorder(),
    )
    assert torch.equal(resumed.run(again).rotation, partition.rotation)
    assert not [r for r in again.records if r["event"] == "merge_tree"]


def test_auto_is_the_only_word():
    assert from_flat({"merge_threshold": "auto"}).merge.merge_threshold == "auto"
    assert from_flat({"merge_threshold": "4e-2"}).merge.merge_threshold == 0.04
    assert from_flat({"merge_threshold": 1}).merge.merge_threshold == 1.0
    for wrong in ("automatic", [1.0]):
        with pytest.raises(InputError, match="merge_threshold is"):
            from_flat({"merge_threshold": wrong})


def test_auto_is_off_unless_asked_for():
    from ndm_fast.run.presets import PRESETS

    assert isinstance(MergeConfig().merge_threshold, float)
    assert all(settings.get("merge_threshold") != "auto" for settings in PRESETS.values())
    assert all("escape_tries" not in settings for settings in PRESETS.values())
