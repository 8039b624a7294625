"""Rows of activations, or of any embeddings, in one plain file: .npy, .safetensors or .parquet."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from ndm_fast.errors import InputError

SUFFIXES = (".npy", ".safetensors", ".parquet")

_NAMES = ("rows", "embeddings", "embedding", "activations")
"""What a tensor or column is called that is taken where there are several."""

_CHUNK_BYTES = 64 * 2**20


class Rows(Protocol):
    """[N, d] numbers by row, in memory or not."""

    @property
    def shape(self) -> Any:
        """N and d."""
        ...

    def __getitem__(self, index: Any) -> Any:
        """[n, d] some of them."""
        ...


class RowFile:
    """[N, d] rows of a file, which is checked as a whole: finite numbers, of a floating type.

    .npy and .safetensors are mapped into memory; .parquet is decoded, and held in memory.

    Args:
        path: .npy with an array [N, d]; .safetensors with one such tensor, or one called ``rows``,
            ``embeddings`` or ``activations``; .parquet with a column of lists of equal length, or with a
            column of numbers for each of the d.

    Raises:
        InputError: it cannot be read, or holds something else; the message says what.
    """

    def __init__(self, path: str | Path, *, show_progress: bool = False) -> None:
        self.path = Path(path)
        self._rows = _opened(self.path)
        shape = tuple(self._rows.shape)
        if len(shape) != 2 or 0 in shape:
            raise InputError(
                f"{path} holds an array of shape {list(shape)}: give rows [N, d], N and d at least 1"
            )
        self.width = int(shape[1])
        self.sha256 = self._checked(show_progress)
        """Of shape, dtype and content."""

    def __len__(self) -> int:
        return int(self._rows.shape[0])

    def take(self, index: Tensor) -> Tensor:
        """[n, d] rows of these numbers ([n] int64), a copy; float64 as float32."""
        rows = self._rows[index if isinstance(self._rows, Tensor) else index.numpy()]
        taken = torch.as_tensor(rows)
        return taken.float() if taken.dtype == torch.float64 else taken

    def _checked(self, show_progress: bool) -> str:
        count = max(1, _CHUNK_BYTES // (self.width * 4))
        found = hashlib.sha256(f"{tuple(self._rows.shape)} {self._rows.dtype}".encode())  # type: ignore[attr-defined]
        bar = tqdm(total=len(self), desc="check", unit="row", unit_scale=True, disable=not show_progress)
        with bar:
            for first in range(0, len(self), count):
                chunk = self._rows[first : first + count]
                held = chunk if isinstance(chunk, Tensor) else torch.from_numpy(np.array(chunk))
                bad = ~held.isfinite().all(1)
                if bad.any():
                    raise InputError(
                        f"row {first + int(bad.nonzero()[0])} of {self.path} holds NaN or infinity: leave "
                        "such rows out"
                    )
                found.update(held.contiguous().view(torch.uint8).numpy().data)
                bar.update(len(held))
        return found.hexdigest()


def _opened(path: Path) -> Rows:
    readers = {".npy": _numpy, ".safetensors": _safetensors, ".parquet": _parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path} is no file of rows: give one that ends in {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise InputError(f"{path} is no file: check --rows")
    return reader(path)


def _numpy(path: Path) -> Rows:
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(
            f"cannot read {path} ({error}): save it with numpy.save as floating numbers"
        ) from None
    if rows.dtype not in (np.float16, np.float32, np.float64):
        raise InputError(f"{path} holds {rows.dtype}: save it as float16, float32 or float64")
    return rows


def _safetensors(path: Path) -> Rows:
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            shapes = {name: file.get_slice(name).get_shape() for name in names}
            fitting = [name for name in names if len(shapes[name]) == 2]
            name = _one_of(path, "tensor", fitting, shapes)
            rows = file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read {path} ({error}): give a whole safetensors file") from None
    if rows.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise InputError(
            f"{name} in {path} is {rows.dtype}: save it as float16, bfloat16, float32 or float64"
        )
    return rows


def _parquet(path: Path) -> Rows:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise InputError(f"reading {path} needs pyarrow: pip install 'ndm-fast[data]'") from None
    types = pyarrow.types
    try:
        schema = parquet.read_schema(path)
        lists = [f.name for f in schema if _is_list(types, f.type) and types.is_floating(f.type.value_type)]
        numbers = [f.name for f in schema if types.is_floating(f.type)]
        names = [_one_of(path, "column", lists, {f.name: f.type for f in schema})] if lists else numbers
        if not names:
            shown = ", ".join(f"{f.name} ({f.type})" for f in schema)
            raise InputError(
                f"{path} holds {shown}: give a column of lists of floating numbers, or one a number"
            )
        table = parquet.read_table(path, columns=names)
        empty = next((name for name in names if table[name].null_count), None)
        if empty is not None:
            raise InputError(f"column {empty} of {path} has empty cells: leave such rows out")
        return _lists(path, names[0], table) if lists else _columns(table)
    except InputError:
        raise
    except Exception as error:  # pyarrow has many error types for a damaged file
        raise InputError(f"cannot read {path} ({error}): check that it is a whole parquet file") from None


def _is_list(types: Any, kind: Any) -> bool:
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _lists(path: Path, name: str, table: Any) -> Rows:
    """[N, d] of a column of lists."""
    import pyarrow.compute as compute

    column = table[name].combine_chunks()
    lengths = set(compute.unique(compute.list_value_length(column)).to_pylist())
    if len(lengths) > 1:
        raise InputError(
            f"the lists in column {name} of {path} have {min(lengths)} to {max(lengths)} numbers: give rows "
            "of one width"
        )
    values = compute.list_flatten(column)
    if values.null_count:
        raise InputError(f"column {name} of {path} has empty numbers: leave such rows out")
    return values.to_numpy(zero_copy_only=False).reshape(len(column), -1)


def _columns(table: Any) -> Rows:
    return np.stack([column.to_numpy() for column in table.columns], 1)


def _one_of(path: Path, what: str, fitting: list[str], everything: dict[str, Any]) -> str:
    """The name that is meant."""
    if len(fitting) == 1:
        return fitting[0]
    named = next((name for name in _NAMES if name in fitting), None)
    if named is None:
        shown = ", ".join(f"{name} {kind}" for name, kind in everything.items()) or "nothing"
        raise InputError(f"{path} holds {shown}: give one {what} of rows, or call it {_NAMES[0]}")
    return named
