"""The loop: it finds planted subspaces, in every mode, and says what it does."""

import math
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ndm_fast.activations.rows import TensorStream
from ndm_fast.config import MergeConfig, RunSettings, TrainConfig
from ndm_fast.errors import InputError
from ndm_fast.geometry import reference
from ndm_fast.geometry.orthogonal import random_rotation
from ndm_fast.partition import orthogonality_error
from ndm_fast.seeds import seeded
from ndm_fast.train.steps import clipped
from ndm_fast.train.trainer import Observer, Trainer

WIDTH, VALUES = 4, 64


def planted(rows=6000, groups=2, seed=0):
    """Independent variables, one per group of coordinates, each at one of a few points; mixed by a rotation.

    The joint states outnumber the keys, or every activation would have a twin in any rotation.
    """
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(groups, VALUES, WIDTH, generator=generator)
    drawn = torch.randint(VALUES, (rows, groups), generator=generator)
    parts = [points[g, drawn[:, g]] for g in range(groups)]
    noise = 0.02 * torch.randn(rows, groups * WIDTH, generator=generator)
    mixing = random_rotation(groups * WIDTH, generator)
    return (torch.cat(parts, 1) + noise) @ mixing.T, mixing


def stream_of(rows):
    return TensorStream(list(rows.split(500)))


SETTINGS = {
    "unit_size": WIDTH,
    "queries": 64,
    "keys": 512,
    "heldout_queries": 256,
    "heldout_keys": 512,
    "pool_rows": 4096,
    "max_steps": 300,
    "lr": 0.03,
    "start": "random",
    "search_every": 8,
    "seed": 1,
}


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Eight columns are too few for two threads to help."""


class Recorder(Observer):
    def __init__(self, stop_at=None):
        self.records, self.stop_at, self.step, self.saved = [], stop_at, 0, None

    def event(self, record):
        self.records.append(record)

    def progress(self, trainer):
        self.step = trainer.step

    def checkpoint(self, trainer):
        self.saved = trainer.state_dict()

    def stop_requested(self):
        return self.stop_at is not None and self.step >= self.stop_at

    def of(self, kind):
        return [record for record in self.records if record["event"] == kind]


def energy_shares(partition, mixing):
    """[groups, S] share of each planted group's directions inside each subspace."""
    overlap = (mixing.T @ partition.rotation).square()
    return torch.stack(
        [
            torch.stack([block.sum() / WIDTH for block in rows.split(list(partition.widths), 1)])
            for rows in overlap.split(WIDTH, 0)
        ]
    )


@pytest.mark.parametrize(
    "mode",
    [
        {},
        {"search_every": 1},
        {"rotation": "exp", "search_every": 1},
        {"schedule": "constant", "warmup_steps": 0, "lr": 0.01},
        {"pool_dtype": "float16"},
        {"rotation": "lazy", "seed": 8},  # from which every kind of rounding leads there
    ],
    ids=lambda mode: "-".join(map(str, mode.values())) or "default",
)
def test_finds_planted_subspaces(mode):
    rows, mixing = planted(rows=8000 if mode.get("search_every") else 30000)
    config = TrainConfig(**{**SETTINGS, **mode})
    recorder = Recorder()
    trainer = Trainer(stream_of(rows.repeat(4, 1)), config, device="cpu")
    partition = trainer.run(recorder)
    assert energy_shares(partition, mixing).max(1).values.min() > 0.98
    losses = [record["heldout_loss"] for record in recorder.of("evaluate")]
    assert losses[-1] < 0.4 * losses[0]
    assert max(record["orthogonality_error"] for record in recorder.of("evaluate")) <= 1e-5
    assert trainer.finished
    assert trainer.step == config.max_steps


def test_cosine_descends_towards_the_planted_subspaces():
    """Its loss is flat near the optimum (1 - cos is quadratic in the angle), so the end is reached slowly."""
    rows, mixing = planted(40000)
    config = TrainConfig(**{**SETTINGS, "metric": "cosine", "max_steps": 1200, "lr": 0.06})
    recorder = Recorder()
    trainer = Trainer(stream_of(rows.repeat(3, 1)), config)
    before = energy_shares(trainer.partition, mixing).max(1).values.min()
    after = energy_shares(trainer.run(recorder), mixing).max(1).values.min()
    losses = [record["heldout_loss"] for record in recorder.of("evaluate")]
    assert losses[-1] < 0.5 * losses[0]
    assert after > max(0.7, before + 0.1)


