"""PreimageIndex: activations with their tokens on disk, rotated by a partition, ready to be searched.

A folder of ``rows-00000.safetensors`` ..., each with some tens of thousands of rows and the text they come
from, ``partition.safetensors``, ``pieces.json`` (tokens for display) and ``manifest.json`` with checksums.
It is written under another name and renamed when it is whole. An index for the identity partition is a
plain cache of activations; :meth:`PreimageIndex.batches` gives them back, to build an index for another.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ndm_fast.checkpoint import unwritable, write_atomic, write_json
from ndm_fast.errors import InputError
from ndm_fast.evaluate.purity import TokenRows
from ndm_fast.harvest import ActivationStream
from ndm_fast.partition import SubspacePartition
from ndm_fast.report.search import RotatedRows, Shard
from ndm_fast.report.tokens import Piece, token_pieces

_FORMAT = 1
_MANIFEST, _PARTITION, _PIECES = "manifest.json", "partition.safetensors", "pieces.json"
_ROWS_PER_SHARD = 65536
DTYPES = {"float16": torch.float16, "float32": torch.float32}


class TextBatch(NamedTuple):
    """Activations and the rows of tokens they come from."""

    activations: Tensor
    """[n, d]."""
    place: Tensor
    """[n] int64: row of tokens times L, plus the position in it; ascending."""
    tokens: Tensor
    """[B, L] int64."""
    documents: Tensor
    """[B, L] int64 running number of the document of each token."""


def harvest_batches(stream: ActivationStream, rows: int) -> Iterator[TextBatch]:
    """Batches of a stream until they hold ``rows`` activations or the text ends; the last one is cut."""
    held = 0
    for packed, kept, found in stream.harvested_rows():
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
        batches: as from :func:`harvest_batches` or :meth:`PreimageIndex.batches`.
        dtype: the rows are stored in: float16, or float32 for rows exactly as they were harvested.

    Raises:
        InputError: no activations came, a value overflows float16, or the folder cannot be written to.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}: take one of {', '.join(DTYPES)}")
    if folder.exists() and not (folder / _MANIFEST).exists():
        raise InputError(f"{folder} exists and is no index: choose another folder")
    unfinished = _unfinished(folder)
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        writer = _Writer(unfinished, partition, dtype, rows_per_shard)
        for batch in batches:
            writer.add(batch)
        writer.finish(tokenizer)
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    except OSError as error:
        raise unwritable(folder, error) from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return PreimageIndex(folder, verify=False)


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
        self._write_tensors(_PARTITION, {"rotation": self._partition.rotation, "origin": self._origin})
        pieces = token_pieces(tokenizer, sorted(self._tokens))
        self._write(_PIECES, json.dumps(pieces).encode())
        manifest = {
            "format": _FORMAT,
            "rows": self._rows,
            "width": self._partition.width,
            "widths": list(self._partition.widths),
            "spread": [float(part.sum().sqrt()) for part in parts],
            "dtype": self._dtype,
            "context_length": self._length,
            "source": self._partition.source,
            "files": self._files,
        }
        write_json(self._folder / _MANIFEST, manifest)

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
        self._files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _lengths(rows: Tensor, origin: Tensor, widths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """[S, n] each: squared norm of the stored parts, and one over the norm with the origin added back."""
    squares, inverse_norms = [], []
    for part, start in zip(rows.split(list(widths), 1), origin.split(list(widths)), strict=True):
        exact = part.double()
        squares.append(exact.square().sum(1))
        norms = (exact + start.double()).norm(dim=1)
        inverse_norms.append(torch.where(norms > 0, 1 / norms, 0))
    return torch.stack(squares).float(), torch.stack(inverse_norms).float()


class PreimageIndex:
    """An index on disk; its rows are mapped into memory, not read.

    Args:
        folder: as given to :func:`build_index`.
        verify: read every file once and compare its checksum (about a second per gigabyte).

    Raises:
        InputError: there is none, it was not finished, or a file of it is damaged; the message names it.
    """

    def __init__(self, folder: str | Path, *, verify: bool = True) -> None:
        self.folder = Path(folder)
        self.manifest = _read_manifest(self.folder)
        _check_files(self.folder, self.manifest["files"], verify)
        names = sorted(name for name in self.manifest["files"] if name.startswith("rows-"))
        try:
            parts = [_map(self.folder / name) for name in names]
            about = _map(self.folder / _PARTITION)
            pieces = json.loads((self.folder / _PIECES).read_text())
            self.pieces = {int(number): Piece(*piece) for number, piece in pieces.items()}
            self.partition = SubspacePartition(
                about["rotation"], self.manifest["widths"], self.manifest["source"]
            )
            shards = [Shard(part["rows"], part["squares"], part["inverse_norms"]) for part in parts]
            self.rows = RotatedRows(shards, about["origin"], self.manifest["widths"])
            self._sequences = [len(part["tokens"]) for part in parts]
            self.place = torch.cat([part["place"] for part in parts])
            self.tokens = torch.cat([part["tokens"] for part in parts]).long()
            self.documents = torch.cat([part["documents"] for part in parts]).long()
            self.spread: list[float] = self.manifest["spread"]
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise _damaged(self.folder, str(error)) from None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def context_length(self) -> int:
        """Tokens in a row of text, L."""
        return self.tokens.shape[1]

    def position(self, index: Tensor) -> Tensor:
        """Position of the rows of these numbers in their rows of text."""
        return self.place[index] % self.context_length

    def norm(self, index: Tensor, subspace: int) -> Tensor:
        """[n] fp64 norm of these rows' parts in a subspace."""
        columns = self.rows.columns[subspace]
        return (self.rows.gather(index, columns) + self.rows.origin[columns].double()).norm(dim=1)

    def rotated(self, activations: Tensor) -> Tensor:
        """[n, d] activations as queries of ``search.nearest_rows``."""
        exact = activations.double() @ self.partition.rotation.double() - self.rows.origin.double()
        return exact.float()

    def stored(self, index: Tensor) -> Tensor:
        """[n, d] stored rows of these numbers as queries of ``search.nearest_rows``."""
        return self.rows.gather(index).float()

    def token_rows(self, index: Tensor) -> TokenRows:
        """The rows of these numbers with their tokens; activations rotated, less the origin, in fp32."""
        sequence, position = self.place[index] // self.context_length, self.position(index)
        neighbours = torch.nn.functional.pad(self.tokens, (1, 1), value=-1)
        return TokenRows(
            self.stored(index),
            self.tokens[sequence, position],
            neighbours[sequence, position],
            neighbours[sequence, position + 2],
            position,
            self.documents[sequence, position],
        )

    def batches(self) -> Iterator[TextBatch]:
        """All rows as raw activations with their text, to build an index for another partition."""
        row = sequence = 0
        for shard, sequences in zip(self.rows.shards, self._sequences, strict=True):
            yield TextBatch(
                self.partition.unrotate(shard.rows.float() + self.rows.origin),
                self.place[row : row + len(shard.rows)] - sequence * self.context_length,
                self.tokens[sequence : sequence + sequences],
                self.documents[sequence : sequence + sequences],
            )
            row, sequence = row + len(shard.rows), sequence + sequences


