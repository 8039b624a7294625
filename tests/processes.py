"""``ndm-fast`` in processes of their own: no test waits for one without end, and they end with the tests."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

_PATIENCE = 240.0
"""Seconds for a command, below the limit of a test."""

_SCRIPT = """
import ctypes, json, os, signal, sys
import torch, transformers.models.gpt2.modeling_gpt2
import ndm_fast.run, ndm_fast.table, {modules}
from ndm_fast.cli import main
def die_with_parent():  # else what hangs outlives the tests
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
die_with_parent()
for line in sys.stdin:
    arguments, threads, environments, outputs = json.loads(line)
    processes = []
    for environment, output in zip(environments, outputs):
        process = os.fork()
        if process == 0:
            die_with_parent()
            signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored below a shell's `&`
            os.environ.update(environment)
            torch.set_num_threads(threads)
            file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1), os.dup2(file, 2)
            os._exit(main(arguments))
        processes.append(process)
    print(json.dumps(processes), flush=True)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in processes]), flush=True)
"""


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until a condition holds; an error where it does not come to."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.002)
    assert condition()


class Forked:
    """Forks processes that run ``ndm-fast``, after the imports, which take seconds.

    Args:
        folder: for what they print.
        modules: further ones to import.
        environment: of all its processes, beside ours.
    """

    def __init__(self, folder: Path, modules: str = "sys", environment: dict[str, str] | None = None) -> None:
        self._folder, self._outputs = folder, list[Path]()
        self._running: list[int] = []
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SCRIPT.format(modules=modules)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **(environment or {})},
            bufsize=0,  # `select` sees no line that is already in a buffer
        )

    def start_all(
        self, arguments: list[str], environments: Sequence[dict[str, str]], threads: int
    ) -> list[int]:
        """The process ids of a command that is run once per environment, all at the same time."""
        assert self._process.stdin is not None
        self._end_running()  # of a test that failed before it waited
        self._outputs = [self._folder / str(number) for number in range(len(environments))]
        for path in self._outputs:
            path.unlink(missing_ok=True)  # what the command before has printed
        line = [arguments, threads, list(environments), [str(path) for path in self._outputs]]
        self._process.stdin.write((json.dumps(line) + "\n").encode())
        self._running = self._answer()
        return self._running

    def wait_all(self) -> tuple[list[int], list[str]]:
        """Exit codes (negative: the signal) and outputs of the processes."""
        codes = self._answer()
        self._running = []
        return codes, [path.read_text() for path in self._outputs]

    def close(self) -> None:
        """End everything."""
        assert self._process.stdin is not None
        self._end_running()
        self._process.stdin.close()
        self._process.wait(_PATIENCE)

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], _PATIENCE)[0]:
            self._end_running()
            raise AssertionError(f"still runs: {[path.read_text() for path in self._outputs]}")
        return json.loads(self._process.stdout.readline())

    def _end_running(self) -> None:
        if self._running:
            for process in self._running:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            self._running = []
            self._answer()


class Driver(Forked):
    """Runs one command at a time."""

    def start(self, arguments: list[str], threads: int) -> int:
        """The process id of a new command."""
        return self.start_all(arguments, [{}], threads)[0]

    def wait(self) -> tuple[int, str]:
        """Exit code (negative: the signal) and output of the command."""
        codes, outputs = self.wait_all()
        return codes[0], outputs[0]

    def kill_after(self, process: int, file: Path, delay: float) -> None:
        """SIGKILL a process some time after it next wrote a file; or it ends before."""
        before, deadline = _changed_at(file), time.monotonic() + 60
        while _changed_at(file) == before and time.monotonic() < deadline:
            if has_ended(process):
                return
            time.sleep(0.002)
        time.sleep(delay)
        with suppress(ProcessLookupError):  # it was faster, and has ended well, which the caller sees
            os.kill(process, signal.SIGKILL)


def has_ended(process: int) -> bool:
    """Whether a process is gone, or only its exit code is left."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def _changed_at(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0
