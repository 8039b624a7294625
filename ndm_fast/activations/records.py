"""Records of JSON and parquet files and of Hugging Face datasets, and the text in them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from ndm_fast.activations.text_files import kind_of
from ndm_fast.errors import InputError

Record = tuple[str, Any]
"""Where a record stands, for errors, and what it holds; an ``InputError`` where it cannot be read."""

Value = str | bytes | list[dict[str, Any]] | None
"""What a field of text may hold; a list has the messages of a conversation."""


def json_records(path: Path, lines: Iterator[str]) -> Iterator[Record]:
    """Records of a JSON file: one a line; a ``.json`` file may also be one list of them."""
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        if line.lstrip().startswith("[") and kind_of(path) == ".json":
            content = _parsed(chain([line], lines), str(path))
            records = content if isinstance(content, list) else [content]
            yield from ((f"{path}, record {n}", record) for n, record in enumerate(records, 1))
        elif not line.isspace():
            yield where, _parsed([line], where)


def _parsed(lines: Iterable[str], where: str) -> Any:
    try:
        return json.loads("".join(lines))
    except json.JSONDecodeError as error:
        return InputError(f"{where} is not JSON ({error.msg}): mend or drop it, or pass --bad-text skip")
    except (ValueError, RecursionError) as error:  # a number of too many digits; too deep
        return InputError(f"{where} cannot be read ({error}): mend or drop it, or pass --bad-text skip")


def parquet_records(path: Path, text_field: str) -> Iterator[Record]:
    """Rows of a parquet file as dicts, with the column of the text field alone."""
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise InputError(f"reading {path} needs pyarrow: pip install 'ndm-fast[data]'") from None
    try:
        table = parquet.ParquetFile(path)
        names = table.schema_arrow.names
        root = text_field if text_field in names else text_field.split(".")[0]
        if root not in names:
            raise no_text(str(path), text_field, "", dict.fromkeys(names))
        others, number = dict.fromkeys(names), 0
        for rows in table.iter_batches(columns=[root], batch_size=1024):
            for value in rows.column(0).to_pylist():
                number += 1
                yield f"{path}, row {number}", {**others, root: value}
    except (InputError, GeneratorExit):
        raise
    except Exception as error:  # pyarrow has many error types for a damaged file
        raise InputError(f"cannot read {path} ({error}): check that it is a whole parquet file") from None


def dataset_records(name: str) -> Iterator[Record]:
    """Records of a Hugging Face dataset's ``train`` split."""
    try:
        import datasets
    except ImportError:
        raise InputError(
            f"{name!r} is no file; to read it as a Hugging Face dataset: pip install 'ndm-fast[data]'"
        ) from None
    try:
        records = datasets.load_dataset(name, split="train", streaming=True)
    except Exception as error:  # the hub client has many error types; the user needs one line
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{name!r} is neither a file nor a dataset that loads ({reason}): check the name"
        ) from None
    for number, record in enumerate(records, 1):
        yield f"{name}, record {number}", record


def text_of(record: Any, text_field: str, where: str) -> Value:
    """What a record holds in its text field, which may be a nested one.

    Raises:
        InputError: no such field, or neither text nor messages in it; the message says what there is.
    """
    names = [text_field] if isinstance(record, dict) and text_field in record else text_field.split(".")
    value, above = record, ""
    for name in names:
        if value is None and above:
            return None
        if not isinstance(value, dict):
            raise no_text(where, text_field, type(value).__name__, record)
        if name not in value:
            raise no_text(where, text_field, "", record)
        value, above = value[name], f"{above}{name}."
    if value is None or _is_text(value):
        return value
    raise no_text(where, text_field, type(value).__name__, record)


def _is_text(value: Any) -> bool:
    messages = isinstance(value, list) and all(isinstance(m, dict) and "role" in m for m in value)
    return isinstance(value, str | bytes) or messages


def _text_fields(record: dict[str, Any], above: str = "") -> Iterator[str]:
    """Fields that hold text, also nested ones."""
    for name, value in record.items():
        if _is_text(value):
            yield f"{above}{name}"
        elif isinstance(value, dict):
            yield from _text_fields(value, f"{above}{name}.")


def no_text(where: str, text_field: str, found: str, record: Any) -> InputError:
    """The error for a record without text.

    Args:
        found: type of what is there instead; none where there is no such field.
        record: its fields that hold text are named; where none does, all others.
    """
    fields = sorted(_text_fields(record)) if isinstance(record, dict) else []
    if not fields and isinstance(record, dict):
        fields = sorted(name for name in record if name != text_field)
    what = f"has no text in field {text_field!r}" + (f" but {found}" if found else "")
    remedy = f"set --text-field to one of {fields}" if fields else "mend it"
    return InputError(f"{where} {what}: {remedy}, or pass --bad-text skip")
