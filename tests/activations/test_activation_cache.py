"""Activations on disk: what the model gives, whatever happened on the way, and training from them."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import signal
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from ndm_fast.activations import cache_folder, cache_writer
from ndm_fast.activations.cache import ActivationCache, held_rows, read_manifest
from ndm_fast.activations.documents import open_documents
from ndm_fast.activations.rows import TensorStream
from ndm_fast.activations.stream import ActivationStream, Harvester
from ndm_fast.config import HarvestConfig, TrainConfig
from ndm_fast.errors import InputError
from ndm_fast.files import sealed, write_atomic, write_json
from ndm_fast.run.source import rows_drawn
from ndm_fast.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

SITES = ["blocks.0.hook_resid_mid", "blocks.1.hook_mlp_out", "blocks.1.hook_resid_post"]
LENGTH, ROWS = 32, 4
DISK = namedtuple("DISK", "total used free")


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, harvest_flags: Callable[..., list[str]], one_thread: None
) -> Path:
    """A harvest that nothing happened to; not to be changed."""
    from ndm_fast.cli.main import main

    out = tmp_path_factory.mktemp("harvest") / "acts"
    assert main(harvest_flags(out)) == 0
    return out


@pytest.fixture
def stream_of(loaded: tuple[Any, Any], corpus: Path) -> Callable[..., ActivationStream]:
    """The same activations from the model."""

    def make(site: str, **changes: Any) -> ActivationStream:
        config = HarvestConfig(context_length=LENGTH, rows_per_batch=ROWS, **changes)
        return ActivationStream(*loaded, site, open_documents(str(corpus)), config)

    return make


def run_folder(path: Path) -> dict[str, Any]:
    """What must be equal between runs that differ only in where their activations came from."""
    log = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
    return {
        "partition": (path / "partition/partition.safetensors").read_bytes(),
        "result": json.loads((path / "result.json").read_text()),
        "log": [{name: value for name, value in record.items() if name != "time"} for record in log],
    }


# What a cache holds


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("start", [0, 3, 4, 23])
def test_a_cache_gives_the_batches_of_the_model(whole, stream_of, site, start):
    cached = list(ActivationCache(whole).stream(site).token_rows(start))
    direct = list(islice(stream_of(site).token_rows(start), len(cached)))
    assert len(cached) == 24 - start
    for ours, theirs in zip(cached, direct, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_cache_knows_what_it_holds(whole, tiny_model):
    cache = ActivationCache(whole)
    manifest = json.loads((whole / "manifest.json").read_text())
    assert cache.sites == SITES
    assert (cache.config.model, cache.config.site) == (str(tiny_model), tuple(SITES))
    assert cache.config.text_seed == 0
    assert [cache.stream(alias).site for alias in ("x0.mid", "m1", "x1.post")] == SITES
    assert manifest["dtype"] == "float32"
    assert manifest["made_with"]["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert sorted(path.name for path in (whole / SITES[0]).iterdir()) == [
        f"rows-{n:05}.safetensors" for n in range(6)
    ]
    with pytest.raises(InputError, match=r"no activations of 'x1.mid': take one of blocks.0.hook_resid_mid"):
        cache.stream("x1.mid")


def test_a_cache_is_read_over_and_over_where_asked(whole):
    once = list(ActivationCache(whole).stream("m1").batches())
    again = ActivationCache(whole).stream("m1", repeat=True)
    assert all(
        torch.equal(a, b) for a, b in zip(islice(again.batches(20), 40), (once * 3)[20:], strict=False)
    )
    assert torch.equal(next(again.batches(24 * 5 + 2)), once[2])


def test_one_pass_gives_all_sites(ndm, harvest_flags, tmp_path, passes):
    assert ndm(*harvest_flags(tmp_path / "one", site=SITES[:1])).code == 0
    single, passes[:] = len(passes), []
    assert ndm(*harvest_flags(tmp_path / "three")).code == 0
    assert len(passes) == single == 24


def test_outliers_are_dropped_for_each_site_alone(ndm, harvest_flags, tmp_path, stream_of):
    assert ndm(*harvest_flags(tmp_path / "acts", max_norm_ratio=1.2)).code == 0
    cache = ActivationCache(tmp_path / "acts")
    dropped = []
    for site in SITES:
        cached, direct = cache.stream(site), stream_of(site, max_norm_ratio=1.2)
        for ours, theirs in zip(cached.token_rows(), direct.token_rows(), strict=False):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        dropped.append(cached.outliers_dropped)
    assert len(set(dropped)) == 3
    assert min(dropped) > 0


@pytest.mark.parametrize(("dtype", "error"), [("float16", 2**-11), ("bfloat16", 2**-8)])
def test_rows_may_be_stored_in_half_precision(ndm, harvest_flags, tmp_path, stream_of, dtype, error):
    assert ndm(*harvest_flags(tmp_path / "acts", store_dtype=dtype)).code == 0
    cached = torch.cat(list(ActivationCache(tmp_path / "acts").stream("x1.post").batches()))
    direct = torch.cat(list(islice(stream_of("x1.post").batches(), 24)))
    torch.testing.assert_close(cached.float(), direct, rtol=error, atol=1e-7)
    assert not torch.equal(cached.float(), direct)


def test_half_precision_is_scaled_and_its_overflow_refused(loaded, corpus, tmp_path, monkeypatch):
    """The first rows set the scale; later ones that are far larger name the remedy."""
    config = HarvestConfig(context_length=LENGTH, rows_per_batch=ROWS)
    found = Harvester._found
    factors = [1e5] * 3

    def larger(self: Harvester, *arguments: Any) -> Any:
        one = found(self, *arguments)
        return one._replace(rows=one.rows._replace(activations=one.rows.activations * factors.pop()))

    monkeypatch.setattr(Harvester, "_found", larger)
    harvester = Harvester(*loaded, ["x1.post"], open_documents(str(corpus)), config)
    cache = cache_writer.harvest_cache(harvester, config, tmp_path / "a", 300, store_dtype="float16")
    scale = cache.manifest["sites"]["blocks.1.hook_resid_post"]["scale"]
    assert scale < 1
    assert torch.tensor(scale).log2().frac() == 0
    assert max(float(rows.abs().max()) for rows in cache.stream("x1.post").batches()) > 65504
    factors[:] = [1e12, 1e12, 1e5]
    with pytest.raises(InputError, match=r"at blocks.1.hook_resid_post overflows.*--store-dtype bfloat16"):
        cache_writer.harvest_cache(harvester, config, tmp_path / "b", 300, store_dtype="float16")


def test_text_that_ends_early_is_said(ndm, harvest_flags, tmp_path):
    outcome = ndm(*harvest_flags(tmp_path / "acts", rows=10**6))
    assert outcome.code == 0
    assert "; the text ended before 1,000,000" in outcome.out
    assert 4000 < sum(len(rows) for rows in ActivationCache(tmp_path / "acts").stream("m1").batches()) < 10**6


# What may happen on the way


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(n, marks=pytest.mark.slow) for n in range(2, 12))])
def test_killed_harvests_end_with_the_same_bytes(driver, harvest_flags, tmp_path, whole, files, seed):
    chance = random.Random(time.time_ns() + seed)
    out = tmp_path / "acts"
    watched = [
        SITES[chance.randrange(3)] + f"/rows-{n:05}.safetensors" for n in sorted(chance.sample(range(6), 2))
    ]
    saved = []
    for number, name in enumerate(["manifest.json", *watched]):
        again = ["harvest", "--quiet", "--out", str(out), "--resume"]
        process = driver.start(again if number and saved[-1] else [*harvest_flags(out), "--resume"], 1)
        driver.kill_after(process, out / name, chance.uniform(0, 0.02))
        code, output = driver.wait()
        assert code in (-signal.SIGKILL, 0), output
        saved.append(len(read_manifest(out)["shards"]) if (out / "manifest.json").exists() else 0)
    assert saved == sorted(saved)
    driver.start([*harvest_flags(out), "--resume"], 1)
    assert driver.wait()[0] == 0
    assert files(out) == files(whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_harvests_go_on(ndm, harvest_flags, tmp_path, whole, files, monkeypatch, number):
    out, write = tmp_path / "acts", write_atomic
    command, stops = harvest_flags(out), 0

    def write_and_signal(path: Path, content: bytes) -> None:
        write(path, content)
        if path.parent.name == SITES[0]:
            os.kill(os.getpid(), number)

    handler = signal.getsignal(number)
    monkeypatch.setattr(cache_writer, "write_atomic", write_and_signal)
    while (outcome := ndm(*command)).code:
        assert outcome.code == 130
        said = re.search(r"stopped with (\d+) of 3000 rows saved: go on with `ndm-fast (.*)`", outcome.err)
        assert said
        command = [*said[2].split(), "--quiet"]
        stops += 1
    assert stops == 5
    assert signal.getsignal(number) == handler
    assert files(out) == files(whole)


@pytest.mark.parametrize("writes", [1, 2, 4, 9])
def test_a_full_disk_loses_nothing(ndm, harvest_flags, tmp_path, whole, files, monkeypatch, writes):
    """At the first manifest, a first shard, another site's, and a later one."""
    out, replace, done = tmp_path / "acts", os.replace, []

    def fail(*arguments: Any) -> None:
        done.append(1)
        if len(done) >= writes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        said = ndm(*harvest_flags(out)).refusal()
    assert re.search(r"no space left for .*: free some and go on with --resume", said)
    assert not list(out.glob("**/.*.tmp"))
    assert ndm(*harvest_flags(out), "--resume").code == 0
    assert files(out) == files(whole)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    ndm, harvest_flags, tmp_path, monkeypatch
):
    monkeypatch.setattr(cache_folder.shutil, "disk_usage", lambda _: DISK(0, 0, 1_000_000))
    said = ndm(*harvest_flags(tmp_path / "acts")).refusal()
    assert re.search(r"3000 rows of 3 site\(s\) take 0.00 GiB, and .* lower --rows, set --store-dtype", said)
    assert not (tmp_path / "acts").exists()
    assert ndm(*harvest_flags(tmp_path / "acts", store_dtype="bfloat16")).code == 0


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (flip, "its checksum does not match"),
        (cut, r"\d+ bytes instead of \d+"),
        (Path.unlink, "missing"),
    ],
)
@pytest.mark.parametrize("number", [0, 5])
def test_damaged_shards_are_named_and_mended(
    ndm, train_flags, tmp_path, whole, files, capfd, damage, says, number
):
    out = shutil.copytree(whole, tmp_path / "acts")
    shard = out / SITES[2] / f"rows-{number:05}.safetensors"
    damage(shard)
    asked = train_flags(tmp_path / "run", acts=out, model=None, data=None, site="x1.post", max_steps=100)
    said = ndm(*asked).refusal()
    assert re.search(
        f"the shard {shard} is damaged \\({says}\\): `ndm-fast harvest --out {out} --resume`", said
    )
    outcome = ndm("harvest", "--quiet", "--out", out, "--resume")
    assert outcome.code == 0
    assert f"the shard {shard} is damaged" in outcome.err
    assert files(out) == files(whole)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"format": 1', "manifest.json is damaged .*delete .* and harvest anew"),
        ('{"format": 1, "complete": true, "shards": [{}], "sites": {"a": {}}}', "manifest.json is damaged"),
        ("[]", "manifest.json is damaged"),
        (json.dumps(sealed({"format": 9})), "have format 9, not 1: harvest them anew"),
    ],
)
def test_damaged_manifests_are_refused(ndm, train_flags, tmp_path, whole, files, content, says):
    out = shutil.copytree(whole, tmp_path / "acts")
    (out / "manifest.json").write_text(content)
    before = files(out)
    assert re.search(says, ndm(*train_flags(tmp_path / "run", acts=out, site=None)).refusal())
    assert re.search(says, ndm("harvest", "--out", out, "--resume").refusal())
    assert files(out) == before


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("text", ["a red cat. ", ""])
def test_a_text_that_has_changed_is_noticed(ndm, tmp_path, harvest_flags, corpus, monkeypatch, damaged, text):
    """Where a harvest goes on, and where a shard is mended."""
    data, out = shutil.copytree(corpus, tmp_path / "text"), tmp_path / "acts"
    write = write_atomic

    def write_and_stop(path: Path, content: bytes) -> None:
        write(path, content)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(cache_writer, "write_atomic", write_and_stop)
        assert ndm(*harvest_flags(out, data=data)).code == 130
    if damaged:
        flip(out / SITES[0] / "rows-00000.safetensors")
    for path in data.iterdir():
        path.write_text(text * 5)
    said = ndm("harvest", "--quiet", "--out", out, "--resume")
    assert said.code == 2
    assert (
        f"the text {data} has changed since {out} was begun: harvest it anew into another folder" in said.err
    )


