"""Partitions in the format of the paper's authors.

``R-<model>-<site>.pt`` has ``R_config-<model>-<site>.json`` beside it. The matrix lies in a torch dictionary
under ``R.parametrizations.weight.0.base`` and is used as ``h @ R``; the JSON file holds
``{"partition": [widths]}``.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from ndm_fast.errors import InputError
from ndm_fast.files import read_json, unwritable, write_atomic, write_json
from ndm_fast.partition import SubspacePartition
from ndm_fast.train.rotation.exp import ExpRotation

_MATRIX = "R.parametrizations.weight.0.base"

_SMALL = 1 << 20
"""Bytes that any file may unpack to."""


def import_published(path: str | Path) -> SubspacePartition:
    """The partition in ``R-<model>-<site>.pt`` and the JSON file beside it.

    Model and site are noted in its ``source``. Only tensors are unpickled.

    Raises:
        InputError: a file is missing or damaged, or the matrix is not orthogonal.
    """
    path = Path(path)
    model, site = _parts(path)
    rotation = _matrix(path)
    config_file = _config_file(path)
    remedy = f'get the file {{"partition": [widths]}} that came with {path.name}'
    try:
        widths = read_json(config_file, {"partition": [int]}, remedy=remedy, seal=False)["partition"]
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{config_file} is missing: {remedy}") from None
    return SubspacePartition(rotation, widths, {"model": model, "site": site, "imported_from": path.name})


def export_published(partition: SubspacePartition, path: str | Path) -> list[Path]:
    """Write a partition as the authors do, for their code to load; returns both files.

    Args:
        path: ``FOLDER/R-<model>-<site>.pt``; the JSON file goes beside it.
    """
    path = Path(path)
    _parts(path)
    state = ExpRotation(partition.rotation).state_dict()
    tensors = {name.replace("layer.", "R.", 1): tensor.cpu() for name, tensor in state.items()}
    content = io.BytesIO()
    torch.save(tensors, content)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(path.parent, error) from None
    write_atomic(path, content.getvalue())
    write_json(_config_file(path), {"partition": list(partition.widths)})
    return [path, _config_file(path)]


def _parts(path: Path) -> tuple[str, str]:
    """Model and site that a file name speaks of."""
    kind, _, rest = path.name.removesuffix(".pt").partition("-")
    model, _, site = rest.rpartition("-")
    if kind != "R" or not model or not site or path.suffix != ".pt":
        raise InputError(f"{path.name} is not named R-<model>-<site>.pt, as in R-gpt2-x4.post.pt: rename it")
    return model, site


def _config_file(path: Path) -> Path:
    return path.with_name("R_config" + path.name.removeprefix("R").removesuffix(".pt") + ".json")


def _matrix(path: Path) -> Tensor:
    _check_size(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}): check the path") from None
    except MemoryError:
        raise
    except Exception as error:  # a damaged file makes torch raise nearly anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{path} is no plain torch dictionary of tensors ({reason}): download it again"
        ) from None
    matrix = content.get(_MATRIX) if isinstance(content, dict) else None
    if not isinstance(matrix, Tensor):
        raise InputError(
            f"{path} holds no tensor {_MATRIX!r}: give a file R-<model>-<site>.pt of the authors"
        )
    if odd := _oddity(matrix):
        raise InputError(f"the matrix in {path} is {odd}: save it again as a dense one of real numbers")
    return matrix


def _check_size(path: Path) -> None:
    """Refuse a small file that unpacks to a large one; torch itself packs nothing."""
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(part.file_size for part in archive.infolist())
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        return  # torch says more about it
    if unpacked > 2 * path.stat().st_size + _SMALL:
        raise InputError(
            f"{path} is {path.stat().st_size:,} bytes and unpacks to {unpacked:,}, which no file of torch "
            "does: download it again"
        )


def _oddity(matrix: Tensor) -> str | None:
    """What keeps a tensor from being a matrix to compute with."""
    if matrix.is_meta:
        return "without values (on the meta device)"
    if matrix.layout != torch.strided:
        return "sparse"
    if matrix.is_quantized:
        return "quantised"
    if matrix.is_complex() or not matrix.is_floating_point():
        return f"of {matrix.dtype}"
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
        return f"of shape {list(matrix.shape)}"
    if matrix.numel() * matrix.element_size() > matrix.untyped_storage().nbytes():
        return f"of shape {list(matrix.shape)} but has {matrix.untyped_storage().nbytes()} bytes"
    return None
