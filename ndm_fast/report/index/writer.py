"""How a ``PreimageIndex`` is made: harvested or read batches, rotated, in shards, with checksums."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ndm_fast.activations.models import load_tokenizer
from ndm_fast.activations.rows import HarvestedRows
from ndm_fast.errors import InputError
from ndm_fast.files import digest, unwritable, write_atomic, write_json
from ndm_fast.locks import LOCK_FILE, locked
from ndm_fast.partition import SubspacePartition
from ndm_fast.report.index.format import (
    FORMAT,
    MANIFEST,
    PARTITION,
    PIECES,
    PreimageIndex,
    TextBatch,
    replaced,
    unfinished,
)
from ndm_fast.report.index.tokens import token_pieces
from ndm_fast.run.folder import RunFolder
from ndm_fast.run.source_text import run_text

_ROWS_PER_SHARD = 65536


DTYPES = {"float16": torch.float16, "float32": torch.float32}


def run_index(
    folder: RunFolder, *, rows: int, dtype: str = "float16", rebuild: bool = False, device: str = "cpu"
) -> PreimageIndex:
    """The index of a run's partition; built from the run's cache or model, and its text, where there is none.

    Args:
        rows: activations in an index that is built, from the start of the text (the held-out ones first).
        rebuild: build it even where there is one.

    Raises:
        InputError: the run is not finished, or its index is damaged or of another partition.
    """
    partition = folder.partition()
    _sweep_after_kill(folder.index_folder)
    if folder.index_folder.exists() and not rebuild:
        index = PreimageIndex(folder.index_folder)
        if not index.partition.rotation.equal(partition.rotation) or index.rows.widths != partition.widths:
            raise InputError(
                f"{index.folder} was built for another partition than the one in {folder.path}: build it "
                f"again with `ndm-fast index {folder.path}`"
            )
        return index
    config = folder.config()
    batches = text_batches(run_text(config, rows, device), rows)
    tokenizer = load_tokenizer(config.harvest.model, **config.harvest.hub_options)
    return build_index(batches, partition, folder.index_folder, tokenizer, dtype=dtype)


def text_batches(harvested: Iterable[HarvestedRows], rows: int) -> Iterator[TextBatch]:
    """What was harvested, until ``rows`` activations or its end; the last batch is cut."""
    held = 0
    for packed, kept, found, _ in harvested:
        place = kept.flatten().nonzero()[:, 0][: rows - held]
        yield TextBatch(found.activations[: len(place)], place, packed.tokens, packed.documents)
        held += len(place)
        if held == rows:
            return


def build_index(
    batches: Iterable[TextBatch],
    partition: SubspacePartition,
    folder: Path,
    tokenizer: Any,
    *,
    dtype: str = "float16",
    rows_per_shard: int = _ROWS_PER_SHARD,
) -> PreimageIndex:
    """Write an index into ``folder``, in place of one that is there; nothing is left where it fails.

    Args:
        batches: as from :func:`text_batches` or :meth:`PreimageIndex.batches`.
        dtype: the rows are stored in: float16, or float32 for rows exactly as they were harvested.

    Raises:
        InputError: no activations came, a value overflows float16, or the folder cannot be written to.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}: take one of {', '.join(DTYPES)}")
    if folder.exists() and not (folder / MANIFEST).exists():
        raise InputError(f"{folder} exists and is no index: delete it, or choose another folder")
    building = unfinished(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder, _lock_file(folder)):
            try:
                _sweep(folder)
                building.mkdir()
                writer = _Writer(building, partition, dtype, rows_per_shard)
                for batch in batches:
                    writer.add(batch)
                writer.finish(tokenizer)
                if folder.exists():
                    folder.rename(replaced(folder))
                building.rename(folder)
            finally:
                _sweep(folder)
    except OSError as error:
        raise unwritable(folder, error) from None
    return PreimageIndex(folder, verify=False)


def _lock_file(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}{LOCK_FILE}")


def _sweep(folder: Path) -> None:
    """Delete what is no index, or no longer; an index that was to be replaced, but was not, comes back."""
    old, building = replaced(folder), unfinished(folder)
    if old.exists() and not folder.exists():
        old.rename(folder)
    for leftover in (old, building):
        shutil.rmtree(leftover, ignore_errors=True)


