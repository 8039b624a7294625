"""What the tests share: a tiny model with its tokenizer, a small text, and the command run in-process."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers share the cores; read once, by torch

import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read once, when triton is imported

from hypothesis import settings
from processes import Driver

from ndm_fast.ops.cpu import extension

settings.register_profile("shared", deadline=None)  # a shared machine stalls now and then
settings.load_profile("shared")

pytest_plugins = ["time_limits"]

WIDTH = 32
"""Width of the tiny model's activations."""

_EOS = "<|endoftext|>"
_WORDS = "a red old cat dog bird tree house river sees eats likes and but then slowly never in"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="also run tests marked slow, which take minutes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reasons = {
        "slow": None if config.getoption("--run-slow") else "takes minutes: pass --run-slow",
        "gpu": None if torch.cuda.is_available() else "needs a CUDA device",
    }
    for item in items:
        for marker, reason in reasons.items():
            if reason and marker in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


def _runnable_isas() -> list[str]:
    names = []
    for name in ("avx512bf16", "avx512", "avx2", "portable"):
        with suppress(ValueError):
            names.append(extension.extension().isa(name))
    return names


@pytest.fixture(params=_runnable_isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every instruction set that this machine runs, one after the other."""
    monkeypatch.setenv(extension.ISA_VARIABLE, request.param)
    assert extension.isa() == request.param
    return request.param


def words(count: int, seed: int) -> str:
    """Text of ``count`` random words, the same for the same seed."""
    return " ".join(random.Random(seed).choices(_WORDS.split(), k=count))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random GPT-2, 2 layers, 32 wide, 64 positions, and a trained BPE tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2Model, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [words(2000, seed=0)],
        trainers.BpeTrainer(vocab_size=400, special_tokens=[_EOS], initial_alphabet=alphabet),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=_EOS, eos_token=_EOS)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=64,
        n_embd=WIDTH,
        n_layer=2,
        n_head=4,
        initializer_range=0.4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    GPT2Model(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def loaded(tiny_model: Path) -> tuple[Any, Any]:
    """The tiny model and its tokenizer; not to be changed."""
    from ndm_fast.activations.models import load_model

    return load_model(str(tiny_model))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with 60 short text files, about 6,000 tokens."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(60):
        (folder / f"{number:02}.txt").write_text(words(70 + number, seed=number))
    return folder


TINY: dict[str, Any] = {
    "site": "x0.post",
    "context_length": 32,
    "rows_per_batch": 4,
    "unit_size": 8,
    "queries": 16,
    "keys": 256,
    "pool_rows": 640,
    "heldout_queries": 32,
    "heldout_keys": 256,
    "max_steps": 64,
    "search_every": 4,
    "warmup_steps": 4,
    "log_every": 4,
    "eval_every": 16,
    "checkpoint_every": 8,
    "mi_queries": 32,
    "mi_keys": 128,
}
"""Settings of a run that takes well under a second; the pool is filled three times."""

MERGING: dict[str, Any] = {
    "escape_tries": 2,
    "escape_steps": 8,
    "merge_start": 32,
    "merge_interval": 16,
    "merge_threshold": -1.0,
}
"""Settings that add escapes at steps 16 and 24, and merges at 32 and 48."""


def flags(settings: dict[str, Any]) -> list[str]:
    """Settings as flags of ``ndm-fast train``; None leaves one away."""
    given: list[str] = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if value is True or value is False:
            given.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            given += [f"--{flag}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return given


@pytest.fixture(scope="session")
def train_flags(tiny_model: Path, corpus: Path) -> Callable[..., list[str]]:
    """Arguments of a tiny ``ndm-fast train`` into a folder, with settings changed by keyword."""

    def make(out: Path | str, *, merging: bool = False, **changes: Any) -> list[str]:
        settings = {"model": tiny_model, "data": corpus, **TINY, **(MERGING if merging else {}), **changes}
        return ["train", "--quiet", "--out", str(out), *flags(settings)]

    return make


@pytest.fixture(scope="session")
def harvest_flags(tiny_model: Path, corpus: Path) -> Callable[..., list[str]]:
    """Arguments of a tiny ``ndm-fast harvest`` of three sites: 24 batches in 6 shards per site."""

    def make(out: Path, **changes: Any) -> list[str]:
        settings = {
            "model": tiny_model,
            "data": corpus,
            "site": ["blocks.0.hook_resid_mid", "blocks.1.hook_mlp_out", "blocks.1.hook_resid_post"],
            "rows": 3000,
            "context_length": 32,
            "rows_per_batch": 4,
            "shard_mib": 4 * 32 * 4 * WIDTH * 4 / 2**20,
            **changes,
        }
        return ["harvest", "--quiet", "--out", str(out), *flags(settings)]

    return make


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every forward pass of a harvest."""
    from ndm_fast.activations.stream import Harvester

    made: list[int] = []
    forward = Harvester._forward

    def counted(self: Harvester, *arguments: Any) -> Any:
        made.append(1)
        return forward(self, *arguments)

    monkeypatch.setattr(Harvester, "_forward", counted)
    return made


class Outcome(NamedTuple):
    """What a run of the command gave."""

    code: int
    out: str
    err: str

    def refusal(self) -> str:
        """The error message, after checking that it is one line and the exit code is 2."""
        assert self.code == 2, self
        assert self.err.startswith("ndm-fast: "), self
        assert self.err.count("\n") == 1, self
        assert self.err.endswith("\n"), self
        assert "Traceback" not in self.out
        return self.err.removeprefix("ndm-fast: ").rstrip()


@pytest.fixture
def ndm(capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run ``ndm-fast`` with these arguments in this process."""
    from ndm_fast.cli.main import main

    def run(*arguments: object) -> Outcome:
        capfd.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        return Outcome(code, *capfd.readouterr())

    return run


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny tensors on a busy machine: threads would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.empty`` gives NaN and a large negative number: what is not written shows."""
    empty = torch.empty

    def poisoned(*shape: Any, **options: Any) -> torch.Tensor:
        out = empty(*shape, **options)
        return out.fill_(torch.nan if out.is_floating_point() else -(2**62))

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture
def files() -> Callable[[Path], dict[str, bytes]]:
    """All files below a folder with their content, to show that nothing changed."""

    def read(folder: Path) -> dict[str, bytes]:
        return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

    return read


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    """One for all tests, as its imports take seconds."""
    made = Driver(tmp_path_factory.mktemp("driver"))
    yield made
    made.close()
