"""Documents from anywhere, packed into rows of tokens."""

from __future__ import annotations

import ast
import functools
import glob
import json
import random
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ndm_fast.config import HarvestConfig
from ndm_fast.errors import InputError
from ndm_fast.tokenizing import tokenize

DOCSTRINGS = "docstrings"
"""Name of the built-in text: the docstrings of the Python that is running."""

_SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
_SHORTEST_DOCSTRING = 80


class PackedRows(NamedTuple):
    """Rows of tokens without padding, [B, L] each."""

    tokens: Tensor
    """int64 token ids."""
    documents: Tensor
    """int64 running number of the document that a token comes from."""
    special: Tensor
    """bool, true where the token is a special one (BOS, EOS, CLS, SEP ...)."""


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


class Frame(NamedTuple):
    """Token ids around a row of text, and between documents."""

    first: list[int]
    last: list[int]
    separator: int


def frame(tokenizer: Any, bos: bool = False) -> Frame:
    """What a row begins and ends with, see :func:`pack`.

    Raises:
        InputError: the tokenizer lacks a special token that is needed.
    """
    encoder = tokenizer.cls_token_id is not None and tokenizer.sep_token_id is not None
    separator = tokenizer.sep_token_id if encoder else tokenizer.eos_token_id
    if separator is None:
        raise InputError(
            "the tokenizer has neither EOS nor SEP, so documents cannot be kept apart: set eos_token"
        )
    if bos and not encoder and tokenizer.bos_token_id is None:
        raise InputError("the tokenizer has no BOS token: leave --bos away")
    first = [tokenizer.cls_token_id] if encoder else [tokenizer.bos_token_id] if bos else []
    return Frame(first, [separator] if encoder else [], separator)


def pack(
    documents: Iterable[str],
    tokenizer: Any,
    length: int,
    rows_per_batch: int,
    *,
    bos: bool = False,
    workers: int = 0,
) -> Iterator[PackedRows]:
    """Documents one after the other, cut into rows of exactly ``length`` tokens; a last short row is dropped.

    Causal models: EOS between documents, rows begin with BOS only where asked. Encoders with CLS and SEP
    tokens: every row is CLS ... SEP, with SEP between documents.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        length: tokens in a row, the special ones included.
        rows_per_batch: rows yielded at once; the last batch may hold fewer.
        workers: processes that tokenize ahead, see ``ndm_fast.tokenizing``.
    """
    first, last, separator = frame(tokenizer, bos)
    special_ids = torch.tensor(sorted(set(tokenizer.all_special_ids)))
    body = length - len(first) - len(last)
    tokens: list[int] = []
    owners: list[int] = []
    rows: list[tuple[list[int], list[int]]] = []

    def batch() -> PackedRows:
        stacked = torch.tensor([row for row, _ in rows])
        owned = torch.tensor([owner for _, owner in rows])
        rows.clear()
        return PackedRows(stacked, owned, torch.isin(stacked, special_ids))

    for number, ids in enumerate(tokenize(documents, tokenizer, workers)):
        tokens += [*ids, separator]
        owners += [number] * (len(ids) + 1)
        taken = 0
        while len(tokens) - taken >= body:
            cut, own = tokens[taken : taken + body], owners[taken : taken + body]
            rows.append(([*first, *cut, *last], [own[0]] * len(first) + own + [own[-1]] * len(last)))
            taken += body
            if len(rows) == rows_per_batch:
                yield batch()
        del tokens[:taken], owners[:taken]
    if rows:
        yield batch()


def packed_text(
    open_documents: Callable[[], Iterator[str]], tokenizer: Any, length: int, config: HarvestConfig
) -> Iterator[PackedRows]:
    """The batches of rows that a harvest runs the model on.

    Raises:
        InputError: the text is to be repeated, but gives no row.
    """
    useful = True
    while useful:
        useful = False
        documents, size = open_documents(), config.rows_per_batch
        for rows in pack(documents, tokenizer, length, size, bos=config.bos, workers=config.tokenize_workers):
            useful = useful or not bool(rows.special.all())
            yield rows
        if not config.repeat_data:
            return
    raise InputError(
        f"the text {config.data} does not fill one row of {length} tokens: give more text, or lower "
        "--context-length"
    )


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