@pytest.mark.parametrize(
    ("changes", "resume", "says"),
    [
        ({}, False, "holds activations already: pass --resume"),
        ({"rows": 3001}, True, "holds a harvest of 3000 rows, asked for 3001"),
        ({"site": ["m1"]}, True, "holds another harvest .site is"),
        ({"context_length": 16}, True, "context_length is 32, asked for 16"),
        ({"store_dtype": "float16"}, True, "dtype is 'float32', asked for 'float16'"),
    ],
)
def test_another_harvest_is_left_alone(ndm, harvest_flags, whole, files, changes, resume, says):
    before = files(whole)
    said = ndm(*harvest_flags(whole, **changes), *["--resume"] * resume).refusal()
    assert re.search(says, said)
    assert "another --out" in said
    assert files(whole) == before


def test_other_things_are_left_alone(ndm, harvest_flags, train_flags, tmp_path, files):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    before = files(tmp_path)
    for resume in ([], ["--resume"]):
        said = ndm(*harvest_flags(tmp_path / "out"), *resume).refusal()
        assert "exists and holds no activations: choose another --out" in said
    said = ndm(*train_flags(tmp_path / "run", acts=tmp_path / "out", site=None)).refusal()
    assert "holds no activations (it has no manifest.json): make them with `ndm-fast harvest`" in said
    assert files(tmp_path) == before


