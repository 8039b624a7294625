"""Splitting from the top: planted groups are found, and runs of that mode save and resume."""

import dataclasses
import json

import pytest
import torch

from ndm_fast.config import MergeConfig, TrainConfig
from ndm_fast.errors import InputError
from ndm_fast.geometry.orthogonal import random_rotation
from ndm_fast.partition import SubspacePartition
from ndm_fast.train.split import split_space
from ndm_fast.train.trainer import Observer

TRAIN = TrainConfig(
    unit_size=4,
    queries=64,
    keys=256,
    heldout_queries=128,
    heldout_keys=256,
    pool_rows=2048,
    lr=3e-2,
    search_every=4,
    split_steps=200,
    mode="split",
)
MERGE = MergeConfig(0.12, mi_queries=256, mi_keys=1024)


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Twelve columns."""


class Recorder(Observer):
    def __init__(self):
        self.records = []

    def event(self, record):
        self.records.append(record)


def planted(groups=3, rows=6000, seed=0):
    """Independent variables of 64 values in 4 dimensions each, mixed by a rotation."""
    generator = torch.Generator().manual_seed(seed)
    points = 2 * torch.randn(groups, 64, 4, generator=generator)
    drawn = torch.randint(64, (rows, groups), generator=generator)
    parts = torch.cat([points[g, drawn[:, g]] for g in range(groups)], 1)
    mixing = random_rotation(4 * groups, generator)
    return (parts + 0.02 * torch.randn(parts.shape, generator=generator)) @ mixing.T, mixing


def test_planted_groups_are_split_apart():
    rows, mixing = planted()
    seen = Recorder()
    found = split_space(rows, TRAIN, MERGE, seen)
    assert found.widths == (4, 4, 4)
    energy = (mixing.T @ found.rotation).square().reshape(3, 4, 3, 4).sum((1, 3)) / 4
    assert sorted(energy.argmax(1).tolist()) == [0, 1, 2]
    assert float(energy.max(1).values.min()) > 0.9
    assert sum(record["accepted"] for record in seen.records) == 2


def test_one_variable_stays_whole():
    """A single variable in 8 dimensions: its halves tell of each other."""
    generator = torch.Generator().manual_seed(1)
    points = 2 * torch.randn(40, 8, generator=generator)
    rows = points[torch.randint(40, (6000,), generator=generator)]
    rows = rows + 0.02 * torch.randn(rows.shape, generator=generator)
    assert split_space(rows, TRAIN, MERGE).widths == (8,)


def test_the_automatic_threshold_is_for_merging():
    with pytest.raises(InputError, match="needs a number"):
        split_space(planted()[0], TRAIN, MergeConfig("auto"))
    with pytest.raises(InputError, match="mode is 'halve'"):
        dataclasses.replace(TRAIN, mode="halve")


def test_a_run_splits_saves_and_resumes(train_flags, tmp_path, ndm):
    options = {"mode": "split", "split_steps": 8, "merge_threshold": 0.5, "unit_size": 8}
    one = tmp_path / "one"
    outcome = ndm(*train_flags(one, **options))
    assert outcome.code == 0, outcome.err
    saved = SubspacePartition.from_pretrained(one / "partition")
    result = json.loads((one / "result.json").read_text())
    assert list(saved.widths) == result["widths"]
    assert len(saved) > 1
    events = [json.loads(line) for line in (one / "log.jsonl").read_text().splitlines()]
    splits = [event for event in events if event["event"] == "split"]
    assert splits[0]["width"] == 32
    assert splits[0]["accepted"]
    assert sum(event["accepted"] for event in splits) == len(saved) - 1
    # As after a crash before the end: the result is the same.
    (one / "result.json").unlink()
    assert ndm(*train_flags(one, **options), "--resume").code == 0
    assert torch.equal(SubspacePartition.from_pretrained(one / "partition").rotation, saved.rotation)
