"""Every command that writes, made small: how it starts, how it is started again, and what it leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import tiny
import torch
from processes import Forked, has_ended

from ndm_fast.distributed import TIMEOUT_VARIABLE

SHIM = Path(__file__).parent / "data" / "fault_shim.c"

CRASHED = 99
"""Exit code of a process that the shim ended."""

MODULES = ", ".join(
    [
        "ndm_fast.distributed",
        "ndm_fast.evaluate.circuits.circuits",
        "ndm_fast.report.site",
        "ndm_fast.report.server",
        "matplotlib.backends.backend_agg",
        "matplotlib.pyplot",
        "uvicorn",
    ]
)
"""What a command would import for seconds."""

_RANKS_PATIENCE = 10
"""Seconds until a rank gives up another."""

_SHORT: dict[str, Any] = {"max_steps": 32, "checkpoint_every": 16, "log_every": 8, "eval_every": 16}


class Writer(NamedTuple):
    """A command that writes."""

    name: str
    first: list[str]
    again: list[str]
    """The command that ends what the first one began."""
    start: Path | None = None
    """What is in its folder before."""
    ranks: int = 1
    serves: bool = False
    """It goes on until it is told to stop."""


class Outcome(NamedTuple):
    """Exit codes, negative for signals, and outputs of a command's processes."""

    codes: list[int]
    outputs: list[str]


def compiled_shim(folder: Path) -> Path:
    """``fault_shim.c`` as a library to preload."""
    library = folder / "fault_shim.so"
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", library, SHIM, "-ldl"], check=True)
    return library


