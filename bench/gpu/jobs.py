"""Jobs of ``check.py``: each runs in a process of its own, so that what breaks costs its own rows only.

A job is a row of items. The process says on its standard output which item it begins, and what came of it.
The parent kills it when an item takes too long, notes the item as failed, and starts the job again behind it.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

MARK = "@@ "
POISONED = 3
"""Exit status of a process whose device no longer answers."""
INJECT = "NDM_FAST_CHECK_INJECT"
"""For rehearsals: ``ITEM=raise``, ``=hang``, ``=exit`` or ``=kill``, with commas between."""
Row = dict[str, object]
Item = tuple[str, Callable[[], "list[Row]"]]


class Job(NamedTuple):
    """A process to run."""

    name: str
    limit: float
    """Seconds an item may take; the first of a process has :data:`START` more."""


START = 60.0
"""Seconds to import torch and to reach the device."""
RESTARTS = 4
"""Times a job is begun again; after that its other items are lost."""


def work(items: Iterable[Item], done: set[str], still_works: Callable[[], None]) -> None:
    """In the job's process: run what is not done, and say what came of it.

    Args:
        still_works: raises where the device no longer answers, which ends the process.
    """
    for name, run in items:
        if name in done:
            continue
        _say({"begin": name})
        try:
            _injected(name)
            rows = run()
        except Exception as error:
            said = " ".join(f"{type(error).__name__}: {error}".split())[:500]
            _say({"item": name, "rows": [{"name": name, "failed": said}]})
            try:
                still_works()
            except Exception:
                sys.stdout.flush()
                os._exit(POISONED)  # a poisoned context may hang in the interpreter's own end
            continue
        _say({"item": name, "rows": rows})


def _say(word: Row) -> None:
    print(MARK + json.dumps(word), flush=True)


def _injected(name: str) -> None:
    wanted = dict(each.split("=") for each in os.environ.get(INJECT, "").split(",") if each)
    match wanted.get(name.replace(",", "")):
        case "raise":
            raise RuntimeError("injected")
        case "hang":
            time.sleep(1e6)
        case "exit":
            os._exit(1)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)


def run(
    job: Job,
    command: list[str],
    report: Callable[[str, Row], None],
    deadline: float,
    environment: dict[str, str] | None = None,
) -> None:
    """In the parent: the job's rows, each reported as soon as it is there.

    Args:
        command: starts the job; names of items that are done go to its standard input as JSON.
        report: called with the job's name and a row; a failed row has ``failed``.
        deadline: of ``time.monotonic()``, at which the job is ended.
        environment: of its process; default this one's.
    """
    done: set[str] = set()
    for _ in range(1 + RESTARTS):
        if time.monotonic() > deadline:
            report(job.name, {"name": "the rest", "failed": "not run: out of time"})
            return
        begun, why = _attempt(job, command, done, report, deadline, environment)
        if why is None:
            return
        if begun is None:
            report(job.name, {"name": "start", "failed": why})
            return
        if begun not in done:
            done.add(begun)
            report(job.name, {"name": begun, "failed": why})
    report(job.name, {"name": "the rest", "failed": f"given up after {RESTARTS} restarts: {why}"})


def _attempt(
    job: Job,
    command: list[str],
    done: set[str],
    report: Callable[[str, Row], None],
    deadline: float,
    environment: dict[str, str] | None = None,
) -> tuple[str | None, str | None]:
    """One process: the item it was at when it ended, and why it ended too early (None: it did not)."""
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True, env=environment,
    )  # fmt: skip
    assert process.stdin
    assert process.stdout
    with process.stdin:
        process.stdin.write(json.dumps(sorted(done)))
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
    begun, last, limit = None, "", START + job.limit
    while True:
        wait = min(limit, deadline - time.monotonic())
        try:
            line = lines.get(timeout=max(0.01, wait))
        except queue.Empty:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return begun, "killed: it hung" if wait == limit else "killed: out of time"
        if line is None:
            break
        if not line.startswith(MARK):
            last = line.strip() or last
            continue
        try:
            word = json.loads(line.removeprefix(MARK))
        except ValueError:  # half a line: the process ended while it wrote
            continue
        limit = job.limit
        if "begin" in word:
            begun = word["begin"]
            continue
        done.add(word["item"])
        for row in word["rows"]:
            report(job.name, row)
    status = process.wait()
    return begun, None if status == 0 else f"the process ended with {status}: {last[:300]}"


def _read(stream: Iterable[str], lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)
