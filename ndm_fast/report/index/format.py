"""PreimageIndex: activations with their tokens on disk, rotated by a partition, ready to be searched.

A folder of ``rows-00000.safetensors`` ..., each with some tens of thousands of rows and the text they come
from, ``partition.safetensors``, ``pieces.json`` (tokens for display) and ``manifest.json`` with checksums.
It is written under another name and renamed when it is whole. An index for the identity partition is a
plain cache of activations; :meth:`PreimageIndex.batches` gives them back, to build an index for another.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ndm_fast.activations.rows import TokenRows
from ndm_fast.errors import InputError
from ndm_fast.files import digest, read_json
from ndm_fast.partition import SubspacePartition
from ndm_fast.report.index.rows import RotatedRows, Shard
from ndm_fast.report.index.tokens import Piece

FORMAT = 1
"""Of the files; an index of another format is refused."""


MANIFEST, PARTITION, PIECES = "manifest.json", "partition.safetensors", "pieces.json"


_BUILD_AGAIN = "build it again with `ndm-fast index RUN`"

_MANIFEST = {
    "format": int,
    "widths": [int],
    "spread": [float],
    "source": {str: object},
    "files": {str: {"bytes": int, "sha256": str}},
}


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


class PreimageIndex:
    """An index on disk; its rows are mapped into memory, not read.

    Args:
        folder: as given to ``index_writer.build_index``.
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
            about = _map(self.folder / PARTITION)
            pieces = read_json(self.folder / PIECES, {str: [object]}, remedy=_BUILD_AGAIN, seal=False)
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
        except InputError:
            raise
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
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
        neighbors = torch.nn.functional.pad(self.tokens, (1, 1), value=-1)
        return TokenRows(
            self.stored(index),
            self.tokens[sequence, position],
            neighbors[sequence, position],
            neighbors[sequence, position + 2],
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


def unfinished(folder: Path) -> Path:
    """Where an index is while it is written."""
    return folder.with_name(f".{folder.name}.unfinished")


def replaced(folder: Path) -> Path:
    """Where the index before is while another takes its place."""
    return folder.with_name(f".{folder.name}.replaced")


def _read_manifest(folder: Path) -> dict[str, Any]:
    build = "build it with `ndm-fast index RUN`"
    if not folder.is_dir():
        state = "was not finished" if unfinished(folder).exists() else "does not exist"
        raise InputError(f"the index {folder} {state}: {build}")
    try:
        manifest = read_json(folder / MANIFEST, {"format": int}, remedy=f"{build} again")
        if manifest["format"] != FORMAT:
            raise InputError(
                f"the index {folder} has format {manifest['format']}, not {FORMAT}: {build} again"
            )
        return read_json(folder / MANIFEST, _MANIFEST, remedy=f"{build} again")
    except FileNotFoundError:
        raise InputError(f"{folder} is no index (it has no {MANIFEST}): delete it, then {build}") from None


def _check_files(folder: Path, files: dict[str, dict[str, Any]], verify: bool) -> None:
    for name, about in files.items():
        path = folder / name
        if not path.is_file():
            raise _damaged(path, "missing")
        if path.stat().st_size != about["bytes"]:
            raise _damaged(path, f"{path.stat().st_size} bytes instead of {about['bytes']}")
        if verify and digest(path) != about["sha256"]:
            raise _damaged(path, "its checksum does not match")


def _damaged(path: Path, why: str) -> InputError:
    return InputError(f"the index is damaged at {path} ({why}): {_BUILD_AGAIN}")


def _map(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
