"""What is done with a run that was trained from a cache, without its model."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ndm_fast.evaluate.purity import SHARES

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
    from ndm_fast.cli import main

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
    (folder / "run" / "config.json").write_text(json.dumps(config))
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
    """Rounding the rows changes few neighbours."""
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