def test_a_harvest_that_saved_nothing_does_not_hold_its_folder(ndm, harvest_flags, tmp_path, whole, files):
    (tmp_path / "empty.txt").write_text("cat")
    said = ndm(*harvest_flags(tmp_path / "acts", data=tmp_path / "empty.txt", site=["x1.mid"])).refusal()
    assert "the text gave no activations" in said
    assert ndm(*harvest_flags(tmp_path / "acts")).code == 0
    assert files(tmp_path / "acts") == files(whole)


def test_unfinished_harvests_are_not_trained_on(ndm, train_flags, tmp_path, whole):
    out = shutil.copytree(whole, tmp_path / "acts")
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["shards"].pop()
    write_json(out / "manifest.json", {**manifest, "complete": False}, seal=True)
    said = ndm(*train_flags(tmp_path / "run", acts=out, model=None, data=None)).refusal()
    assert re.search(r"is not finished \(\d+ of 3000 rows\): `ndm-fast harvest --out .* --resume`", said)


# Training from a cache


@pytest.mark.parametrize(
    "changes",
    [
        {"merging": True},
        {"merging": True, "rotation": "exp", "search_every": 1, "max_steps": 52},
        {"pool_dtype": "bfloat16"},
    ],
)
def test_training_from_a_cache_is_training_from_the_model(ndm, train_flags, tmp_path, whole, changes):
    """With three generations of the pool, escapes and merges."""
    changes = {"site": "x1.post", **changes}
    assert ndm(*train_flags(tmp_path / "model", **changes)).code == 0
    assert ndm(*train_flags(tmp_path / "cache", acts=whole, model=None, data=None, **changes)).code == 0
    assert run_folder(tmp_path / "cache") == run_folder(tmp_path / "model")
    settings = [
        json.loads((tmp_path / n / "config.json").read_text())["settings"] for n in ("model", "cache")
    ]
    assert {n for n in settings[0] if settings[0][n] != settings[1][n]} == {"acts", "text_seed"}