def _unfinished(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.unfinished")


def _read_manifest(folder: Path) -> dict[str, Any]:
    build = "build it with `ndm-fast index RUN`"
    if not folder.is_dir():
        state = "was not finished" if _unfinished(folder).exists() else "does not exist"
        raise InputError(f"the index {folder} {state}: {build}")
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        if manifest["format"] != _FORMAT:
            raise InputError(
                f"the index {folder} has format {manifest['format']}, not {_FORMAT}: {build} again"
            )
        if not isinstance(manifest["files"], dict):
            raise TypeError("no list of files")
    except FileNotFoundError:
        raise InputError(f"{folder} is no index (it has no {_MANIFEST}): {build}") from None
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder / _MANIFEST, str(error)) from None
    return manifest


def _check_files(folder: Path, files: dict[str, dict[str, Any]], verify: bool) -> None:
    for name, about in files.items():
        path = folder / name
        if not path.is_file():
            raise _damaged(path, "missing")
        if path.stat().st_size != about["bytes"]:
            raise _damaged(path, f"{path.stat().st_size} bytes instead of {about['bytes']}")
        if verify:
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while part := file.read(1 << 20):
                    digest.update(part)
            if digest.hexdigest() != about["sha256"]:
                raise _damaged(path, "its checksum does not match")


def _damaged(path: Path, why: str) -> InputError:
    return InputError(f"the index is damaged at {path} ({why}): build it again with `ndm-fast index RUN`")


def _map(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
