"""Search over stored rows against brute force in fp64; the index on disk, whole and damaged."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ndm_fast import ActivationStream, HarvestConfig, InputError, SubspacePartition, open_documents
from ndm_fast.files import write_json
from ndm_fast.geometry.orthogonal import random_rotation
from ndm_fast.report.index.format import PreimageIndex
from ndm_fast.report.index.rows import RotatedRows, Shard
from ndm_fast.report.index.search import nearest_rows
from ndm_fast.report.index.writer import build_index, text_batches

pytestmark = pytest.mark.usefixtures("one_thread")

SITE = "blocks.0.hook_resid_post"


def stored_rows(rows: Tensor, origin: Tensor, widths: list[int], shards: int = 2) -> RotatedRows:
    parts = []
    for some in rows.chunk(shards):
        split = some.double().split(widths, 1)
        full = (some.double() + origin.double()).split(widths, 1)
        norms = torch.stack([part.norm(dim=1) for part in full])
        squares = torch.stack([part.square().sum(1) for part in split]).float()
        parts.append(Shard(some, squares, torch.where(norms > 0, 1 / norms, 0).float()))
    return RotatedRows(parts, origin, widths)


def brute_force(query: Tensor, rows: Tensor, origin: Tensor, columns: slice, metric: str) -> Tensor:
    """[N] fp64 distances of one query to all rows in some columns."""
    query, rows, origin = (t[..., columns].double() for t in (query, rows, origin))
    if metric == "euclidean":
        return (rows - query).norm(dim=1)
    rows, query = rows + origin, query + origin
    lengths = rows.norm(dim=1) * query.norm()
    return 1 - rows @ query / torch.where(lengths > 0, lengths, 1)


@settings(max_examples=40)
@given(
    widths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    count=st.integers(1, 80),
    k=st.integers(1, 12),
    metric=st.sampled_from(["euclidean", "cosine"]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 1 << 20),
)
def test_finds_what_brute_force_finds(
    widths: list[int], count: int, k: int, metric: str, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    width = sum(widths)
    rows = torch.randn(count, width, generator=generator)
    rows[count // 2 :] = rows[: count - count // 2].clone()  # exact twins, so that ties are common
    rows[0] *= 1000
    rows = rows.to(dtype)
    origin = torch.randn(width, generator=generator) * 10 ** torch.randint(-3, 3, (1,), generator=generator)
    queries = torch.cat([torch.randn(2, width, generator=generator), rows[-1:].float()])
    exclude = torch.tensor([0, count - 1, count - 1])
    radius = [1.5 if metric == "euclidean" else 0.5] * len(widths)
    found = nearest_rows(
        queries, stored_rows(rows, origin, widths), k, metric=metric, radius=radius, exclude=exclude
    )
    start = 0
    for s, size in enumerate(widths):
        for q in range(3):
            distances = brute_force(queries[q], rows, origin, slice(start, start + size), metric)
            distances[exclude[q]] = torch.inf
            near = distances[distances <= radius[s]].sort().values[:k]
            assert int(found.within[s, q]) == int((distances <= radius[s]).sum())
            got, index = found.distance[s, q, : len(near)], found.index[s, q, : len(near)]
            torch.testing.assert_close(got, near, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(distances[index], near, rtol=1e-12, atol=1e-12)
            assert len(index.unique()) == len(index)
            assert (found.index[s, q, len(near) :] == -1).all()
            ties = got.diff() == 0
            assert (index.diff()[ties] > 0).all()
        start += size


def test_rounding_cannot_hide_the_nearest_row() -> None:
    # Norms of 3e4 and gaps of 1e-3: the squared distances of the fp32 pass are off by hundreds.
    generator = torch.Generator().manual_seed(1)
    rows = 3e4 / 4 + torch.randn(4000, 16, generator=generator) * 1e-3
    query = rows[17:18] + 1e-4
    found = nearest_rows(query, stored_rows(rows, torch.zeros(16), [16]), 5)
    exact = brute_force(query[0], rows, torch.zeros(16), slice(0, 16), "euclidean")
    torch.testing.assert_close(found.distance[0, 0], exact.sort().values[:5])


def test_some_subspaces_and_too_large_k() -> None:
    rows = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    stored = stored_rows(rows, torch.zeros(6), [2, 3, 1])
    all_of_them = nearest_rows(rows, stored, 50)
    assert all_of_them.index.shape == (3, 9, 9)
    some = nearest_rows(rows, stored, 50, subspaces=[2, 0])
    assert torch.equal(some.index, all_of_them.index[[2, 0]])
    assert torch.equal(some.within, torch.full((2, 9), 9))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "at least 1"),
        ({"metric": "manhattan"}, "euclidean or cosine"),
        ({"subspaces": [3]}, "0 to 2"),
        ({"radius": [1.0]}, "one for each"),
        ({"queries": torch.full((1, 6), torch.nan)}, "NaN"),
        ({"queries": torch.zeros(1, 5)}, r"\[Q, 6\]"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"queries": torch.zeros(1, 6), "k": 3, **change}
    stored = stored_rows(torch.zeros(4, 6), torch.zeros(6), [2, 3, 1])
    with pytest.raises(InputError, match=message):
        nearest_rows(stored=stored, **arguments)


@pytest.fixture(scope="module")
def stream(loaded: tuple[Any, Any], corpus: Path) -> ActivationStream:
    config = HarvestConfig(context_length=32, rows_per_batch=4)
    return ActivationStream(*loaded, SITE, open_documents(str(corpus)), config)


@pytest.fixture(scope="module")
def partition() -> SubspacePartition:
    rotation = random_rotation(32, torch.Generator().manual_seed(0))
    return SubspacePartition(rotation, [16, 8, 8], {"site": SITE})


@pytest.fixture(scope="module")
def built(
    stream: ActivationStream, partition: SubspacePartition, loaded: tuple[Any, Any], tmp_path_factory: Any
) -> Path:
    folder = tmp_path_factory.mktemp("index") / "preimages"
    batches = text_batches(stream.harvested_rows(), 1000)
    build_index(batches, partition, folder, loaded[1], dtype="float32", rows_per_shard=250)
    return folder


def test_index_holds_the_rows_with_their_text(
    built: Path, stream: ActivationStream, partition: SubspacePartition, loaded: tuple[Any, Any]
) -> None:
    index = PreimageIndex(built)
    assert len(index) == 1000
    assert len(index.rows.shards) == 4
    expected = [torch.cat(column)[:1000] for column in zip(*stream.token_rows(), strict=True)]
    rows = index.token_rows(torch.arange(1000))
    raw = index.partition.unrotate(rows.activations + index.rows.origin)
    torch.testing.assert_close(raw, expected[0], rtol=1e-4, atol=1e-4)
    for got, wanted in zip(rows[1:], expected[1:], strict=True):
        assert torch.equal(got, wanted)
    split = (rows.activations.double() - rows.activations.double().mean(0)).split([16, 8, 8], 1)
    spread = [float(part.square().sum(1).mean().sqrt()) for part in split]
    assert index.spread == pytest.approx(spread, rel=1e-5)
    queries = index.rotated(expected[0][[3, 700]])
    found = nearest_rows(queries, index.rows, 1)
    assert (found.distance < 1e-4).all()
    assert all(index.pieces[token].text for token in rows.token.tolist())


def test_index_for_another_partition_from_the_rows_of_one(built: Path, loaded: tuple[Any, Any]) -> None:
    first = PreimageIndex(built)
    other = SubspacePartition(random_rotation(32, torch.Generator().manual_seed(5)), [20, 12])
    second = build_index(first.batches(), other, built.with_name("second"), loaded[1], dtype="float32")
    everything = torch.arange(1000)
    torch.testing.assert_close(
        other.unrotate(second.stored(everything) + second.rows.origin),
        first.partition.unrotate(first.stored(everything) + first.rows.origin),
        rtol=1e-4,
        atol=1e-4,
    )
    for one, two in zip(first.token_rows(everything)[1:], second.token_rows(everything)[1:], strict=True):
        assert torch.equal(one, two)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("rows-00001.safetensors", cut, "bytes instead of"),
        ("rows-00001.safetensors", flip, "checksum"),
        ("partition.safetensors", flip, "checksum"),
        ("pieces.json", Path.unlink, "missing"),
        ("manifest.json", cut, "damaged"),
        ("manifest.json", Path.unlink, "no index"),
    ],
)
def test_damage_is_detected_and_named(
    built: Path, tmp_path: Path, name: str, damage: Callable[[Path], None], reason: str
) -> None:
    folder = tmp_path / "preimages"
    shutil.copytree(built, folder)
    damage(folder / name)
    with pytest.raises(InputError, match=f"{name}.*{reason}|{reason}.*{name}"):
        PreimageIndex(folder)


def test_interrupted_build_leaves_the_old_index(
    built: Path,
    stream: ActivationStream,
    partition: SubspacePartition,
    loaded: tuple[Any, Any],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "preimages"
    shutil.copytree(built, folder)

    def breaking() -> Any:
        yield from text_batches(stream.harvested_rows(), 400)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_index(breaking(), partition, folder, loaded[1], rows_per_shard=300)
    assert len(PreimageIndex(folder)) == 1000
    assert [path.name for path in tmp_path.iterdir()] == ["preimages"]


@pytest.mark.parametrize("at", [1, 2])
def test_an_index_that_is_replaced_survives(
    built: Path,
    stream: ActivationStream,
    partition: SubspacePartition,
    loaded: tuple[Any, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    at: int,
) -> None:
    """Where the old one cannot be moved away, or the new one cannot take its place."""
    folder = tmp_path / "preimages"
    shutil.copytree(built, folder)
    rename, moved = Path.rename, []

    def failing(self: Path, target: Path) -> Path:
        moved.append(target)
        if len(moved) == at:
            raise OSError(errno.EIO, "broken")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(InputError, match=r"cannot write .*broken"):
        build_index(text_batches(stream.harvested_rows(), 400), partition, folder, loaded[1])
    assert len(PreimageIndex(folder)) == 1000
    assert [path.name for path in tmp_path.iterdir()] == ["preimages"]


def test_killed_build_is_told_from_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        PreimageIndex(tmp_path / "preimages")
    (tmp_path / ".preimages.unfinished").mkdir()
    with pytest.raises(InputError, match="was not finished"):
        PreimageIndex(tmp_path / "preimages")


def test_index_refuses_what_it_cannot_hold(
    stream: ActivationStream, partition: SubspacePartition, loaded: tuple[Any, Any], tmp_path: Path
) -> None:
    batch = next(text_batches(stream.harvested_rows(), 50))
    huge = batch._replace(activations=batch.activations * 1e6)
    with pytest.raises(InputError, match=r"overflows float16.*float32"):
        build_index([huge], partition, tmp_path / "a", loaded[1])
    with pytest.raises(InputError, match="no activations"):
        build_index([], partition, tmp_path / "a", loaded[1])
    (tmp_path / "mine").mkdir()
    with pytest.raises(InputError, match="is no index"):
        build_index([batch], partition, tmp_path / "mine", loaded[1])
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_manifest_of_another_format_is_refused(built: Path, tmp_path: Path) -> None:
    folder = tmp_path / "preimages"
    shutil.copytree(built, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    write_json(folder / "manifest.json", {**manifest, "format": 99}, seal=True)
    with pytest.raises(InputError, match="format 99"):
        PreimageIndex(folder)