def test_runs_from_a_cache_resume(ndm, train_flags, tmp_path, whole, monkeypatch):
    from ndm_fast.run import checkpoint, recorder

    save, saved = checkpoint.save_checkpoint, []

    def save_and_stop(*arguments: Any) -> None:
        save(*arguments)
        saved.append(1)
        os.kill(os.getpid(), signal.SIGTERM)

    flags = {"acts": whole, "model": None, "data": None, "site": "m1", "merging": True}
    assert ndm(*train_flags(tmp_path / "whole", **flags)).code == 0
    with monkeypatch.context() as patch:
        patch.setattr(recorder, "save_checkpoint", save_and_stop)
        command = train_flags(tmp_path / "run", **flags)
        while (outcome := ndm(*command)).code == 130:
            command = ["train", "--quiet", "--out", str(tmp_path / "run"), "--resume"]
    assert outcome.code == 0
    assert len(saved) > 5
    assert run_folder(tmp_path / "run") == run_folder(tmp_path / "whole")


def test_all_sites_of_a_cache_are_trained_without_the_model(ndm, train_flags, tmp_path, whole, passes):
    outcome = ndm(*train_flags(tmp_path / "run", acts=whole, model=None, data=None, site=None, max_steps=8))
    assert outcome.code == 0
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == SITES
    assert not passes


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"context_length": 16}, "was harvested with context_length 32, not 16: leave --context-length away"),
        ({"model": "other"}, "was harvested with model .*, not 'other'"),
        ({"site": "x1.mid"}, "holds no activations of 'x1.mid'"),
        ({"max_steps": 500}, r"ended after \d+ activations.*with --acts: harvest more --rows"),
    ],
)
def test_settings_that_the_cache_was_not_made_with_are_refused(
    ndm, train_flags, tmp_path, whole, changes, says
):
    flags = {"acts": whole, "model": None, "data": None, "site": "m1", **changes}
    assert re.search(says, ndm(*train_flags(tmp_path / "run", **flags)).refusal())


