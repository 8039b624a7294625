"""Training from the rows of a plain file: what is read, in which order, and what is refused."""

from __future__ import annotations

import json
import os
import signal
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import wait_for
from safetensors.torch import save_file

from ndm_fast.activations.row_files import RowFile
from ndm_fast.config import TrainConfig
from ndm_fast.errors import InputError
from ndm_fast.partition import SubspacePartition
from ndm_fast.run.row_stream import BATCH_ROWS, RowStream

pytestmark = pytest.mark.usefixtures("one_thread")

N, WIDTH = 1500, 16
TINY = {
    "unit_size": 4,
    "queries": 16,
    "keys": 256,
    "pool_rows": 640,
    "heldout_queries": 32,
    "heldout_keys": 256,
    "max_steps": 64,
    "search_every": 4,
    "log_every": 4,
    "eval_every": 16,
    "checkpoint_every": 8,
    "mi_queries": 32,
    "mi_keys": 128,
}
FLAGS = [part for name, value in TINY.items() for part in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    generator = np.random.default_rng(0)
    return (generator.normal(size=(N, WIDTH)) @ generator.normal(size=(WIDTH, WIDTH))).astype(np.float32)


@pytest.fixture
def file(rows: np.ndarray, tmp_path: Path) -> Path:
    np.save(tmp_path / "rows.npy", rows)
    return tmp_path / "rows.npy"


def parquet(path: Path, columns: dict[str, object]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_every_format_holds_the_same_rows(rows, tmp_path):
    import pyarrow

    np.save(tmp_path / "a.npy", rows)
    np.save(tmp_path / "fortran.npy", np.asfortranarray(rows.astype(np.float64)))
    tensor = torch.from_numpy(rows)
    save_file({"anything": tensor, "labels": torch.arange(N)}, tmp_path / "b.safetensors")
    save_file({"other": torch.ones(2, 2), "embeddings": tensor}, tmp_path / "c.safetensors")
    parquet(tmp_path / "lists.parquet", {"id": list(range(N)), "vector": list(rows)})
    fixed = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(rows.ravel()), WIDTH)
    parquet(tmp_path / "fixed.parquet", {"embedding": fixed, "text": ["x"] * N})
    wide = {f"x{i}": rows[:, i] for i in range(WIDTH)}
    parquet(tmp_path / "wide.parquet", {"label": ["x"] * N, **wide})
    index = torch.tensor([7, 0, N - 1])
    for name in (
        "a.npy",
        "fortran.npy",
        "b.safetensors",
        "c.safetensors",
        "lists.parquet",
        "fixed.parquet",
        "wide.parquet",
    ):
        found = RowFile(tmp_path / name)
        assert (len(found), found.width) == (N, WIDTH), name
        assert torch.equal(found.take(index), tensor[index]), name


def test_half_precision_stays_and_files_are_mapped(rows, tmp_path):
    np.save(tmp_path / "half.npy", rows.astype(np.float16))
    save_file({"rows": torch.from_numpy(rows).bfloat16()}, tmp_path / "half.safetensors")
    first, second = RowFile(tmp_path / "half.npy"), RowFile(tmp_path / "half.safetensors")
    assert isinstance(first._rows, np.memmap)
    assert first.take(torch.tensor([1])).dtype == torch.float16
    assert second.take(torch.tensor([1])).dtype == torch.bfloat16


def test_the_checksum_is_of_the_content(rows, tmp_path, monkeypatch):
    np.save(tmp_path / "a.npy", rows)
    before = RowFile(tmp_path / "a.npy").sha256
    monkeypatch.setattr("ndm_fast.activations.row_files._CHUNK_BYTES", 5000)
    assert RowFile(tmp_path / "a.npy").sha256 == before
    changed = rows.copy()
    changed[N // 2, 3] += 1
    np.save(tmp_path / "a.npy", changed)
    assert RowFile(tmp_path / "a.npy").sha256 != before


def refused(tmp_path, name, content):
    path = tmp_path / name
    if callable(content):
        content(path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content, allow_pickle=True)
    with pytest.raises(InputError) as error:
        RowFile(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_bad_files_are_one_line(rows, tmp_path):
    assert "shape [1500]: give rows [N, d]" in refused(tmp_path, "a.npy", rows[:, 0])
    assert "shape [5, 3, 2]" in refused(tmp_path, "a.npy", np.zeros((5, 3, 2)))
    assert "shape [0, 16]" in refused(tmp_path, "a.npy", rows[:0])
    assert "holds int64: save it as float16" in refused(tmp_path, "a.npy", np.zeros((5, 3), dtype=int))
    assert "cannot read" in refused(tmp_path, "a.npy", np.array([{"x": 1}]))
    assert "cannot read" in refused(tmp_path, "a.npy", b"\x93NUMPY nothing")
    assert "cannot read" in refused(tmp_path, "a.npy", b"")
    assert "ends in .npy, .safetensors, .parquet" in refused(tmp_path, "a.csv", b"1,2")
    assert "cannot read" in refused(tmp_path, "a.safetensors", b"12345678nothing")
    assert "cannot read" in refused(tmp_path, "a.parquet", b"nothing")
    bad = rows.copy()
    bad[1234, 5] = np.nan
    assert f"row 1234 of {tmp_path / 'a.npy'} holds NaN" in refused(tmp_path, "a.npy", bad)
    two = {"a": torch.ones(3, 2), "b": torch.ones(3, 2)}
    assert "a [3, 2], b [3, 2]: give one tensor of rows" in refused(
        tmp_path, "a.safetensors", lambda p: save_file(two, p)
    )
    whole = {"a": torch.ones(3, 2, dtype=torch.int32)}
    assert "a in" in refused(tmp_path, "a.safetensors", lambda p: save_file(whole, p))
    ragged = {"v": [[1.0, 2.0], [1.0]]}
    assert "have 1 to 2 numbers" in refused(tmp_path, "a.parquet", lambda p: parquet(p, ragged))
    assert "empty cells" in refused(tmp_path, "a.parquet", lambda p: parquet(p, {"v": [[1.0], None]}))
    assert "empty numbers" in refused(tmp_path, "a.parquet", lambda p: parquet(p, {"v": [[1.0], [None]]}))
    assert "holds t (string): give" in refused(tmp_path, "a.parquet", lambda p: parquet(p, {"t": ["x"]}))
    with pytest.raises(InputError, match="is no file: check --rows"):
        RowFile(tmp_path / "none.npy")


def test_held_out_rows_are_never_trained_on_and_no_window_has_a_row_twice(rows, tmp_path):
    np.save(tmp_path / "a.npy", np.arange(5000, dtype=np.float32)[:, None])
    train = TrainConfig(
        heldout_queries=100, heldout_keys=1000, keys=100, queries=10, search_every=1, pool_rows=3900
    )
    stream = RowStream(RowFile(tmp_path / "a.npy"), train, repeat=True)
    batches = []
    for number, batch in enumerate(stream.batches()):
        batches.append(batch[:, 0])
        if number == 20:
            break
    held, others = torch.cat(batches[:2]), torch.cat(batches[2:])
    assert len(batches[0]) == BATCH_ROWS
    assert len(held) == 1100
    assert len(others) > 3 * 3900
    assert not set(held.tolist()) & set(others.tolist())
    assert set(held.tolist()) | set(others.tolist()) == set(range(5000))
    for first in range(0, len(others) - 3900, BATCH_ROWS):  # a generation of the pool begins with a batch
        window = others[first : first + 3900]
        assert first % 3900 or len(window.unique()) == 3900
    assert torch.equal(next(stream.batches(7)), torch.cat([b[:, None] for b in batches[7:8]]))
    once = RowStream(
        RowFile(tmp_path / "a.npy"),
        TrainConfig(heldout_queries=32, heldout_keys=256, keys=256, max_steps=8, seed=1),
    )
    assert sum(len(batch) for batch in once.batches()) == 5000
    assert not torch.equal(next(once.batches()), next(stream.batches()))


def test_a_run_from_rows(file, tmp_path, ndm):
    done = ndm("train", "--rows", file, "--out", tmp_path / "run", *FLAGS, "--repeat-data", "--quiet")
    assert done.code == 0, done.err
    assert f"{file}, 64 steps" in done.out
    partition = SubspacePartition.from_pretrained(tmp_path / "run" / "partition")
    assert partition.width == WIDTH
    assert partition.source == {"rows": str(file)}
    again = ndm("train", "--rows", file, "--out", tmp_path / "again", *FLAGS, "--repeat-data", "--quiet")
    assert again.code == 0
    other = SubspacePartition.from_pretrained(tmp_path / "again" / "partition")
    assert torch.equal(partition.rotation, other.rotation)


def test_the_report_has_what_needs_no_tokens_and_says_so(file, tmp_path, ndm):
    run = tmp_path / "run"
    merging = ["--merge-start", "32", "--merge-interval", "16", "--merge-threshold", "-1"]
    assert ndm("train", "--rows", file, "--out", run, *FLAGS, *merging, "--repeat-data", "--quiet").code == 0
    told = ndm("report", run)
    assert told.code == 0, told.err
    assert (
        told.out.splitlines()[1]
        == "left out, as plain rows belong to no tokens: readings, galleries, positions"
    )
    assert [path.name for path in (run / "report").iterdir()] == ["index.html"]
    page = (run / "report" / "index.html").read_text()
    result = json.loads((run / "result.json").read_text())
    assert page.count('<th class="left" scope="row">subspace ') == len(result["widths"])
    for name in ("loss", "mutual_information", "merge_tree"):
        assert f'id="{name}"' in page
    assert "subspaces of rows.npy" in page
    assert str(tmp_path) not in page
    assert ndm("report", run, "--figures-only").code == 0


def test_what_compares_tokens_is_refused_in_one_line(file, tmp_path, ndm):
    run = tmp_path / "run"
    assert ndm("train", "--rows", file, "--out", run, *FLAGS, "--repeat-data", "--quiet").code == 0
    for command in (["evaluate", "purity", run], ["index", run], ["explore", run]):
        assert "which belong to no tokens" in ndm(*command).refusal()
    assert "no model given" in ndm("evaluate", "mi", run).refusal()
    assert "leave --rows away" in ndm("plan", "--rows", file).refusal()


def test_too_few_rows_are_said_before_training_with_what_helps(file, tmp_path, ndm):
    command = ("train", "--rows", file, "--out", tmp_path / "run", "--quiet")
    said = ndm(*command, "--unit-size", "4").refusal()
    assert "has 1,500 rows: 18,432 are held out and 18,432 needed beside them" in said
    said = ndm(*command, *FLAGS, "--pool-rows", "9000", "--max-steps", "2000").refusal()
    assert said.endswith("1,212 are left for a pool of 9,000, pass --pool-rows 1212 --repeat-data")
    said = ndm(*command, *FLAGS).refusal()
    assert "pass --repeat-data to use them again, or lower --max-steps" in said
    assert ndm(*command, *FLAGS, "--max-steps", "8").code == 0  # fewer than a pool


def test_a_file_alone(file, tmp_path, ndm):
    command = ("train", "--rows", file, "--out", tmp_path / "run", *FLAGS, "--repeat-data", "--quiet")
    for name, value in {"model": "gpt2", "site": "x1.post", "data": "docstrings", "acts": "acts"}.items():
        if name != "acts":
            assert ndm(*command, f"--{name}", value).refusal() == (
                f"--rows trains from a file alone: leave --{name} away, or --rows"
            )
    assert "--acts" in ndm(*command, "--acts", tmp_path).refusal()
    assert not (tmp_path / "run").exists()
    preset = ndm(
        *command, "--preset", "small", "--max-steps", "16", "--search-every", "4"
    )  # of text says nothing
    assert preset.code == 0, preset.err


def test_a_killed_run_goes_on_to_the_same_end_and_another_file_is_refused(file, rows, tmp_path, driver, ndm):
    command = ["train", "--rows", str(file), *FLAGS, "--max-steps", "400", "--repeat-data", "--quiet"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    driver.start([*command, "--out", str(whole)], 1)
    assert driver.wait()[0] == 0
    process = driver.start([*command, "--out", str(cut)], 1)
    wait_for((cut / "checkpoint.safetensors").exists)
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
    assert driver.wait()[0] == -signal.SIGKILL
    changed = rows.copy()
    changed[N - 1] += 1
    np.save(file, changed)
    resume = ("train", "--out", cut, "--resume", "--quiet")
    assert "has changed since the run in" in ndm(*resume).refusal()
    np.save(file, rows)
    assert ndm(*resume).code == 0
    for name in ("partition/partition.safetensors", "result.json"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
