"""Token ids of documents, in order: in this process, or in worker processes that work ahead."""

from __future__ import annotations

import os
import pickle
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from ndm_fast.errors import InputError

_DOCUMENTS_AT_ONCE = 64


_AHEAD = 4
"""Groups of documents that wait for each worker, or are done before they are needed."""


def tokenize(documents: Iterable[str], tokenizer: Any, workers: int = 0) -> Iterator[list[int]]:
    """Token ids of each document, without special tokens; the same whatever the number of workers.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        workers: processes that tokenize ahead of the reader; 0 tokenizes when asked.

    Raises:
        InputError: a worker ended, or the tokenizer cannot be sent to one.
    """
    source = iter(documents)
    groups = iter(lambda: list(islice(source, _DOCUMENTS_AT_ONCE)), [])
    if workers:
        yield from _ahead(groups, tokenizer, workers)
        return
    for texts in groups:
        yield from tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def _ahead(groups: Iterator[list[str]], tokenizer: Any, workers: int) -> Iterator[list[int]]:
    if not getattr(tokenizer, "is_fast", False):
        raise InputError("only fast tokenizers run in processes of their own: set --tokenize-workers 0")
    description = tokenizer.backend_tokenizer.to_str()
    processes = [_Worker(description) for _ in range(workers)]
    free: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    for process in processes:
        free.put(process)

    def ask(texts: list[str]) -> list[list[int]]:
        worker = free.get()
        try:
            return worker.ask(texts)
        finally:
            free.put(worker)

    # A thread per process waits for its answer: a pipe that fills up then blocks neither side for good.
    threads = ThreadPoolExecutor(workers)
    waiting: deque[Future[list[list[int]]]] = deque()
    try:
        waiting.extend(threads.submit(ask, texts) for texts in islice(groups, _AHEAD * workers))
        while waiting:
            done = waiting.popleft().result()
            waiting.extend(threads.submit(ask, texts) for texts in islice(groups, 1))
            yield from done
    finally:
        threads.shutdown(cancel_futures=True)
        for process in processes:
            process.close()


class _Worker:
    """One process of ``tokenize_worker``."""

    def __init__(self, description: str) -> None:
        script = Path(__file__).with_name("tokenize_worker.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # One thread: the others are for the model. A session of its own: Ctrl-C is for us alone.
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
            start_new_session=True,
        )
        self._send(description)

    def ask(self, texts: list[str]) -> list[list[int]]:
        self._send(texts)
        assert self._process.stdout is not None
        try:
            return pickle.load(self._process.stdout)
        except (EOFError, pickle.UnpicklingError):
            raise self._ended() from None

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(OSError):  # it ended before
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def _send(self, what: Any) -> None:
        assert self._process.stdin is not None
        try:
            pickle.dump(what, self._process.stdin)
            self._process.stdin.flush()
        except OSError:
            raise self._ended() from None

    def _ended(self) -> InputError:
        return InputError(
            "a process that tokenizes ended by itself (killed, or out of memory?): "
            "try again with --tokenize-workers 0"
        )