def test_a_preset_gives_a_run_from_a_cache_no_model(ndm, tmp_path, whole, train_flags):
    flags = train_flags(tmp_path / "run", acts=whole, model=None, data=None, site="m1", max_steps=4)
    assert ndm(*flags, "--preset", "qwen2.5-1.5b", "--eval-every", "4").code == 0


# Several sites


def test_several_sites_are_harvested_once_and_trained_as_one_by_one(ndm, train_flags, tmp_path, passes):
    for site in SITES:
        assert ndm(*train_flags(tmp_path / "single" / site, site=site, merging=True)).code == 0
    one_by_one, passes[:] = len(passes), []
    assert ndm(*train_flags(tmp_path / "together", site=SITES, merging=True)).code == 0
    assert len(passes) <= one_by_one / 2
    assert sorted(path.name for path in (tmp_path / "together").iterdir()) == SITES
    for site in SITES:
        assert run_folder(tmp_path / "together" / site) == run_folder(tmp_path / "single" / site)


def test_several_sites_are_shown_as_one(ndm, train_flags, tmp_path):
    command = [
        word for word in train_flags(tmp_path / "run", site=SITES[:2], max_steps=8) if word != "--quiet"
    ]
    shown = ndm(*command).err
    assert "GiB will be written to" in shown
    assert "pool: 384 rows x 32 x float32 = 0.00 GiB on cpu" in shown
    assert re.search(rf"site 1 of 2, {SITES[0]}: +\d+%.*/16 ", shown)
    assert re.search(rf"site 2 of 2, {SITES[1]}: 100%.* 16/16 ", shown)


def test_what_several_sites_share_can_be_kept(ndm, train_flags, tmp_path, passes):
    flags = {"site": SITES[:2], "max_steps": 8}
    assert ndm(*train_flags(tmp_path / "run", **flags), "--keep-activations").code == 0
    acts, passes[:] = tmp_path / "run" / "activations", []
    again = train_flags(tmp_path / "again", acts=acts, model=None, data=None, **flags)
    assert ndm(*again).code == 0
    assert not passes
    for site in SITES[:2]:
        assert run_folder(tmp_path / "again" / site) == run_folder(tmp_path / "run" / site)


@pytest.mark.parametrize("keep", [False, True])
def test_what_was_shared_goes_with_the_last_site_even_after_a_kill(
    ndm, train_flags, tmp_path, monkeypatch, keep
):
    """Killed after the last site, before the activations were deleted; what was to be kept stays."""
    command = [*train_flags(tmp_path / "run", site=SITES[:2], max_steps=8)]
    with monkeypatch.context() as killed:
        killed.setattr("ndm_fast.run.train._end_sharing", lambda *_: None)
        assert ndm(*command, *(["--keep-activations"] if keep else [])).code == 0
    assert (tmp_path / "run" / "activations").exists()
    assert ndm(*command, "--resume").code == 0
    left = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert left == (["activations", *SITES[:2]] if keep else SITES[:2])


def test_several_sites_stopped_while_harvesting_go_on(ndm, train_flags, tmp_path, monkeypatch):
    found, asked = Harvester._found, []

    def stop(self: Harvester, *arguments: Any) -> Any:
        asked.append(1)
        if len(asked) == 12:
            os.kill(os.getpid(), signal.SIGINT)
        return found(self, *arguments)

    monkeypatch.setattr(Harvester, "_found", stop)
    command = train_flags(tmp_path / "run", site=SITES[:2], max_steps=8)
    stopped = ndm(*command)
    assert stopped.code == 130
    assert "go on with the same command and --resume" in stopped.err
    assert ndm(*command, "--resume").code == 0
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == SITES[:2]


