"""Training on the logarithm of the distance: quiet subspaces are heard."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ndm_fast.activations.rows import TensorStream
from ndm_fast.config import RunSettings, TrainConfig
from ndm_fast.errors import InputError
from ndm_fast.geometry.orthogonal import random_rotation
from ndm_fast.ranks import Group
from ndm_fast.train.observer import Observer
from ndm_fast.train.rotation.make import make_rotation
from ndm_fast.train.steps import Steps
from ndm_fast.train.trainer import Trainer

SETTINGS = {
    "unit_size": 4,
    "keys": 500,
    "queries": 32,
    "search_every": 4,
    "max_steps": 48,
    "heldout_queries": 64,
    "heldout_keys": 500,
    "pool_rows": 900,
    "objective": "log",
    "start": "pca",
}


def clustered(rows: int, seed: int = 0) -> Tensor:
    """[N, 12] three independent groups of few values, each ten times louder than the next, mixed."""
    generator = torch.Generator().manual_seed(seed)
    groups = []
    for loudness in (100.0, 10.0, 1.0):
        values = torch.randn(30, 4, generator=generator)
        drawn = values[torch.randint(30, (rows,), generator=generator)]
        groups.append(loudness * (drawn + 0.05 * torch.randn(rows, 4, generator=generator)))
    mixed = torch.cat(groups, 1)
    return mixed @ random_rotation(12, torch.Generator().manual_seed(5))


class Log(Observer):
    def __init__(self) -> None:
        self.records: list[dict] = []

    def event(self, record: dict) -> None:
        self.records.append(record)


def test_the_loss_falls_and_is_a_geometric_mean() -> None:
    log = Log()
    stream = TensorStream(clustered(30000).split(500))
    config = TrainConfig(**{**SETTINGS, "start": "random", "lr": 3e-2, "max_steps": 160})
    trainer = Trainer(stream, config, settings=RunSettings(eval_every=40, log_every=4))
    trainer.run(log)
    held = [r for r in log.records if r["event"] == "evaluate"]
    assert held[-1]["heldout_loss"] < 0.9 * held[0]["heldout_loss"]
    by_width = torch.tensor(held[-1]["by_subspace"]).log() @ torch.tensor(held[-1]["widths"]).float() / 12
    assert held[-1]["heldout_loss"] == pytest.approx(float(by_width.exp()), rel=1e-5)
    assert all(-0.01 < r["stale_neighbor_gap"] < 1 for r in held[1:])
    trained = [r["loss"] for r in log.records if r["event"] == "train"]
    assert all(0.5 * held[-1]["heldout_loss"] < loss < 2 * held[0]["heldout_loss"] for loss in trained)


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_the_loss_follows_the_scale_of_the_activations(scale: float) -> None:
    trainer = Trainer(TensorStream((scale * clustered(6000)).split(500)), TrainConfig(**SETTINGS))
    trainer.evaluate(Observer())
    plain = Trainer(TensorStream(clustered(6000).split(500)), TrainConfig(**SETTINGS))
    plain.evaluate(Observer())
    assert trainer.heldout_loss == pytest.approx(scale * plain.heldout_loss, rel=1e-4)


def test_the_steps_of_a_search_share_its_floor() -> None:
    """A copy among the neighbors does not blow up the gradient: its logarithm stops to fall."""
    rows = clustered(600)
    queries, keys = rows[:32], torch.cat([rows[:1], rows[100:]])
    index = torch.zeros(3, 32, dtype=torch.int64)
    rotation = make_rotation("lie", torch.eye(12), (0.9, 0.999))
    steps = Steps(TrainConfig(**SETTINGS), Group(), (4, 4, 4), rotation, 1.0)
    losses = steps.take_steps(queries, keys, index, [rotation.next_turn(1e-3)])
    assert bool(losses.isfinite().all())
    assert bool(rotation.matrix.isfinite().all())


def test_a_pace_by_ratio_keeps_loud_directions_out_of_quiet_ones() -> None:
    """At an equal pace each step adds a little of what is 100 times as loud, and the loss first rises."""
    rises = {}
    for pace in ("equal", "ratio"):
        config = TrainConfig(**SETTINGS, pace=pace, lr=3e-2, schedule="constant")
        trainer = Trainer(TensorStream(clustered(30000).split(500)), config)
        trainer.evaluate(Observer())
        before = trainer.heldout_loss
        trainer.run()
        rises[pace] = trainer.heldout_loss / before
    assert rises["ratio"] < 1 < rises["equal"]


@pytest.mark.parametrize("pace", ["equal", "ratio"])
def test_resumes_to_the_same_rotation(pace: str) -> None:
    stream, config = TensorStream(clustered(6000).split(500)), TrainConfig(**SETTINGS, pace=pace)
    whole = Trainer(stream, config)
    whole.run()

    class Stop(Observer):
        def stop_requested(self) -> bool:
            return True

    trainer = Trainer(stream, config)
    while not trainer.finished:
        trainer.run(Stop())
        trainer = Trainer.resumed(stream, config, state=trainer.state_dict())
    assert torch.equal(trainer.rotation.matrix, whole.rotation.matrix)


def test_a_pace_by_ratio_needs_a_rotation_that_turns_pairs() -> None:
    with pytest.raises(InputError, match="pace ratio goes with rotation lie or lazy, not exp"):
        TrainConfig(rotation="exp", pace="ratio")


def test_goes_with_the_euclidean_metric_alone() -> None:
    with pytest.raises(InputError, match="objective log goes with metric euclidean, not cosine"):
        TrainConfig(objective="log", metric="cosine")
