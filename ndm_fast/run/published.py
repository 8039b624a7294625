"""Partitions in the format of the paper's authors.

``R-<model>-<site>.pt`` has ``R_config-<model>-<site>.json`` beside it. The matrix lies in a torch dictionary
under ``R.parametrizations.weight.0.base`` and is used as ``h @ R``; the JSON file holds
``{"partition": [widths]}``.
"""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path

import torch
from torch import Tensor

from ndm_fast.errors import InputError
from ndm_fast.files import unwritable, write_atomic, write_json
from ndm_fast.partition import SubspacePartition
from ndm_fast.train.rotation.exp import ExpRotation

_MATRIX = "R.parametrizations.weight.0.base"


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
    try:
        widths = json.loads(config_file.read_text())["partition"]
        widths = [int(width) for width in widths]
    except OSError as error:
        raise InputError(
            f"cannot read {config_file} ({error.strerror}): the widths of {path.name} are kept there"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f'{config_file} holds no {{"partition": [widths]}}: get the file that came with {path.name}'
        ) from None
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
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}): check the path") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{path} is no plain torch dictionary of tensors ({reason}): download it again"
        ) from None
    matrix = content.get(_MATRIX) if isinstance(content, dict) else None
    if not isinstance(matrix, Tensor):
        raise InputError(
            f"{path} holds no tensor {_MATRIX!r}: give a file R-<model>-<site>.pt of the authors"
        )
    return matrix
