"""What the tests share: a tiny model with its tokenizer, a small text, and the command run in-process."""

from __future__ import annotations

import os
import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` ignores it, for every child too
os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers share the cores; read once, by torch

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read once, when triton is imported

from hypothesis import settings
from processes import Driver
from tiny import harvest_command, make_corpus, make_model, train_command

from ndm_fast.ops.cpu import extension

settings.register_profile("shared", deadline=None)  # a shared machine stalls now and then
settings.load_profile("shared")

pytest_plugins = ["time_limits"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="also run tests marked slow, which take minutes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reasons = {
        "slow": None if config.getoption("--run-slow") else "takes minutes: pass --run-slow",
        "gpu": None if torch.cuda.is_available() else "needs a CUDA device",
    }
    for item in items:
        for marker, reason in reasons.items():
            if reason and item.get_closest_marker(marker):
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


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of ``bench/gpu`` by name, anew for each test."""
    folder = Path(__file__).parents[1] / "bench" / "gpu"
    monkeypatch.syspath_prepend(str(folder))
    for path in folder.glob("*.py"):
        monkeypatch.delitem(sys.modules, path.stem, raising=False)
    return importlib.import_module


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random GPT-2, 2 layers, 32 wide, 64 positions, and a trained BPE tokenizer."""
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def loaded(tiny_model: Path) -> tuple[Any, Any]:
    """The tiny model and its tokenizer; not to be changed."""
    from ndm_fast.activations.models import load_model

    return load_model(str(tiny_model))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with 60 short text files, about 6,000 tokens."""
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def train_flags(tiny_model: Path, corpus: Path) -> Callable[..., list[str]]:
    """Arguments of a tiny ``ndm-fast train`` into a folder, with settings changed by keyword."""
    return partial(train_command, tiny_model, corpus)


@pytest.fixture(scope="session")
def harvest_flags(tiny_model: Path, corpus: Path) -> Callable[..., list[str]]:
    """Arguments of a tiny ``ndm-fast harvest`` of three sites: 24 batches in 6 shards per site."""
    return partial(harvest_command, tiny_model, corpus)


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