def test_stale_neighbors_never_underestimate():
    rows, _ = planted(30000)
    recorder = Recorder()
    Trainer(stream_of(rows.repeat(2, 1)), TrainConfig(**SETTINGS)).run(recorder)
    gaps = [r["stale_neighbor_gap"] for r in recorder.of("evaluate") if r["step"]]
    assert gaps
    assert min(gaps) > -1e-5


class NoHostReads(TorchDispatchMode):
    """Fails on whatever would wait for a GPU: numbers read back, shapes that depend on values."""

    _WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.__name__.split(".")[0] not in self._WAITING, func
        return func(*args, **(kwargs or {}))


def _block(device="cpu", **changes):
    """A trainer before its second block, and what that block takes steps on."""
    rows, _ = planted(12000)
    config = TrainConfig(**{**SETTINGS, **changes})
    trainer = Trainer(stream_of(rows), config, settings=RunSettings(log_every=4), device=device)
    trainer.train_block(config.search_every, Observer())
    queries, keys = trainer.pool.take(config.search_every * config.queries), trainer.pool.next_keys()
    return trainer, (queries, keys, trainer.steps.neighbors(queries, keys, trainer.rotation.matrix))


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("rotation", ["lie", "lazy"])
def test_nothing_is_read_back_between_steps(rotation, metric):
    trainer, block = _block(rotation=rotation, metric=metric)
    with NoHostReads():
        logged = trainer.take_steps(*block)
    assert [step for step, _, _ in logged] == [12, 16]
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoHostReads():
        float(logged[0][2])


@pytest.mark.gpu
@pytest.mark.parametrize("rotation", ["lie", "lazy"])
def test_no_host_sync_between_steps(rotation):
    trainer, block = _block("cuda", rotation=rotation)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.take_steps(*block)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.step == 16


def test_neighbors_of_the_loop_are_the_nearest():
    trainer, (queries, keys, index) = _block(pool_dtype="float16")
    exact = reference.nearest_neighbors(queries, keys, trainer.rotation.matrix, trainer.widths)
    found = torch.stack(
        [
            ((queries.float() - keys[rows].float()) @ basis).norm(dim=1)
            for rows, basis in zip(index, trainer.rotation.matrix.split(WIDTH, 1), strict=True)
        ]
    )
    torch.testing.assert_close(found, exact.distance.float(), rtol=1e-3, atol=1e-4)


def test_merging_joins_the_halves_of_a_variable_and_then_stops():
    """Of a few starts, since some end in a local minimum: the one with the least loss when merging begins."""
    rows, mixing = planted(40000)
    merge = MergeConfig(
        merge_threshold=0.15, merge_start=300, merge_interval=150, mi_queries=256, mi_keys=1024
    )
    runs = []
    for seed in (4, 5, 6):
        settings = {**SETTINGS, "unit_size": 2, "max_steps": 900, "lr": 0.05, "search_every": 4, "seed": seed}
        config, recorder = TrainConfig(**settings), Recorder()
        trainer = Trainer(stream_of(rows.repeat(3, 1)), config, merge)
        partition = trainer.run(recorder)
        loss = next(r["heldout_loss"] for r in recorder.of("evaluate") if r["step"] == 300)
        runs.append((loss, seed, trainer, partition, recorder))
    _, _, trainer, partition, recorder = min(runs, key=lambda run: run[:2])
    assert partition.widths == (4, 4)
    assert energy_shares(partition, mixing).max(1).values.min() > 0.95
    merges = recorder.of("merge")
    assert [len(record["pairs"]) for record in merges][-1] == 0
    assert merges[0]["step"] == 300
    assert trainer.finished
    assert trainer.step < config.max_steps


def test_target_subspaces_ends_merging():
    rows, _ = planted(20000)
    config = TrainConfig(**{**SETTINGS, "unit_size": 1, "max_steps": 200})
    merge = MergeConfig(
        merge_threshold=-math.inf, merge_start=40, merge_interval=20, target_subspaces=6, mi_keys=512
    )
    trainer = Trainer(stream_of(rows.repeat(2, 1)), config, merge)
    assert len(trainer.run()) == 6


