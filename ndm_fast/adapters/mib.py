"""MIB's causal-variable track: a partition as a featurizer, in the track's file layout.

    write_featurizer(partition, [3], "submission/ioi_task_GPT2LMHeadModel_output_token", token="last_token")

The track (Mueller et al. 2025, arXiv 2504.13151) reads three files for each place in the model: the
featurizer, its inverse, and which of its features are swapped. A subspace of ours is their
``SubspaceFeaturizerModule``: features ``x B`` with orthonormal columns ``B``, the rest of ``x`` as the error
term. Nothing beside torch is needed to write them; their loader is on GitHub and on no package index.
(The package ``causalab`` of PyPI, 0.0.1, is another project without content.)
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ndm_fast.activations.site import canonical_name, parse
from ndm_fast.errors import InputError
from ndm_fast.files import unwritable, write_atomic
from ndm_fast.partition import SubspacePartition

_TOKEN = re.compile(r"[^,()/\s]+")


def write_featurizer(
    partition: SubspacePartition,
    subspaces: Sequence[int],
    folder: str | Path,
    *,
    token: str,
    site: str | None = None,
) -> tuple[Path, Path, Path]:
    """Write some subspaces together as one featurizer of the residual stream.

    Args:
        subspaces: their columns, side by side, are the features.
        folder: ``{TASK}_{MODEL}_{VARIABLE}`` in the track; it is made.
        token: name of the token position, one of those that the task defines, for instance ``last_token``.
        site: a resid_pre, or a resid_post, which the track calls the input of the block after it; default the
            one that the partition names.

    Returns:
        The files ``ResidualStream(Layer-L,Token-T)_featurizer``, ``..._inverse_featurizer``, ``..._indices``.

    Raises:
        InputError: no such subspace, a site that the track does not have, or the folder cannot be written to.
    """
    if not subspaces or len(set(subspaces)) < len(subspaces):
        raise InputError(f"subspaces {list(subspaces)}: give at least one, each once")
    if not _TOKEN.fullmatch(token):
        raise InputError(
            f"token position {token!r} cannot be part of a file's name: give for instance last_token"
        )
    basis = torch.cat([partition.basis(s) for s in subspaces], 1).cpu()
    unit = f"ResidualStream(Layer-{_layer(site or partition.source.get('site', ''))},Token-{token})"
    info = {
        "featurizer_class": "SubspaceFeaturizerModule",
        "inverse_featurizer_class": "SubspaceInverseFeaturizerModule",
        "n_features": basis.shape[1],
        "additional_config": {"rotation_matrix": basis, "requires_grad": False},
    }
    checkpoint = _saved({"model_info": info, "state_dict": _state(basis)})
    place = Path(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(place, error) from None
    contents = {"featurizer": checkpoint, "inverse_featurizer": checkpoint, "indices": b"null"}
    paths = [place / f"{unit}_{kind}" for kind in contents]
    for path, content in zip(paths, contents.values(), strict=True):
        write_atomic(path, content)
    return paths[0], paths[1], paths[2]


def _layer(site: str) -> int:
    """The block at whose input the track has a site."""
    point = parse(canonical_name(site))
    if point is None or point[1] not in ("resid_pre", "resid_post"):
        raise InputError(
            f"the track has the residual stream between blocks, not {site or 'an unnamed site'}: give a site "
            "such as blocks.9.hook_resid_pre or blocks.8.hook_resid_post"
        )
    return point[0] + (point[1] == "resid_post")


class _Rotate(nn.Module):
    """Holds [d, k] orthonormal columns as pyvene's ``LowRankRotateLayer`` does."""

    def __init__(self, basis: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(basis.clone())


def _state(basis: Tensor) -> dict[str, Tensor]:
    """State of both featurizer modules: the columns under torch's orthogonal parametrisation."""
    with torch.random.fork_rng(devices=[]):  # it completes the columns to a square matrix at random
        torch.manual_seed(0)
        rotate = nn.utils.parametrizations.orthogonal(_Rotate(basis))
    return {f"rotate.{name}": value.detach().clone() for name, value in rotate.state_dict().items()}


def _saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()
