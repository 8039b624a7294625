"""Blocks of steps from static memory: on the CPU the work itself is what a replay does."""

from __future__ import annotations

import pytest
import torch

from ndm_fast.activations.rows import TensorStream
from ndm_fast.config import RunSettings, TrainConfig, from_flat
from ndm_fast.errors import InputError
from ndm_fast.train import cuda_graph
from ndm_fast.train.trainer import Observer, Trainer

SETTINGS = {
    "unit_size": 8,
    "keys": 500,
    "queries": 16,
    "search_every": 4,
    "max_steps": 64,
    "pool_rows": 3000,
    "heldout_queries": 100,
    "heldout_keys": 500,
    "lr": 1e-2,
}


def _losses(rows: torch.Tensor, device: str, cuda_graph: str = "off", **changes: object) -> list[float]:
    """Training losses of every block of a run, each held-out loss last."""
    config = TrainConfig(**{**SETTINGS, **changes})
    settings = RunSettings(log_every=4, cuda_graph=cuda_graph)
    trainer = Trainer(
        TensorStream([rows[:600], rows[600:3600], rows[3600:]]), config, settings=settings, device=device
    )

    found: list[float] = []

    class Losses(Observer):
        def event(self, record: dict[str, object]) -> None:
            if record["event"] == "train":
                found.append(float(str(record["loss"])))

    trainer.run(Losses())
    return [*found, trainer.heldout_loss]


@pytest.mark.parametrize("rotation", ["lie", "lazy"])
@pytest.mark.parametrize("lr", [1e-4, 1e-2])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_replayed_blocks_train_as_eager_ones(
    monkeypatch: pytest.MonkeyPatch, rotation: str, lr: float, device: str
) -> None:
    """Rates fall from block to block, keys move through the pool, and the pool is refilled."""
    monkeypatch.setenv("NDM_FAST_BACKEND", "reference")  # the torch code that a graph captures
    captures = []
    captured = cuda_graph._captured
    monkeypatch.setattr(cuda_graph, "_captured", lambda *work: captures.append(work) or captured(*work))
    rows = torch.randn(6700, 24, generator=torch.Generator().manual_seed(0))
    changes = {"rotation": rotation, "lr": lr}
    eager = _losses(rows, device, **changes)
    assert not captures
    replayed = _losses(rows, device, cuda_graph="on", **changes)
    assert captures
    assert len(captures) <= 6  # of sixteen blocks
    assert replayed == pytest.approx(eager, rel=1e-4)
    assert min(eager) < eager[0]


def test_an_exponential_is_not_captured() -> None:
    with pytest.raises(InputError, match="take lie or lazy"):
        from_flat({"rotation": "exp", "cuda_graph": "on"})


@pytest.mark.parametrize(
    ("word", "device", "ranks", "changes", "expected"),
    [
        ("auto", "cuda", 1, {}, True),
        ("auto", "cpu", 1, {}, False),
        ("auto", "cuda", 2, {}, False),
        ("auto", "cuda", 1, {"rotation": "exp", "search_every": 1}, False),
        ("auto", "cuda", 1, {"precision": "fp32"}, False),
        ("auto", "cuda", 1, {"metric": "cosine"}, False),
        ("off", "cuda", 1, {}, False),
        ("on", "cpu", 1, {"precision": "fp32"}, True),
    ],
)
def test_by_itself_only_what_a_card_has_captured(
    word: str, device: str, ranks: int, changes: dict[str, object], expected: bool
) -> None:
    train = TrainConfig(**{"rotation": "lazy", "precision": "bf16", "pool_dtype": "float16", **changes})
    settings = RunSettings(cuda_graph=word)
    assert cuda_graph.are_wanted(settings, train, device, ranks) is expected
