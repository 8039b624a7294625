"""Tile tables, and the cache that a measurement writes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ndm_fast.kernels import gradient_tuning, tuning
from ndm_fast.kernels.tuning import Sweep


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "folder" / "tiles.json"
    monkeypatch.setenv(tuning.CACHE_VARIABLE, str(path))
    tuning.measured.cache_clear()
    yield path
    tuning.measured.cache_clear()


def test_pieces_cover_a_width_with_little_waste() -> None:
    for width in range(1, 513):
        main, rest = tuning.pieces(width)
        assert all(part & (part - 1) == 0 and part >= 16 for part in (main, rest) if part), width
        assert width <= main + rest < max(width * 4 / 3, width + 16), width


SHIPPED_SWEEPS = {
    80: {32: (128, 128, 8, 3), 64: (128, 128, 8, 3), 128: (64, 128, 8, 2), 256: (32, 64, 8, 2),
         512: (16, 64, 8, 1)},
    86: {32: (128, 128, 8, 3), 64: (128, 128, 8, 2), 128: (64, 64, 8, 2), 256: (32, 32, 4, 2),
         512: (16, 32, 4, 1)},
    90: {32: (128, 128, 8, 3), 64: (128, 128, 4, 3), 80: (128, 64, 4, 3), 128: (128, 128, 8, 2),
         256: (128, 64, 8, 2), 512: (64, 64, 8, 2)},
    100: {32: (128, 128, 8, 3), 64: (128, 128, 8, 3), 80: (128, 64, 4, 3), 128: (128, 128, 8, 2),
          256: (128, 64, 8, 2), 512: (64, 64, 8, 2)},
}  # fmt: skip
"""By capability and padded columns up to the key: a change of the data is to be seen."""


def test_every_architecture_has_tiles_for_every_width() -> None:
    assert set(tuning.SHIPPED) == {str(arch) for arch in tuning.SHARED_MEMORY}
    for arch in tuning.SHARED_MEMORY:
        rows = SHIPPED_SWEEPS[86 if arch in (89, 120) else arch]
        for width in range(1, 513):
            limit = min(columns for columns in rows if columns >= sum(tuning.pieces(width)))
            for keys in ("float16", "bfloat16", "float32"):
                assert tuning.sweep(arch, width, keys=keys) == Sweep(*rows[limit])
        assert tuning.sweep(arch, 513) == tuning.WIDE


@pytest.mark.parametrize(
    ("width", "queries", "tiles"),
    [
        (32, 1, (128, 64, 4)),
        (72, 128, (128, 128, 4)),
        (80, 129, (64, 256, 4)),
        (81, 128, (128, 128, 8)),
        (128, 256, (64, 256, 8)),
    ],
)
def test_few_queries_keep_their_place(width: int, queries: int, tiles: tuple[int, ...]) -> None:
    for arch in tuning.SHARED_MEMORY:
        assert tuning.sweep(arch, width, queries) == Sweep(*tiles, stages=3, streams=2)
        assert tuning.sweep(arch, width, 257) == tuning.sweep(arch, width)
        assert tuning.sweep(arch, 129, queries) == tuning.sweep(arch, 129)


@pytest.mark.parametrize(
    ("width", "tile", "options", "expected"),
    [
        (32, 128, {}, (16, 128, 4, 1, 512, {"num_warps": 1})),
        (72, 64, {}, (16, 64, 8, 1, 512, {"num_warps": 1})),
        (72, 128, {"cosine": True}, (128, 128, 4, 1, 512, {"num_warps": 1, "maxnreg": 255})),
        (72, 128, {"raw": True}, (128, 128, 8, 16, 1024, {"num_warps": 4, "maxnreg": 168})),
        (32, 128, {"fused": True, "cosine": True}, (32, 64, 32, 1, 4096, {"num_warps": 4, "maxnreg": 255})),
        (432, 64, {"fused": True, "raw": True}, (512, 16, 512, 2, 4096, {"num_warps": 4})),
    ],
)
def test_resolve_shapes(width: int, tile: int, options: dict[str, bool], expected: tuple[Any, ...]) -> None:
    asked = {"fused": False, "raw": False, "cosine": False, **options}
    found = tuning.resolve_shape(width, tile, **asked)
    assert (found.P, found.CHUNK, found.PIECE, found.DEEP, found.SEGMENT, found.options) == expected


@pytest.mark.parametrize(
    ("width", "options", "together", "whole"),
    [
        (72, {}, 2, True),
        (100, {}, 2, False),
        (72, {"raw": True}, 2, False),
        (144, {"raw": True}, 2, True),
        (64, {"fused": True}, 1, True),
        (72, {"fused": True}, 1, False),
    ],
)
def test_pieces_together(width: int, options: dict[str, bool], together: int, whole: bool) -> None:
    asked = {"fused": False, "raw": False, "cosine": False, **options}
    found = tuning.resolve_shape(width, 128, **asked)
    chosen = found.TOGETHER, found.WHOLE
    assert chosen == (together, whole)


def test_measured_tiles_are_in_their_records() -> None:
    root = Path(__file__).resolve().parents[2]
    entries = [row for kinds in tuning.SHIPPED.values() for rows in kinds.values() for row in rows]
    assert all(row["why"] for row in entries)
    of_records = [row for row in entries if "milliseconds" in row]
    assert len(of_records) >= 4
    for entry in of_records:
        rows = json.loads((root / entry["record"]).read_text())["rows"]
        queries = "Q128" if entry["queries"] == "few" else "Q4096"
        shape = "x".join(map(str, entry["choice"].values()))
        found = [
            row["ms"]
            for row in rows
            if "ms" in row
            and row["name"].startswith(f"sweep {queries} ")
            and shape in (name := row["name"].split()[2], f"{name}x1x0")
            and sum(tuning.pieces(row["width"])) == entry["columns"]
        ]
        assert any(abs(each - entry["milliseconds"]) < 1e-4 for each in found), (entry, found)


@pytest.mark.parametrize(
    ("widths", "columns"),
    [
        ([32] * 24, (32, 0)),
        ([64] * 24, (64, 0)),
        ([72] * 32, (64, 16)),
        ([432, 72, 64, 64], (64, 16)),
        ([7] * 9, (16, 0)),
        ([768], (64, 16)),
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
    pytest.importorskip("triton")
    from ndm_fast.kernels import autotune

    tried: list[Sweep] = []
    key = tuning.sweep_key(90, 64)
    assert key == tuning.Key(90, 64, "more", "float16")

    def milliseconds() -> float:
        tried.append(tuning.sweep(90, 64))
        if tried[-1].tile == 256:
            raise RuntimeError("out of resources")
        return abs(tried[-1].query_block - 64) + sum(tried[-1]) - tried[-1].query_block

    candidates = [choice._asdict() for choice in autotune.SWEEP_CANDIDATES]
    times = autotune.fastest("sweep", key, candidates, milliseconds, "here")
    best = Sweep(128, 64, 4, 2)
    assert times[0] == (best._asdict(), 135)
    assert [time for _, time in times] == sorted(time for _, time in times)
    assert len(times) == sum(choice.tile < 256 for choice in autotune.SWEEP_CANDIDATES)
    assert tried == autotune.SWEEP_CANDIDATES
    assert cache.exists()
    assert tuning.sweep(90, 64) == best
    # Only for what was measured.
    assert tuning.sweep(90, 64, keys="float32") == Sweep(*SHIPPED_SWEEPS[90][64])
    assert tuning.sweep(90, 64, 128).streams == 2
    assert tuning.sweep(90, 32) == Sweep(*SHIPPED_SWEEPS[90][32])
    assert tuning.sweep(80, 64) == Sweep(*SHIPPED_SWEEPS[80][64])
    autotune.fastest("sweep", key, candidates[1:2], lambda: 1.0, "later")
    assert tuning.sweep(90, 64) == Sweep(*candidates[1].values())
    assert len(json.loads(cache.read_text())["90"]["sweep"]) == 1


def test_a_measured_resolve_is_taken(cache: Path) -> None:
    pytest.importorskip("triton")
    from ndm_fast.kernels import autotune

    key = tuning.Key(90, 80, "few", "float16")
    choice = {"numbers": 256, "segment": 1024, "warps": 2}
    autotune.fastest("resolve", key, [choice], lambda: 1.0, "here")

    def shape(**more: Any) -> tuning.Resolve:
        asked = {"fused": False, "raw": False, "cosine": False, "capability": 90, "few": True, **more}
        return tuning.resolve_shape(72, 128, **asked)

    assert (shape().PIECE, shape().SEGMENT, shape().options) == (4, 1024, {"num_warps": 2})
    for other in ({"few": False}, {"raw": True}, {"keys": "bfloat16"}, {"capability": 80}):
        assert shape(**other).options != {"num_warps": 2}, other


def test_autotune_says_why_nothing_runs(cache: Path) -> None:
    pytest.importorskip("triton")
    from ndm_fast.kernels import autotune

    def milliseconds() -> float:
        raise RuntimeError("no card")

    with pytest.raises(RuntimeError, match=r"columns=64.*no card"):
        autotune.fastest("sweep", tuning.sweep_key(90, 64), [{}], milliseconds, "here")
    assert not cache.exists()


def test_every_choice_finds_the_same_neighbors(cache: Path) -> None:
    """What runs on a card is timed there; here it is only run."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: its own times decide")
    from ndm_fast.kernels import autotune

    def count(run: Callable[[], object]) -> float:
        run()
        calls.append(1)
        return float(len(calls))

    calls: list[int] = []
    times = autotune.tune([16], 2, 300, "cpu", count)
    sweeps = autotune.STREAM_CANDIDATES + autotune.SWEEP_CANDIDATES[::2]
    assert [choice for choice, _ in times["sweep"]] == [each._asdict() for each in sweeps]
    assert [choice for choice, _ in times["resolve"]] == autotune.RESOLVE_CANDIDATES
    assert tuning.sweep(80, 16, 128) == sweeps[0]
