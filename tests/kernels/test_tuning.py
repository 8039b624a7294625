"""Tile tables, and the cache that a measurement writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ndm_fast.kernels import gradient_tuning, tuning
from ndm_fast.kernels.tuning import Sweep


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "folder" / "tuning.json"
    monkeypatch.setenv(tuning.CACHE_VARIABLE, str(path))
    tuning._measured.cache_clear()
    return path


def test_pieces_cover_a_width_with_little_waste() -> None:
    for width in range(1, 513):
        main, rest = tuning.pieces(width)
        assert all(part & (part - 1) == 0 and part >= 16 for part in (main, rest) if part), width
        assert width <= main + rest < max(width * 4 / 3, width + 16), width


def test_every_architecture_has_tiles_for_every_width() -> None:
    for arch in tuning.TABLE:
        for width in (1, 32, 33, 72, 129, 512):
            assert tuning.sweep(arch, width) in tuning.TABLE[arch].values()
        assert tuning.sweep(arch, 513) == tuning.WIDE
        assert arch in tuning.SHARED_MEMORY


@pytest.mark.parametrize(
    ("widths", "columns"),
    [
        ([32] * 24, (32, 0)),
        ([64] * 24, (64, 0)),
        ([72] * 32, (64, 16)),
        ([432, 72, 64, 64], (64, 16)),
        ([7] * 9, (16, 0)),
        ([768], (64, 0)),
    ],
    ids=str,
)
def test_gradient_pads_little(widths: list[int], columns: tuple[int, int]) -> None:
    assert gradient_tuning.columns_of(widths, "ieee") == columns
    whole, rest = gradient_tuning.columns_of(widths, "fp16x3")
    assert rest == 0
    assert whole >= columns[0]


@pytest.mark.parametrize(
    ("pieces", "queries", "depth"), [(32, 128, 2304), (24, 128, 768), (1, 1, 7), (500, 4096, 768)]
)
def test_gradient_splits_the_depth_until_the_card_is_full(pieces: int, queries: int, depth: int) -> None:
    for shape in gradient_tuning.CANDIDATES:
        splits = gradient_tuning.splits_of(shape, queries, depth, pieces)
        tiles = -(-depth // shape.depth)
        share = -(-tiles // splits)
        assert (splits - 1) * share < tiles <= splits * share
        blocks = pieces * -(-queries // shape.project_queries) * splits
        assert splits == 1 or blocks <= shape.blocks
        assert splits == tiles or blocks > shape.blocks / 2


@pytest.mark.parametrize(
    ("capability", "row"), [(75, 80), (80, 80), (87, 86), (90, 90), (103, 100), (121, 120)]
)
def test_unknown_architectures_take_the_row_below(capability: int, row: int) -> None:
    assert tuning.architecture(capability) == row


def test_autotune_keeps_the_fastest_choice_that_runs(cache: Path) -> None:
    tried: list[Sweep] = []

    def milliseconds() -> float:
        tried.append(tuning.sweep(90, 64))
        if tried[-1].tile == 256:
            raise RuntimeError("out of resources")
        return (
            abs(tried[-1].query_block - 64)
            + tried[-1].tile
            + tried[-1].warps
            + tried[-1].stages
            + tried[-1].together
        )

    times = tuning.autotune(90, 64, milliseconds)
    assert next(iter(times.items())) == (Sweep(128, 64, 4, 2), 135)
    assert list(times.values()) == sorted(times.values())
    assert len(times) == sum(choice.tile < 256 for choice in tuning.CANDIDATES)
    assert tried == tuning.CANDIDATES
    assert cache.exists()
    assert tuning.sweep(90, 64) == Sweep(128, 64, 4, 2)
    assert tuning.sweep(80, 64) == tuning.TABLE[80][64]


def test_autotune_says_why_nothing_runs(cache: Path) -> None:
    def milliseconds() -> float:
        raise RuntimeError("no card")

    with pytest.raises(RuntimeError, match=r"width 64: .*no card"):
        tuning.autotune(90, 64, milliseconds)
    assert not cache.exists()


def test_every_choice_of_tiles_finds_the_same_neighbors(cache: Path) -> None:
    """What runs on a card is timed there; here it is only run."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: its own times decide")
    from ndm_fast.kernels import autotune

    timed = []
    times = autotune.tune([16], 2, 300, "cpu", lambda search: float(len(timed.append(search) or timed)))
    assert list(times) == tuning.CANDIDATES
    assert tuning.sweep(80, 16) == tuning.CANDIDATES[0]
