"""The one-file version of the method: it computes what the package computes, and finds planted groups."""

import ast
import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from ndm_fast.activations.pool import ActivationPool
from ndm_fast.activations.rows import TensorStream
from ndm_fast.config import MergeConfig, RunSettings, TrainConfig
from ndm_fast.train.trainer import Observer, Trainer

NANO = Path(__file__).parents[1] / "examples" / "nano_ndm.py"


@pytest.fixture(scope="module")
def nano():
    spec = importlib.util.spec_from_file_location("nano_ndm", NANO)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Recorder(Observer):
    def __init__(self):
        self.losses, self.merges = [], []

    def event(self, record):
        if record["event"] == "train":
            self.losses.append(record["loss"])
        if record["event"] == "merge":
            self.merges.append(record)


def recorded_batches(monkeypatch):
    """Queries and keys of every step, in the order in which the package's pool gives them."""
    queries, keys = [], []
    take, next_keys = ActivationPool.take, ActivationPool.next_keys

    def recording_take(pool, count):
        queries.append(take(pool, count).clone())
        return queries[-1]

    def recording_keys(pool):
        keys.append(next_keys(pool).clone())
        return keys[-1]

    monkeypatch.setattr(ActivationPool, "take", recording_take)
    monkeypatch.setattr(ActivationPool, "next_keys", recording_keys)
    return queries, keys


def clustered(nano, rows):
    torch.manual_seed(0)
    return nano.planted_groups(rows)[0]


def test_same_loss_as_the_package_at_every_step(nano, monkeypatch, one_thread):
    """Parity mode: the published settings, three merges included, on the same queries and keys."""
    steps, queries, keys = 60, 32, 256
    rows = clustered(nano, 6000)
    train = TrainConfig(
        initial_widths=(3, 3, 2, 2, 2),
        rotation="exp",
        search_every=1,
        schedule="constant",
        warmup_steps=0,
        lr=3e-4,
        queries=queries,
        keys=keys,
        pool_rows=steps * queries + 2 * keys,
        heldout_queries=64,
        heldout_keys=256,
        max_steps=steps,
    )
    merge = MergeConfig(merge_threshold=-1.0, merge_start=20, merge_interval=15, mi_keys=keys, mi_queries=64)
    batches = recorded_batches(monkeypatch)
    ours = Recorder()
    trainer = Trainer(TensorStream(list(rows.split(500))), train, merge, RunSettings(log_every=1))
    partition = trainer.run(ours)
    heldout = trainer.heldout.queries

    start = nano.Partition(torch.eye(12), [3, 3, 2, 2, 2])
    found, losses = nano.train(
        zip(*batches, strict=True),
        heldout,
        start,
        steps=steps,
        merge_start=20,
        merge_interval=15,
        threshold=-1.0,
    )
    assert len(ours.merges) == 3
    assert losses == pytest.approx(ours.losses, rel=1e-5)
    assert tuple(found.widths) == partition.widths
    torch.testing.assert_close(found.rotation, partition.rotation, rtol=0, atol=1e-3)


def test_information_is_the_packages(nano, one_thread):
    from ndm_fast.train.merge.mutual_information import mutual_information

    rows = clustered(nano, 1200)
    start = nano.Partition(nano.random_rotation(12), [6, 4, 2])
    ours = mutual_information(rows[:200], rows[200:], *start)
    torch.testing.assert_close(
        nano.mutual_information(rows[:200], rows[200:], start), ours, rtol=1e-4, atol=1e-4
    )


def test_toy_finds_the_planted_groups(nano, capsys, one_thread):
    torch.manual_seed(0)
    partition = nano.toy(starts=4)
    assert partition.widths == nano.PLANTED
    assert "share of group 1 in each subspace: 0.0%  100.0%" in capsys.readouterr().out


def test_trains_on_activations_from_a_file(nano, tmp_path, monkeypatch, capsys, one_thread):
    np.save(tmp_path / "acts.npy", clustered(nano, 2000).numpy())
    out = tmp_path / "partition.npz"
    arguments = ["--unit", "4", "--keys", "256", "--steps", "200", "--lr", "1e-2", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["nano_ndm.py", str(tmp_path / "acts.npy"), *arguments])
    nano.main()
    with np.load(out) as saved:
        rotation, widths = saved["rotation"], saved["widths"]
    assert sum(widths) == 12
    np.testing.assert_allclose(rotation.T @ rotation, np.eye(12), atol=1e-5)
    first, last = map(float, re.findall(r"(?:first|merging) ([\d.]+)", capsys.readouterr().out))
    assert last < first


def test_stays_one_file_of_plain_torch():
    source = NANO.read_text()
    assert len(source.splitlines()) <= 250
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(source))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported <= {"__future__", "argparse", "collections", "math", "typing", "numpy", "torch"}