def _sweep_after_kill(folder: Path) -> None:
    """Also while nothing is to be built."""
    lock = _lock_file(folder)
    if any(path.exists() for path in (lock, replaced(folder), unfinished(folder))):
        with suppress(InputError), locked(folder, lock):  # else it is being built just now
            _sweep(folder)


class _Writer:
    def __init__(self, folder: Path, partition: SubspacePartition, dtype: str, rows_per_shard: int) -> None:
        self._folder, self._partition, self._dtype = folder, partition, dtype
        self._rows_per_shard = rows_per_shard
        self._files: dict[str, dict[str, Any]] = {}
        self._pending: list[TextBatch] = []
        self._pending_rows = 0
        self._rows = self._sequences = self._shards = 0
        self._length = 0
        self._origin = torch.zeros(partition.width)
        self._sums = torch.zeros(2, partition.width, dtype=torch.float64)
        self._tokens: set[int] = set()

    def add(self, batch: TextBatch) -> None:
        if len(batch.place) == 0:
            return
        self._pending.append(batch)
        self._pending_rows += len(batch.place)
        if self._pending_rows >= self._rows_per_shard:
            self._write_shard()

    def finish(self, tokenizer: Any) -> None:
        if self._pending:
            self._write_shard()
        if self._rows == 0:
            raise InputError("the text gave no activations: give more text, or lower --context-length")
        mean = self._sums[0] / self._rows
        spread = (self._sums[1] / self._rows - mean.square()).clamp_min(0)
        parts = spread.split(list(self._partition.widths))
        self._write_tensors(PARTITION, {"rotation": self._partition.rotation, "origin": self._origin})
        pieces = token_pieces(tokenizer, sorted(self._tokens))
        self._write(PIECES, json.dumps(pieces).encode())
        manifest = {
            "format": FORMAT,
            "rows": self._rows,
            "width": self._partition.width,
            "widths": list(self._partition.widths),
            "spread": [float(part.sum().sqrt()) for part in parts],
            "dtype": self._dtype,
            "context_length": self._length,
            "source": self._partition.source,
            "files": self._files,
        }
        write_json(self._folder / MANIFEST, manifest, seal=True)

    def _write_shard(self) -> None:
        batches, self._pending, self._pending_rows = self._pending, [], 0
        rotated = torch.cat([self._partition.rotate(batch.activations.float().cpu()) for batch in batches])
        if self._shards == 0:
            self._origin = rotated.mean(0)
        rotated -= self._origin
        rows = rotated.to(DTYPES[self._dtype])
        if not rows.isfinite().all():
            raise InputError(
                f"an activation of {float(rotated.abs().max()):.3g} overflows {self._dtype} (or is not "
                "finite): store the index in float32 with --dtype float32"
            )
        self._sums += torch.stack([rotated.sum(0, dtype=torch.float64), rotated.double().square().sum(0)])
        places, self._length = [], batches[0].tokens.shape[1]
        for batch in batches:
            places.append(batch.place + self._sequences * self._length)
            self._sequences += len(batch.tokens)
        tokens = torch.cat([batch.tokens for batch in batches])
        self._tokens.update(tokens.unique().tolist())
        squares, inverse_norms = _lengths(rows, self._origin, self._partition.widths)
        self._write_tensors(
            f"rows-{self._shards:05}.safetensors",
            {
                "rows": rows,
                "squares": squares,
                "inverse_norms": inverse_norms,
                "place": torch.cat(places),
                "tokens": tokens.int(),
                "documents": torch.cat([batch.documents for batch in batches]).int(),
            },
        )
        self._shards += 1
        self._rows += len(rows)

    def _write_tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        self._write(name, save({key: tensor.contiguous() for key, tensor in tensors.items()}))

    def _write(self, name: str, content: bytes) -> None:
        write_atomic(self._folder / name, content)
        self._files[name] = {"bytes": len(content), "sha256": digest(content)}


def _lengths(rows: Tensor, origin: Tensor, widths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """[S, n] each: squared norm of the stored parts, and one over the norm with the origin added back."""
    squares, inverse_norms = [], []
    for part, start in zip(rows.split(list(widths), 1), origin.split(list(widths)), strict=True):
        exact = part.double()
        squares.append(exact.square().sum(1))
        norms = (exact + start.double()).norm(dim=1)
        inverse_norms.append(torch.where(norms > 0, 1 / norms, 0))
    return torch.stack(squares).float(), torch.stack(inverse_norms).float()
