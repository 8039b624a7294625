"""The command line: every setting a flag, layers in their order, and one line for bad input."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from ndm_fast.activations import stream
from ndm_fast.cli import main
from ndm_fast.config import GROUPS, RunConfig
from ndm_fast.fields import meanings
from ndm_fast.version import __version__

pytestmark = pytest.mark.usefixtures("one_thread")

FIELDS = [field for cls in GROUPS.values() for field in dataclasses.fields(cls)]

# A value for every setting that is neither its default nor out of range.
OTHER: dict[str, Any] = {
    "model": "m",
    "revision": "v2",
    "trust_remote_code": True,
    "objective": "log",
    "site": ["x0.post", "m1"],
    "data": "d",
    "text_field": "body",
    "text_seed": 8,
    "context_length": 77,
    "rows_per_batch": 3,
    "dtype": "bfloat16",
    "autocast": "bfloat16",
    "compile_model": True,
    "cuda_graph": "on",
    "encoding": "cp1252",
    "bad_text": "skip",
    "split_documents": "lines",
    "chat_template": True,
    "bos": True,
    "repeat_data": True,
    "max_norm_ratio": 7.5,
    "unit_size": 8,
    "initial_widths": [16, 8],
    "metric": "cosine",
    "rotation": "lazy",
    "start": "pca",
    "queries": 5,
    "keys": 500,
    "search_every": 2,
    "search_ahead": 0.5,
    "max_steps": 9,
    "lr": 0.5,
    "pace": "ratio",
    "betas": [0.5, 0.6],
    "grad_clip": 2.5,
    "schedule": "constant",
    "warmup_steps": 0,
    "pool_rows": 40000,
    "pool_dtype": "float16",
    "heldout_queries": 11,
    "heldout_keys": 12,
    "precision": "bf16",
    "escape_tries": 1,
    "escape_steps": 2,
    "parallel": "keys",
    "log_every": 3,
    "eval_every": 4,
    "checkpoint_every": 6,
    "seed": 13,
    "acts": "a",
    "rows": "r.npy",
    "partial": True,
    "merge_threshold": -0.5,
    "merge_start": 14,
    "merge_interval": 15,
    "merge_lr": 0.004,
    "target_subspaces": 2,
    "mi_queries": 16,
    "mi_keys": 17,
}


@pytest.fixture
def asked(ndm, monkeypatch, tmp_path):
    """The configuration that ``ndm-fast train`` would run with these arguments."""
    seen: list[RunConfig] = []
    monkeypatch.setattr("ndm_fast.run.train.train_run", lambda config, *_, **__: seen.append(config) or [])

    def read(*arguments: object) -> dict[str, Any]:
        outcome = ndm("train", "--out", tmp_path / "out", *arguments)
        assert outcome.code == 0, outcome
        return seen[-1].flat()

    return read


def test_every_setting_is_a_flag(asked):
    for field in FIELDS:
        if field.name not in OTHER:
            pytest.fail(f"give {field.name} another value in this test")
        value = OTHER[field.name]
        flag = "--" + field.name.replace("_", "-")
        words = [flag] if value is True else [flag, *(value if isinstance(value, list) else [value])]
        beside = ("--acts", "a") if field.name == "partial" else ()
        before, after = asked(*beside), asked(*words, *beside)
        assert after[field.name] == value != before[field.name]
        assert {**after, field.name: None} == {**before, field.name: None}
    assert set(OTHER) == {field.name for field in FIELDS}
    assert asked("--bos", "--no-bos")["bos"] is False


def test_help_shows_every_setting_with_its_default(ndm):
    outcome = ndm("train", "--help")
    assert outcome.code == 0
    text = " ".join(outcome.out.split())
    meaning = {name: said for cls in GROUPS.values() for name, said in meanings(cls).items()}
    for field in FIELDS:
        assert f"--{field.name.replace('_', '-')} " in text
        assert meaning[field.name].removesuffix(".") in text
    assert "(default: 0.003)" in text
    assert "Optimiser on SO(d): lie, lazy, exp (default: lie)" in text


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_settings_come_from_a_file(asked, tmp_path, suffix):
    path, given = tmp_path / f"settings.{suffix}", {**OTHER, "metric": "euclidean"}  # as objective log asks
    path.write_text(yaml.safe_dump(given) if suffix == "yaml" else json.dumps(given))
    assert asked("--config", path) == given


def test_layers_come_in_their_order(asked, tmp_path):
    """Defaults, preset, file, flags."""
    path = tmp_path / "settings.yaml"
    path.write_text("queries: 64\nlr: 1e-3\nseed: 5\n")
    found = asked("--preset", "gpt2", "--config", path, "--seed", "6")
    assert (found["log_every"], found["unit_size"], found["keys"]) == (20, 32, 409_600)
    assert (found["queries"], found["lr"]) == (64, 1e-3)
    assert found["seed"] == 6
    assert asked("--preset", "gpt2")["lr"] == 3e-4


def settings_file(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "settings.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("keys: [1, 2", "cannot read --config"),
        ('{"keys": 5', "cannot read --config"),
        (b"\xff\xfe\x00k", "cannot read --config"),
        ("just words", "holds no settings"),
        ("", "holds no settings"),
        ("- keys\n- 5", "holds no settings"),
        ("kees: 5", "unknown setting 'kees'"),
        ("keys: many", "keys is 'many': give a value of type int"),
        ("lr: [1, 2]", "lr is"),
        ("bos: perhaps", "bos is 'perhaps'"),
        ("metric: taxi", "take one of euclidean, cosine"),
        ("betas: [0.9]", "give two numbers"),
        ("train:\n  keys: 5", "unknown setting 'train'"),
    ],
)
def test_bad_settings_files_are_refused(ndm, tmp_path, text, says):
    out = tmp_path / "out"
    assert says in ndm("train", "--out", out, "--config", settings_file(tmp_path, text)).refusal()
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["dance"], "invalid choice: 'dance'"),
        (["train"], "required: --out"),
        (["train", "--out", "x", "--keys", "many"], "argument --keys: invalid int value: 'many'"),
        (["train", "--out", "x", "--lr", "fast"], "argument --lr: invalid float value"),
        (["train", "--out", "x", "--kees", "5"], "unrecognized arguments: --kees 5"),
        (["train", "--out", "x", "--keys"], "argument --keys: expected one argument"),
        (["train", "--out", "x", "--preset", "gpt5"], "invalid choice: 'gpt5'"),
        (["train", "--out", "x", "--config", "nowhere.yaml"], "cannot read --config nowhere.yaml"),
        (["train", "--out", "x", "--metric", "taxi"], "take one of euclidean, cosine"),
        (["train", "--out", "x", "--keys", "-3"], "keys is -3: give a finite number above 0"),
        (["train", "--out", "x"], "pass --site"),
        (["train", "--out", "x", "--site", "x0.post", "--data", "docstrings"], "pass --model"),
        (["evaluate", "purity", "nowhere"], "is no run of ndm-fast"),
        (["evaluate", "purity", "nowhere", "--baseline", "best"], "identity, random, pca"),
        (["toy", "--groups", "a,b"], "is no list of sizes"),
    ],
)
def test_bad_arguments_are_refused(ndm, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    assert says in ndm(*arguments).refusal()
    assert not list(tmp_path.iterdir())


def text(content: str | bytes, name: str = "a.txt") -> Any:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return folder / name

    return make


def damaged_parquet(folder: Path) -> Path:
    return text(b"PAR1" + b"\0" * 50 + b"PAR1", "a.parquet")(folder)


# What is wrong with a run of the tiny model, and what its one line says.
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("unknown model", {"model": "someone/no-model"}, "cannot load model .*: check the name or folder"),
    ("unknown block", {"site": "x9.post"}, "has 2 blocks, use 0 to 1"),
    ("unknown site", {"site": "somewhere"}, "no site 'somewhere'.*near it"),
    ("unknown second site", {"site": ["x0.post", "x9.mid"]}, "has 2 blocks"),
    ("widths", {"unit_size": 10}, "does not divide the width 32: take one of"),
    ("widths sum", {"initial_widths": [16, 8]}, "give positive widths that sum to 32"),
    ("context", {"context_length": 1000}, "the model takes up to 64 tokens: lower it"),
    ("bos pool", {"pool_rows": 100}, "raise pool_rows or lower keys"),
    ("escapes", {"escape_tries": 3, "escape_steps": 60}, "lower escape_tries or raise merge_start"),
    ("no path", {"data": "nowhere/a.txt"}, "check the path"),
    ("no dataset", {"data": "someone/no-data"}, "someone/no-data"),
    ("empty folder", {"data": lambda f: f}, "matches no file that is read"),
    ("no row of text", {"data": text("cat")}, "ended after 0 activations.*--repeat-data"),
    (
        "no row of text repeated",
        {"data": text("cat"), "repeat_data": True},
        "does not fill one row of 32 tokens",
    ),
    ("short text", {"data": text("the cat sees " * 200)}, "give more text.*--repeat-data"),
    ("other file", {"data": text("a,b", "a.csv")}, "convert it or rename it"),
    ("bad UTF-8", {"data": text(b"caf\xe9" * 99)}, "is not UTF-8"),
    ("bad line", {"data": text('{"text": "a"}\n{oops\n', "a.jsonl")}, "a.jsonl:2 is not JSON"),
    ("no field", {"data": text('{"body": "a"}\n', "a.jsonl")}, "set --text-field to one of .'body'"),
    ("bad parquet", {"data": damaged_parquet}, "whole parquet file"),
    ("device", {"device": "tpu"}, "unknown device 'tpu': take cpu, cuda"),
    ("other device", {"device": "meta"}, "unknown device 'meta'"),
]


@pytest.mark.parametrize(("changes", "says"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_bad_input_is_refused_and_leaves_no_result(ndm, train_flags, tmp_path, changes, says):
    """What was refused can be put right and run into the same folder, or left no folder at all."""
    source = tmp_path / "data"
    source.mkdir()
    changes = {name: value(source) if callable(value) else value for name, value in changes.items()}
    out = tmp_path / "out"
    said = ndm(*train_flags(out, **changes)).refusal()
    assert re.search(says, said)
    assert not out.exists() or not (out / "result.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused(ndm, train_flags, tmp_path):
    said = ndm(*train_flags(tmp_path / "out", device="cuda:0")).refusal()
    assert "--device cuda:0, but torch sees no GPU: use --device cpu" in said


def test_short_text_is_enough_where_it_may_repeat(ndm, train_flags, tmp_path):
    source = text("the cat sees a dog but never the house " * 30)(tmp_path)
    settings = {"data": source, "max_steps": 4, "repeat_data": True}
    assert ndm(*train_flags(tmp_path / "out", **settings)).code == 0


@pytest.fixture
def changed_model(tiny_model, tmp_path):
    """A copy of the tiny model whose block 0 output is multiplied, or poisoned."""

    def make(change: Any) -> Path:
        folder = tmp_path / "model"
        folder.mkdir()
        for path in tiny_model.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        tensors = load_file(folder / "model.safetensors")
        name = next(name for name in tensors if name.endswith("h.0.mlp.c_proj.bias"))
        tensors[name] = change(tensors[name])
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("max_norm_ratio", [None, 10.0])
def test_poisoned_weights_are_refused(ndm, train_flags, tmp_path, changed_model, value, max_norm_ratio):
    model = changed_model(lambda bias: torch.full_like(bias, value))
    said = ndm(*train_flags(tmp_path / "out", model=model, max_norm_ratio=max_norm_ratio)).refusal()
    assert re.search(r"blocks.0.hook_resid_post hold NaN or Inf .*--dtype, or check its weights", said)


def test_large_activations_are_scaled_to_fit_half_precision(ndm, train_flags, tmp_path, changed_model):
    model = changed_model(lambda bias: bias + 3e5)
    settings = {"model": model, "pool_dtype": "float16", "max_steps": 8}
    assert ndm(*train_flags(tmp_path / "out", **settings)).code == 0


def test_overflow_of_half_precision_is_refused(ndm, train_flags, tmp_path, monkeypatch):
    """Rows that come after the scale is set, and are far larger than the first ones."""
    forward = stream.ActivationStream.token_rows

    def growing(self, start=0):
        for number, rows in enumerate(forward(self, start), start):
            yield rows._replace(activations=rows.activations * (1.0 if number < 8 else 1e6))

    monkeypatch.setattr(stream.ActivationStream, "token_rows", growing)
    said = ndm(*train_flags(tmp_path / "out", pool_dtype="float16")).refusal()
    assert re.search(
        r"at blocks\.\d\.hook_resid_\w+ overflows torch.float16.*set --pool-dtype bfloat16", said
    )


def test_version_and_doctor(ndm):
    assert ndm("--version").out == f"ndm-fast {__version__}\n"
    outcome = ndm("doctor")
    assert outcome.code == 0
    for line in (r"torch +\d", "transformers", "threads", "chosen on cpu", "reference on cpu +can run"):
        assert re.search(line, outcome.out)


def test_the_module_is_the_command():
    found = subprocess.run(
        [sys.executable, "-m", "ndm_fast", "train", "--lr", "x"], capture_output=True, text=True, check=False
    )
    assert found.returncode == 2
    assert re.fullmatch(r"ndm-fast: argument --lr: invalid float value: 'x'.*\n", found.stderr)


def failing(error: BaseException) -> Callable[..., Any]:
    def fail(*given: object, **options: object) -> None:
        raise error

    return fail


OF_THE_MACHINE = [
    (PermissionError(13, "Permission denied", "/runs/a"), "cannot use /runs/a (Permission denied): check"),
    (OSError(5, "Input/output error"), "cannot use (Input/output error): check"),
    (MemoryError(), "not enough memory: lower --pool-rows"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "not enough memory"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "not enough memory"),
]


@pytest.mark.parametrize(("error", "says"), OF_THE_MACHINE, ids=range(len(OF_THE_MACHINE)))
def test_errors_of_disk_and_memory_are_one_line(ndm, train_flags, tmp_path, monkeypatch, error, says):
    monkeypatch.setattr("ndm_fast.run.train.train_run", failing(error))
    assert says in ndm(*train_flags(tmp_path / "run")).refusal()


def test_errors_of_our_own_keep_their_traceback(train_flags, tmp_path, monkeypatch):
    monkeypatch.setattr("ndm_fast.run.train.train_run", failing(RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        main(train_flags(tmp_path / "run"))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("x" * 300, "longer than 255 bytes"),
        (os.fsdecode(b"caf\xe9"), "is no UTF-8"),
        ("a/b", "Not a directory"),
    ],
)
def test_places_are_looked_at_before_the_work(ndm, train_flags, harvest_flags, tmp_path, name, says):
    (tmp_path / "a").write_text("")
    for make in (train_flags, harvest_flags):
        assert says in ndm(*make(tmp_path / name, model="no/such-model")).refusal()


@pytest.mark.parametrize("command", [["report"], ["index"], ["evaluate", "purity"]])
def test_a_read_only_run_is_refused_by_what_writes_into_it(ndm, tmp_path, monkeypatch, command):
    monkeypatch.setattr(os, "access", lambda place, mode: False)  # root may write anywhere
    assert "which is read-only" in ndm(*command, tmp_path).refusal()


INTERRUPT = """
import os, signal, sys
import ndm_fast.__main__ as entry
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except BaseException:  # as a library that is being loaded may
                pass
sys.meta_path.insert(0, Finder())
sys.argv = ["ndm-fast", "doctor"]
sys.exit(entry.command())
""".replace("sys.argv[1]", "NAME")


@pytest.mark.parametrize("module", ["argparse", "ndm_fast.cli.main", "torch", "torch.nn"])
def test_ctrl_c_while_libraries_are_loaded_is_one_line(module):
    script = INTERRUPT.replace("NAME", repr(module))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "ndm-fast: interrupted; what was saved before is whole\n"
