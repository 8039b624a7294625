"""Documents from anywhere, packed into rows of tokens."""

from __future__ import annotations

import ast
import functools
import glob
import json
import random
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from ndm_fast.errors import InputError

DOCSTRINGS = "docstrings"
"""Name of the built-in text: the docstrings of the Python that is running."""

_SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")


_SHORTEST_DOCSTRING = 80


def open_documents(data: str, text_field: str = "text", seed: int = 0) -> Callable[[], Iterator[str]]:
    """A function that reads the documents from the first one on, each time it is called.

    Args:
        data: a .txt, .md, .jsonl or .parquet file, a folder or glob of them, the name of a Hugging Face
            dataset (its ``train`` split), or ``"docstrings"``.
        text_field: field of a jsonl, parquet or dataset record that holds the text.
        seed: order of the modules for ``"docstrings"``; files and datasets keep their own order.

    Raises:
        InputError: nothing is there, or it cannot be read.
    """
    if not data:
        raise InputError("no text given: pass --data with a file, folder, glob or dataset name")
    if data == DOCSTRINGS:
        return lambda: _docstrings(seed)
    paths = _find_files(data)
    if paths:
        return lambda: chain.from_iterable(_read_file(path, text_field) for path in paths)
    if Path(data).exists() or glob.has_magic(data) or Path(data).suffix in _SUFFIXES:
        raise InputError(f"--data {data} matches no {', '.join(_SUFFIXES)} file: check the path")
    return _open_dataset(data, text_field)


def _find_files(data: str) -> list[Path]:
    path = Path(data).expanduser()
    if path.is_file():
        if path.suffix not in _SUFFIXES:
            raise InputError(f"{path} is no {', '.join(_SUFFIXES)} file: convert it or rename it")
        return [path]
    if path.is_dir():
        return sorted(p for p in path.rglob("*") if p.suffix in _SUFFIXES and p.is_file())
    if glob.has_magic(data):
        return sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.suffix in _SUFFIXES)
    return []


def _read_file(path: Path, text_field: str) -> Iterator[str]:
    try:
        if path.suffix == ".parquet":
            yield from _read_parquet(path, text_field)
        elif path.suffix == ".jsonl":
            yield from _read_jsonl(path, text_field)
        else:
            yield path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path} ({error}): check the file, text must be UTF-8") from None


def _read_jsonl(path: Path, text_field: str) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(
                    f"{path}:{number} is not JSON ({error.msg}): mend or drop the line"
                ) from None
            yield _field(record, text_field, f"{path}:{number}")


def _read_parquet(path: Path, text_field: str) -> Iterator[str]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise InputError(f"reading {path} needs pyarrow: pip install 'ndm-fast[data]'") from None
    try:
        table = parquet.ParquetFile(path)
        names = table.schema_arrow.names
        if text_field not in names:
            raise InputError(f"{path} has no field {text_field!r}: set --text-field to one of {names}")
        for records in table.iter_batches(columns=[text_field], batch_size=1024):
            for text in records.column(0).to_pylist():
                if not isinstance(text, str | None):
                    raise InputError(
                        f"{path} has no text in field {text_field!r} but {type(text).__name__}: "
                        f"set --text-field to one of {names}"
                    )
                if text:
                    yield text
    except InputError:
        raise
    except Exception as error:  # pyarrow has many error types for a damaged file
        raise InputError(f"cannot read {path} ({error}): check that it is a whole parquet file") from None


def _open_dataset(name: str, text_field: str) -> Callable[[], Iterator[str]]:
    try:
        import datasets
    except ImportError:
        raise InputError(
            f"{name!r} is no file; to read it as a Hugging Face dataset: pip install 'ndm-fast[data]'"
        ) from None

    def read() -> Iterator[str]:
        try:
            records = datasets.load_dataset(name, split="train", streaming=True)
        except Exception as error:  # the hub client has many error types; the user needs one line
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(
                f"{name!r} is neither a file nor a dataset that loads ({reason}): check the name"
            ) from None
        for number, record in enumerate(records):
            yield _field(record, text_field, f"{name}, record {number}")

    return read


def _field(record: Any, text_field: str, where: str) -> str:
    if not isinstance(record, dict) or not isinstance(record.get(text_field), str):
        names = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise InputError(f"{where} has no text in field {text_field!r}: set --text-field to one of {names}")
    return record[text_field]


def _docstrings(seed: int) -> Iterator[str]:
    """Shuffled as a whole, so that any stretch of the text is a fair sample of it."""
    texts = list(_all_docstrings())
    random.Random(seed).shuffle(texts)
    return iter(texts)


@functools.cache
def _all_docstrings() -> tuple[str, ...]:
    """Help topics and docstrings of Python's standard library, each once, sorted."""
    from pydoc_data.topics import topics

    root = Path(sysconfig.get_paths()["stdlib"])
    modules = (
        p for p in root.rglob("*.py") if not {"site-packages", "test", "tests", "idlelib"} & set(p.parts)
    )
    return tuple(
        sorted({text for module in modules for text in _docstrings_of(module)} | set(topics.values()))
    )


def _docstrings_of(module: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(module.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return  # some standard modules keep deliberately odd encodings
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) >= _SHORTEST_DOCSTRING:
                yield text