class Scene:
    """Models, texts and runs for the writers, whose folder is ``out``.

    Args:
        folder: for all of it; empty.
        preload: a library that the commands' processes load first.
        evaluating: with the kinds of ``evaluate`` that need runs and models of their own.
    """

    def __init__(self, folder: Path, preload: Path | None = None, *, evaluating: bool = True) -> None:
        self.folder, self.out = folder, folder / "out"
        self._log, outputs = folder / "changes", folder / "printed"
        outputs.mkdir()
        self._forked = Forked(outputs, MODULES, {"LD_PRELOAD": str(preload)} if preload else {})
        self.writers = {writer.name: writer for writer in self._writers(evaluating)}

    def close(self) -> None:
        """End all processes."""
        self._forked.close()

    def reset(self, writer: Writer) -> None:
        """Make the writer's folder what it was before."""
        shutil.rmtree(self.out, ignore_errors=True)
        if writer.start is not None:
            shutil.copytree(writer.start, self.out)

    def start(self, writer: Writer, arguments: list[str], faults: dict[str, str]) -> list[int]:
        """The process ids of a command, of whose ranks the first has faults."""
        if writer.ranks == 1:
            return self._forked.start_all(arguments, [faults], 1)
        port = _free_port()
        first, *others = [_place(rank, writer.ranks, port) for rank in range(writer.ranks)]
        return self._forked.start_all(arguments, [first | faults, *others], 1)

    def wait(self, writer: Writer, processes: list[int]) -> Outcome:
        """What a command gave; one that serves is told to stop once it does."""
        if writer.serves:
            printed = self.folder / "printed" / "0"
            while not has_ended(processes[0]):
                if printed.exists() and b"http://" in printed.read_bytes():
                    break
                time.sleep(0.01)
            if not has_ended(processes[0]):
                os.kill(processes[0], signal.SIGINT)
        return Outcome(*self._forked.wait_all())

    def run(self, writer: Writer, arguments: list[str], faults: dict[str, str] | None = None) -> Outcome:
        """Start a command and wait for its end."""
        return self.wait(writer, self.start(writer, arguments, faults or {}))

    def undisturbed(self, writer: Writer) -> tuple[dict[str, bytes], list[str]]:
        """What a writer leaves that nothing happens to, and all that it changes, in words."""
        self._log.unlink(missing_ok=True)
        self.reset(writer)
        found = self.run(writer, writer.first, self.faults(0, "error") | {"FAULT_LOG": str(self._log)})
        assert set(found.codes) == {0}, found
        changes = self._log.read_text().splitlines() if self._log.exists() else []
        return content(self.out), changes

    def faults(self, number: int, how: str) -> dict[str, str]:
        """Environment in which a change fails; see ``fault_shim.c``."""
        return {"FAULT_UNDER": str(self.out), "FAULT_AT": str(number), "FAULT_HOW": how}

    def after_fault(self, writer: Writer, number: int, how: str, expected: dict[str, bytes]) -> str:
        """What is wrong when a change fails and the command is run again, or nothing."""
        self.reset(writer)
        found = self.run(writer, writer.first, self.faults(number, how))
        said = "".join(found.outputs)
        if how == "crash" and found.codes[0] != CRASHED:
            return f"did not crash: {found}"
        if "Traceback" in said or not set(found.codes) <= {0, 1, 2, CRASHED}:
            return f"raises: {found}"
        if how != "crash" and found.codes[0] and "ndm-fast: " not in said:
            return f"ends without a word: {found}"
        return self.ends_right(writer, expected)

    def ends_right(self, writer: Writer, expected: dict[str, bytes]) -> str:
        """Run the command again; what is wrong then, or nothing."""
        found = self.run(writer, writer.again)
        if set(found.codes) != {0}:
            return f"ends with {found.codes}: {' '.join(found.outputs)}"
        left = content(self.out)
        differing = sorted(n for n in left.keys() | expected.keys() if left.get(n) != expected.get(n))
        return f"leaves other files: {differing}" if differing else ""

    def _made(self, name: str, arguments: list[str]) -> Path:
        made = self.folder / name
        found = self.run(Writer(name, [], []), arguments)
        assert found.codes == [0], found
        return made

    def _writers(self, evaluating: bool) -> Iterator[Writer]:
        model = tiny.make_model(_made(self.folder / "model"))
        text = tiny.make_corpus(_made(self.folder / "text"))
        run, out = self.folder / "run", str(self.out)
        train = tiny.train_command(model, text, run, merging=True, **_SHORT)
        self._made("run", train)

        def training(name: str, ranks: int = 1, **changes: Any) -> Writer:
            first = tiny.train_command(model, text, out, **{**_SHORT, **changes})
            return Writer(name, first, [*first, "--resume"], ranks=ranks)

        yield training("train", merging=True)
        yield training("train, two sites", site=["x0.post", "m1"], max_steps=16)
        yield training("train, two ranks", ranks=2, parallel="queries")
        yield training("train, a site a rank", ranks=2, site=["x0.post", "m1"], max_steps=16)
        harvest = tiny.harvest_command(model, text, out, rows=1500)
        yield Writer("harvest", harvest, [*harvest, "--resume"])
        acts = self._made("acts", tiny.harvest_command(model, text, self.folder / "acts", rows=3000))
        cached = ["train", "--quiet", "--acts", str(acts), "--out", out, "--site", "x1.post"]
        cached += tiny.flags(
            {**tiny.TINY, **_SHORT, "site": None, "context_length": None, "rows_per_batch": None}
        )
        yield Writer("train --acts", cached, [*cached, "--resume"])
        yield self._of_rows(cached)
        yield from self._of_a_run(run)
        if evaluating:
            other, upper = (
                self._made(name, tiny.train_command(model, text, self.folder / name, **_SHORT, **changes))
                for name, changes in (("other", {"seed": 1}), ("upper", {"site": "x1.post"}))
            )
            yield from self._evaluating(run, other)
            command = ["evaluate", "connections", str(run), str(upper), "--model", str(model), "--out", out]
            yield Writer("evaluate connections", command, command)
            command = ["toy", "--groups", "3,3", "--dim", "2", "--out", out]
            yield Writer("toy", command, command)
            command = ["hub", str(run), str(upper), "--out", out]
            yield Writer("hub", command, command)

    def _of_rows(self, cached: list[str]) -> Writer:
        rows = self.folder / "rows.npy"
        numpy.save(rows, numpy.random.default_rng(0).standard_normal((4000, tiny.WIDTH), numpy.float32))
        command = [*cached[:2], "--rows", str(rows), *cached[4:6], *cached[8:]]
        return Writer("train --rows", command, [*command, "--resume"])

    def _of_a_run(self, run: Path) -> Iterator[Writer]:
        out, rows = str(self.out), ["--rows", "500"]

        def over(name: str, arguments: list[str], start: Path, serves: bool = False) -> Writer:
            return Writer(name, arguments, arguments, start, serves=serves)

        yield over("index", ["index", out, *rows], run)
        indexed = self.folder / "indexed"
        shutil.copytree(run, indexed)
        self._made("indexed", ["index", str(indexed), "--rows", "300"])
        yield over("index again", ["index", out, *rows], indexed)
        yield over("report", ["report", out, *rows], run)
        reported = self.folder / "reported"
        shutil.copytree(indexed, reported)
        self._made("reported", ["report", str(reported)])
        yield over("report again", ["report", out], reported)
        yield over("report --share", ["report", out, "--share", *rows], run)
        yield over("report --figures-only", ["report", out, "--figures-only"], run)
        yield over("explore", ["explore", out, "--port", "0", *rows], run, serves=True)
        yield over("evaluate purity", ["evaluate", "purity", out], indexed)

    def _evaluating(self, run: Path, other: Path) -> Iterator[Writer]:
        out = ["--out", str(self.out)]

        def kind(name: str, *arguments: object) -> Writer:
            command = ["evaluate", name, *map(str, arguments), *out]
            return Writer(f"evaluate {name}", command, command)

        yield kind("stability", run, other)
        speaker = tiny.make_model(_made(self.folder / "speaker"), head=True)
        countries = {"Mali": "dog", "Bora": "cat", "Kiro": "bird", "Tavu": "tree", "Sela": "house"}
        self._json("entities", {name: {"Country": country} for name, country in countries.items()})
        self._json("texts", {"Country": ["%s likes the", "the red %s sees a"]})
        ravel_files = ["--entities", self.folder / "entities.json", "--texts", self.folder / "texts.json"]
        yield kind(
            "conflict",
            run,
            "--model",
            speaker,
            *ravel_files,
            "--attribute",
            "Country",
            "--unknown",
            "--prompts",
            "8",
        )
        pair = {
            "base": ["a", " dog", " likes"],
            "src": ["a", " cat", " likes"],
            "base_type": "1",
            "src_type": "2",
        }
        self._json("pairs", [{**pair, "base_label": " tree", "src_label": " house", "task": "animals"}])
        yield kind("causalgym", self.folder / "pairs.json", "--partition", run, "--model", speaker)
        circuits = self._circuit_model()
        few = ["--model", circuits, "--tests", "2", "--prompts", "4"]
        yield kind("trace", *few, "--layers", "0", "1")
        yield kind("circuits", run, *few, "--random-seeds", "1", "--context-length", "32")

    def _circuit_model(self) -> Path:
        from transformers import GPT2Config, GPT2LMHeadModel

        folder = _made(self.folder / "circuit-model")
        tokenizer = tiny.gpt2_like()
        torch.manual_seed(0)
        sizes = {"n_positions": 64, "n_embd": tiny.WIDTH, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}
        GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    def _json(self, name: str, value: Any) -> None:
        (self.folder / f"{name}.json").write_text(json.dumps(value))


