"""Documents from files, Hugging Face datasets, or Python's docstrings; what is skipped is counted."""

from __future__ import annotations

import glob
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from ndm_fast.activations.docstrings import docstrings
from ndm_fast.activations.records import (
    Record,
    Value,
    dataset_records,
    json_records,
    parquet_records,
    text_of,
)
from ndm_fast.activations.text_files import (
    FORMATS,
    check_decodes,
    check_encoding,
    encoding_of,
    find_files,
    kind_of,
    open_text,
    say_once,
)
from ndm_fast.config import HarvestConfig
from ndm_fast.errors import InputError

DOCSTRINGS = "docstrings"
"""Name of the built-in text: the docstrings of the Python that is running."""

Document = str | list[dict[str, Any]]
"""A text, or the messages of a conversation, which the tokenizer's chat template makes a text of."""

_LARGE = 1 << 20
"""Characters of a text file above which it is taken for many documents."""

_HALF_CHARACTER = re.compile("[\ud800-\udfff]")

_EMPTY, _BAD = "empty", "not readable"


def open_documents(data: str, text_field: str = "text", seed: int = 0, **reading: Any) -> Documents:
    """A function that reads the documents from the first one on, each time it is called.

    What is cheap to check is checked at once: names, the encoding of the first gibibyte of text, the first
    record of every file.

    Args:
        data: a text, JSON or parquet file, packed or not, a folder or glob of them, the name of a Hugging
            Face dataset (its ``train`` split), or ``"docstrings"``.
        text_field: field of a record that holds the text; ``a.b`` is field b in field a.
        seed: order of the modules for ``"docstrings"``; files and datasets keep their own order.
        reading: ``encoding``, ``bad_text``, ``split_documents``, ``chat_template``, as in ``HarvestConfig``.

    Raises:
        InputError: nothing is there, or it cannot be read.
    """
    config = HarvestConfig(data=data, text_field=text_field, **reading)
    return harvest_documents(config, seed)


def harvest_documents(config: HarvestConfig, seed: int) -> Documents:
    """The documents that a config names; see :func:`open_documents`."""
    data = config.data
    if not data:
        raise InputError("no text given: pass --data with a file, folder, glob or dataset name")
    if data == DOCSTRINGS:
        return Documents(config, seed, {})
    check_encoding(config.encoding)
    paths = find_files(data)
    if not paths and (Path(data).exists() or glob.has_magic(data) or kind_of(Path(data))):
        raise InputError(f"--data {data} matches no file that is read ({FORMATS}): check the path")
    encodings = {
        path: "" if kind_of(path) == ".parquet" else encoding_of(path, config.encoding) for path in paths
    }
    if config.bad_text == "error":
        check_decodes({path: encoding for path, encoding in encodings.items() if encoding})
    documents = Documents(config, seed, encodings)
    documents.check()
    return documents


@dataclass
class Documents:
    """A text; each call reads its documents from the first one on."""

    config: HarvestConfig
    seed: int
    encodings: dict[Path, str]
    """The files with their encodings; none for docstrings and datasets."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Records and documents that the latest reading skipped so far, by reason."""

    def __call__(self) -> Iterator[Document]:
        self.skipped = skipped = Counter[str]()
        try:
            yield from self._all(skipped)
        finally:  # also where the reader has enough
            if skipped:
                counts = " and ".join(f"{n:,} {why}" for why, n in sorted(skipped.items()))
                say_once(f"skipped in {self.config.data}: {counts} (see docs/activations.md)")

    def check(self) -> None:
        """Read the first record of every file, or of the dataset.

        Raises:
            InputError: it has no text where the config says.
        """
        if not self.encodings:
            next(self._dataset(Counter()), None)
        for path in self.encodings:
            if kind_of(path) not in (".txt", ".md"):
                next(self._file(path, Counter()), None)

    def _all(self, skipped: Counter[str]) -> Iterator[Document]:
        if self.config.data == DOCSTRINGS:
            return docstrings(self.seed)
        if not self.encodings:
            return self._dataset(skipped)
        return chain.from_iterable(self._file(path, skipped) for path in self.encodings)

    def _dataset(self, skipped: Counter[str]) -> Iterator[Document]:
        return self._kept(dataset_records(self.config.data), skipped)

    def _file(self, path: Path, skipped: Counter[str]) -> Iterator[Document]:
        kind = kind_of(path)
        if kind == ".parquet":
            yield from self._kept(parquet_records(path, self.config.text_field), skipped)
            return
        with open_text(path, self.encodings[path], self.config.bad_text) as text:
            if kind in (".txt", ".md"):
                for number, part in enumerate(self._parts(text, path), 1):
                    yield from self._clean(part, f"{path}, document {number}", skipped)
            else:
                yield from self._kept(json_records(path, text), skipped)

    def _kept(self, records: Iterable[Record], skipped: Counter[str]) -> Iterator[Document]:
        """The documents in records, in their order."""
        for where, record in records:
            try:
                if isinstance(record, InputError):
                    raise record
                value = text_of(record, self.config.text_field, where)
                if value and isinstance(value, list) and not self.config.chat_template:
                    raise InputError(f"{where} holds messages: pass --chat-template to read them")
            except InputError:
                if self.config.bad_text != "skip":
                    raise
                skipped[_BAD] += 1
                continue
            yield from self._clean(value, where, skipped)

    def _clean(self, value: Value, where: str, skipped: Counter[str]) -> Iterator[Document]:
        """The document, if it is to be kept; half a character stands for bytes that were not decoded."""
        if isinstance(value, bytes):
            value = value.decode("utf-8", "surrogateescape")
        if not value or (isinstance(value, str) and value.isspace()):
            skipped[_EMPTY] += 1
            return
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        if text.isascii() or not _HALF_CHARACTER.search(text):
            yield value
        elif self.config.bad_text == "replace":
            text = _HALF_CHARACTER.sub("\ufffd", text)
            yield text if isinstance(value, str) else json.loads(text)
        elif self.config.bad_text == "skip":
            skipped[_BAD] += 1
        else:
            raise InputError(f"{where} holds text that is no Unicode: pass --bad-text skip or replace")

    def _parts(self, text: io.TextIOWrapper, path: Path) -> Iterator[str]:
        """The documents of a text file."""
        mode = self.config.split_documents
        lines: Iterable[str] = text
        if mode == "auto":
            head = text.read(_LARGE + 1)
            if len(head) <= _LARGE:
                yield head
                return
            mode = "blank-lines" if re.search(r"\n[ \t]*\n", head) else "lines"
            say_once(
                f"text files over 1 MiB are split into documents, {path} by {mode}: choose with "
                "--split-documents"
            )
            lines = chain(io.StringIO(head + text.readline()), text)
        if mode == "none":
            yield text.read()
        elif mode == "lines":
            yield from (line.rstrip("\n") for line in lines if not line.isspace())
        else:
            for blank, block in groupby(lines, str.isspace):
                if not blank:
                    yield "".join(block).rstrip("\n")
