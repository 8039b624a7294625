"""What is done with a run that was trained from a cache, without its model."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ndm_fast.evaluate.purity.purity import SHARES
from ndm_fast.files import write_json

pytestmark = pytest.mark.usefixtures("one_thread")

SITE = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory,
    harvest_flags: Callable[..., list[str]],
    train_flags: Callable[..., list[str]],
    one_thread: None,
) -> Path:
    """Folder of a cache, ``acts``, and a run that was trained from it, ``run``; not to be changed."""
    from ndm_fast.cli.main import main

    folder = tmp_path_factory.mktemp("cached")
    assert main(harvest_flags(folder / "acts")) == 0
    flags = {"acts": folder / "acts", "model": None, "data": None, "site": "x1.post", "max_steps": 4}
    assert main(train_flags(folder / "run", **flags)) == 0
    return folder


@pytest.fixture
def cached(whole: Path, tmp_path: Path) -> Path:
    """A copy of both, whose cache may be changed."""
    folder = Path(shutil.copytree(whole, tmp_path / "cached"))
    config = json.loads((folder / "run" / "config.json").read_text())
    config["settings"]["acts"] = str(folder / "acts")
    write_json(folder / "run" / "config.json", config, seal=True)
    return folder


def test_purity_is_read_from_the_cache(ndm, cached, passes):
    """The same as from the model; where the cache is gone, the model is run, and that is said."""
    command = ("evaluate", "purity", cached / "run", "--json", "--baseline", "pca", "--top", "3")
    read = ndm(*command)
    assert read.code == 0
    assert not passes
    (cached / "acts").rename(cached / "away")
    made = ndm(*command)
    assert passes
    assert f"{cached / 'acts'} is gone: the model is run instead" in made.err
    assert made.out == read.out


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_purity_of_rows_in_half_precision(ndm, train_flags, harvest_flags, tmp_path, dtype):
    """Rounding the rows changes few neighbors."""
    assert ndm(*harvest_flags(tmp_path / "acts", store_dtype=dtype)).code == 0
    flags = {"acts": tmp_path / "acts", "model": None, "data": None, "site": "m1", "max_steps": 4}
    assert ndm(*train_flags(tmp_path / "run", **flags, heldout_queries=256)).code == 0
    command = ("evaluate", "purity", tmp_path / "run", "--json", "--top", "2")
    rounded = json.loads(ndm(*command).out)["ndm"]
    (tmp_path / "acts").rename(tmp_path / "away")
    exact = json.loads(ndm(*command).out)["ndm"]
    for ours, theirs in zip(rounded, exact, strict=True):
        for share in SHARES:
            assert ours[share] == pytest.approx(theirs[share], abs=0.03)


def test_a_damaged_cache_is_refused(ndm, cached):
    shard = cached / "acts" / SITE / "rows-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    assert f"{shard} is damaged" in ndm("evaluate", "purity", cached / "run").refusal()


def test_another_cache_in_its_place_is_refused(ndm, cached, harvest_flags):
    shutil.rmtree(cached / "acts")
    assert ndm(*harvest_flags(cached / "acts", context_length=16)).code == 0
    said = ndm("evaluate", "purity", cached / "run").refusal()
    assert re.search("acts was harvested anew .context_length is 16, for the run it was 32.: move it", said)


@pytest.mark.parametrize("changes", [{}, {"bos": True}, {"max_norm_ratio": 1.2}])
def test_an_index_is_made_from_the_cache(ndm, train_flags, harvest_flags, tmp_path, files, passes, changes):
    """The same bytes as from the model: special tokens and outliers are not in the cache, but in the text."""
    assert ndm(*harvest_flags(tmp_path / "acts", **changes)).code == 0
    flags = {"acts": tmp_path / "acts", "model": None, "data": None, "site": "m1", "max_steps": 4}
    assert ndm(*train_flags(tmp_path / "run", **flags)).code == 0
    passes.clear()
    command = ("index", tmp_path / "run", "--rows", "1000")
    assert ndm(*command).code == 0
    assert not passes
    read = files(tmp_path / "run" / "preimages")
    (tmp_path / "acts").rename(tmp_path / "away")
    made = ndm(*command)
    assert passes
    assert f"{tmp_path / 'acts'} is gone: the model is run instead" in made.err
    assert files(tmp_path / "run" / "preimages") == read


def test_a_cache_that_is_too_small_for_an_index(ndm, train_flags, harvest_flags, cached, passes):
    """It is used only where the text has no more."""
    said = ndm("index", cached / "run", "--rows", "4000")
    assert re.search(r"acts holds 3,\d+ activations of 4,000: the model is run instead", said.err)
    assert passes
    assert "4000 activations in" in said.out
    shutil.rmtree(cached / "acts")
    assert ndm(*harvest_flags(cached / "acts", rows=100_000)).code == 0
    passes.clear()
    assert ndm("index", cached / "run", "--rows", "50000").code == 0
    assert not passes


@pytest.mark.parametrize("changed", [slice(3, 4), slice(30, None)])
def test_an_index_needs_the_text_of_the_cache(ndm, train_flags, harvest_flags, corpus, tmp_path, changed):
    """Not one where a file is another, and not one that ends early."""
    data = Path(shutil.copytree(corpus, tmp_path / "text"))
    assert ndm(*harvest_flags(tmp_path / "acts", data=data)).code == 0
    flags = {"acts": tmp_path / "acts", "model": None, "data": None, "site": "m1", "max_steps": 4}
    assert ndm(*train_flags(tmp_path / "run", **flags)).code == 0
    for file in sorted(data.iterdir())[changed]:
        file.write_text("cat")
    said = ndm("index", tmp_path / "run", "--rows", "3000").refusal()
    assert f"the text {data} has changed since {tmp_path / 'acts'} was harvested: bring it back" in said
    assert not (tmp_path / "run" / "preimages").exists()


def test_the_table_of_a_run_from_a_cache_names_the_model(ndm, whole, tiny_model):
    """Which the settings of the command do not."""
    outcome = ndm("train", "--out", whole / "run", "--resume", "--acts", whole / "acts")
    assert outcome.code == 0
    assert f"{tiny_model} {SITE}, 4 steps" in outcome.out