def test_one_subspace_has_no_pair_to_escape_with():
    config = TrainConfig(**{**SETTINGS, "unit_size": 2 * WIDTH, "escape_tries": 2, "escape_steps": 50})
    recorder = Recorder()
    trainer = Trainer(stream_of(planted(rows=30_000)[0]), config)
    assert trainer.run(recorder).widths == (2 * WIDTH,)
    assert trainer.finished
    assert recorder.of("escape") == []


def test_escapes_never_end_higher_than_they_began():
    rows, _ = planted(40000, groups=3)
    config = TrainConfig(**{**SETTINGS, "max_steps": 500, "escape_tries": 4, "escape_steps": 75, "lr": 0.02})
    recorder = Recorder()
    trainer = Trainer(stream_of(rows.repeat(3, 1)), config)
    trainer.run(recorder)
    escapes = recorder.of("escape")
    assert len(escapes) == 4
    for record in escapes:
        assert record["kept"] == (record["loss_after"] < record["loss_before"])
    best = min(min(record["loss_before"], record["loss_after"]) for record in escapes)
    assert float(trainer.heldout_distance().mean()) == pytest.approx(best, rel=1e-4)


def test_stopping_and_going_on_is_bit_for_bit_the_same():
    rows, _ = planted(40000, groups=3)
    stream = stream_of(rows.repeat(3, 1))
    config = TrainConfig(
        **{
            **SETTINGS,
            "unit_size": 2,
            "max_steps": 300,
            "escape_tries": 2,
            "escape_steps": 48,
            "pool_rows": 3000,
        }
    )
    merge = MergeConfig(merge_threshold=0.0, merge_start=200, merge_interval=50, mi_keys=512)
    straight = Recorder()
    often = RunSettings(eval_every=50)
    expected = Trainer(stream, config, merge, often).run(straight)
    assert {"escape", "merge", "evaluate", "train"} <= {record["event"] for record in straight.records}
    state, records = None, []
    for stop_at in (30, 120, 199, 203, 251, None):
        recorder = Recorder(stop_at)
        begin = partial(Trainer.resumed, state=state) if state else Trainer
        trainer = begin(stream, config, merge, often)
        found = trainer.run(recorder)
        state, records = recorder.saved, records + recorder.records
    assert trainer.finished
    assert torch.equal(found.rotation, expected.rotation)
    assert records == straight.records


def test_a_seed_sets_everything():
    rows, _ = planted(12000)
    config = TrainConfig(**{**SETTINGS, "max_steps": 40})
    runs = [Trainer(stream_of(rows), config).run().rotation for _ in range(2)]
    assert torch.equal(*runs)
    other = Trainer(stream_of(rows), TrainConfig(**{**SETTINGS, "max_steps": 40, "seed": 2})).run().rotation
    assert not torch.equal(runs[0], other)


def test_pca_start_orders_by_variance():
    rows, _ = planted(12000)
    trainer = Trainer(stream_of(rows), TrainConfig(**{**SETTINGS, "start": "pca", "max_steps": 20}))
    variances = trainer.heldout.variances(trainer.rotation.matrix, trainer.widths)
    assert variances[0] > variances[1]
    assert orthogonality_error(trainer.rotation.matrix) < 1e-5


def test_a_scaled_pool_reports_true_distances():
    rows, _ = planted(12000)
    config = TrainConfig(**{**SETTINGS, "max_steps": 20, "pool_dtype": "float16"})
    plain, large = (Trainer(stream_of(rows * size), config) for size in (1.0, 2.0**18))
    assert large.scale < 1
    ratio = float(large.heldout_distance().mean() / plain.heldout_distance().mean())
    assert ratio == pytest.approx(2.0**18, rel=1e-2)


def test_widths_that_do_not_divide_are_named():
    with pytest.raises(InputError, match="unit_size 3 does not divide the width 8: take one of"):
        Trainer(stream_of(planted()[0]), TrainConfig(**{**SETTINGS, "unit_size": 3}))


def test_clipping_scales_long_gradients_only():
    gradient = torch.randn(5, 5, generator=seeded(0))
    norm = float(gradient.norm())
    assert torch.equal(clipped(gradient, norm * 2), gradient)
    assert float(clipped(gradient, norm / 2).norm()) == pytest.approx(norm / 2, rel=1e-5)