@contextmanager
def scene(folder: Path, *, with_faults: bool, evaluating: bool = True) -> Iterator[Scene]:
    """A scene, whose processes end with the block."""
    made = Scene(folder, compiled_shim(folder) if with_faults else None, evaluating=evaluating)
    try:
        yield made
    finally:
        made.close()


def content(folder: Path) -> dict[str, bytes]:
    """What a folder holds, without what two undisturbed runs of a command differ in."""
    canonical: dict[str, Callable[[bytes], bytes]] = {
        "log.jsonl": _without_times,
        "config.json": _without_maker,
        "checkpoint.safetensors": lambda _: b"",  # how long the log is, which has times in it
    }
    return {
        str(path.relative_to(folder)): canonical.get(path.name, bytes)(path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    } | {f"{path.relative_to(folder)}/": b"" for path in folder.rglob("*") if path.is_dir()}


def _without_times(log: bytes) -> bytes:
    lines = [json.loads(line) for line in log.splitlines()]
    return json.dumps([{k: v for k, v in line.items() if k != "time"} for line in lines]).encode()


def _without_maker(config: bytes) -> bytes:
    return json.dumps(
        {k: v for k, v in json.loads(config).items() if k not in ("made_with", "sha256")}
    ).encode()


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _place(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun tells a process."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
    names[TIMEOUT_VARIABLE] = _RANKS_PATIENCE
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in names.items()}}