def test_several_sites_do_without_where_the_disk_is_full(ndm, train_flags, tmp_path, monkeypatch, passes):
    flags = {"site": SITES[:2], "max_steps": 8}
    assert ndm(*train_flags(tmp_path / "shared", **flags)).code == 0
    shared, passes[:] = len(passes), []
    monkeypatch.setattr(cache_folder.shutil, "disk_usage", lambda _: DISK(0, 0, 1000))
    outcome = ndm(*train_flags(tmp_path / "run", **flags))
    assert outcome.code == 0
    assert "the model is run for every site instead" in outcome.err
    assert len(passes) > shared
    for site in SITES[:2]:
        assert run_folder(tmp_path / "run" / site) == run_folder(tmp_path / "shared" / site)


@pytest.mark.parametrize("seed", range(6))
def test_training_draws_no_more_rows_than_are_harvested(seed):
    chance = random.Random(seed)
    largest = chance.randint(1, 40)
    queries, search_every = chance.randint(1, 9), chance.randint(1, 4)
    keys = chance.randint(20, 60)
    config = TrainConfig(
        unit_size=4,
        queries=queries,
        search_every=search_every,
        keys=keys,
        pool_rows=keys + queries * search_every * chance.randint(4, 9),
        max_steps=chance.randint(1, 60),
        heldout_queries=8,
        heldout_keys=24,
    )
    rows = rows_drawn(config, largest)
    drawn: list[int] = []

    class Counted(TensorStream):
        def batches(self, start: int = 0) -> Iterator[torch.Tensor]:
            for number, batch in enumerate(super().batches(start), start):
                drawn.append(number)
                yield batch

    # The harvest ends with the batch in which it has all its rows.
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randn(largest, 8, generator=generator) for _ in range(-(-rows // largest))]
    trainer = Trainer(Counted(batches), config)
    trainer.run()
    assert trainer.step == config.max_steps
    assert max(drawn) > 0.4 * len(batches)


# A harvest that ends earlier than was planned


@pytest.fixture
def stopped(whole: Path, tmp_path: Path) -> Path:
    """A copy without its last two shards, as Ctrl-C leaves it."""
    out = Path(shutil.copytree(whole, tmp_path / "stopped"))
    manifest = json.loads((out / "manifest.json").read_text())
    for shard in manifest["shards"][-2:]:
        for name in shard:
            (out / name).unlink()
    manifest["shards"] = manifest["shards"][:-2]
    write_json(out / "manifest.json", {**manifest, "complete": False}, seal=True)
    return out


def test_a_stopped_harvest_ends_at_fewer_rows(ndm, train_flags, tmp_path, stopped, passes):
    held = rows_of(stopped)
    assert held < 3000
    said = ndm("harvest", "--quiet", "--out", stopped, "--resume", "--rows", 3001).refusal()
    assert "holds a harvest of 3000 rows, asked for 3001: ask for as many or fewer" in said
    passes.clear()
    outcome = ndm("harvest", "--quiet", "--out", stopped, "--resume", "--rows", held)
    assert outcome.code == 0
    assert not passes, "what is there is enough"
    assert f"{held:,} activations each" in outcome.out
    assert (
        ndm(
            *train_flags(tmp_path / "run", acts=stopped, model=None, data=None, site="x1.post", max_steps=8)
        ).code
        == 0
    )


def test_a_stopped_harvest_goes_on_to_fewer_rows(ndm, stopped, whole):
    held = rows_of(stopped)
    assert ndm("harvest", "--quiet", "--out", stopped, "--resume", "--rows", held + 1).code == 0
    cache = ActivationCache(stopped)
    assert cache.manifest["rows"] == held + 1
    for site in cache.sites:
        ours, theirs = cache.stream(site).batches(), ActivationCache(whole).stream(site).batches()
        assert sum(torch.equal(a, b) for a, b in zip(ours, theirs, strict=False)) == 17


def test_a_stopped_harvest_is_trained_on_as_it_is_when_asked(ndm, train_flags, tmp_path, stopped):
    flags = train_flags(tmp_path / "run", acts=stopped, model=None, data=None, site="x1.post", max_steps=8)
    said = ndm(*flags).refusal()
    assert f"is not finished ({rows_of(stopped)} of 3000 rows)" in said
    assert "--partial trains on the rows there are" in said
    assert ndm(*flags, "--partial").code == 0
    assert ndm("evaluate", "purity", tmp_path / "run").code == 0


def rows_of(folder: Path) -> int:
    return held_rows(read_manifest(folder))
