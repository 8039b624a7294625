"""Subspaces beside a sparse autoencoder: do its features lie inside them, and do its clusters agree?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ndm_fast.activations.site import canonical_name, parse
from ndm_fast.errors import InputError
from ndm_fast.evaluate.baselines import baseline_partition
from ndm_fast.evaluate.stability import match_subspaces
from ndm_fast.files import parse_json
from ndm_fast.partition import SubspacePartition
from ndm_fast.seeds import Draw, seeded

_WEIGHTS, _SETTINGS = "sae_weights.safetensors", "cfg.json"
"""What SAELens saves an autoencoder as."""


_NAMES = ("W_dec", "decoder.weight", "decoder", "W_D")


_ROUNDS = 50


def read_decoder(path: str | Path, width: int, name: str | None = None) -> Tensor:
    """[F, d] unit directions of an autoencoder's features, from a safetensors file or a folder of SAELens.

    Args:
        width: d. name: of the tensor; default the usual names. [d, F] is turned over.

    Raises:
        InputError: the file cannot be read, holds no such matrix, or one for other coordinates.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / _WEIGHTS).is_file():
            raise InputError(f"{path} holds no {_WEIGHTS}: give a folder of SAELens's save_model, or a file")
        if _settings(path).get("normalize_activations") == "covariance_whitening":
            raise InputError(
                f"the decoder in {path} is for whitened activations, not for those of the site: give an "
                "autoencoder that was trained without covariance_whitening"
            )
        path = path / _WEIGHTS
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read {path} ({error}): give a safetensors file") from None
    found = next((key for key in ([name] if name else _NAMES) if key in tensors), None)
    if found is None:
        raise InputError(f"{path} holds {', '.join(tensors) or 'nothing'}: name the decoder with --tensor")
    matrix = tensors[found].float()
    if matrix.ndim != 2 or width not in matrix.shape:
        raise InputError(
            f"{found} has shape {list(matrix.shape)}, none of it {width}: give a decoder of this site"
        )
    directions = matrix if matrix.shape[1] == width else matrix.T
    return torch.nn.functional.normalize(directions, dim=1)


def decoder_site(path: str | Path) -> str | None:
    """The site that a folder of SAELens names, where it does.

    Raises:
        InputError: its settings are damaged.
    """
    settings = _settings(Path(path))
    about = settings.get("metadata")
    name = (about if isinstance(about, dict) else settings).get("hook_name")
    return name if isinstance(name, str) else None


def same_place(site: str, other: str) -> bool:
    """Whether two sites hold the same tensor: one name, or a block's output and the next one's input."""
    return _between_blocks(site) == _between_blocks(other)


def _between_blocks(site: str) -> str:
    point = parse(site)
    if point is None or point[1] != "resid_post":
        return canonical_name(site)
    return f"blocks.{point[0] + 1}.hook_resid_pre"


def _settings(folder: Path) -> dict[str, Any]:
    """What a folder of SAELens says about its autoencoder; nothing where it is no such folder."""
    try:
        return parse_json((folder / _SETTINGS).read_bytes(), {}, seal=False)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {folder / _SETTINGS} ({error}): save the autoencoder again") from None


def cluster_directions(directions: Tensor, groups: int, seed: int = 0) -> Tensor:
    """[F] group of each direction: k-means by absolute cosine, each centre the leading axis of its group.

    Args:
        directions: [F, d] unit rows, F at least ``groups``.
    """
    if not 1 <= groups <= len(directions):
        raise InputError(f"{len(directions)} features cannot form {groups} groups: give a larger autoencoder")
    generator = seeded(seed, Draw.AUTOENCODER_CLUSTERS)
    centres = directions[torch.randperm(len(directions), generator=generator)[:groups]]
    assigned = torch.full((len(directions),), -1)
    for _ in range(_ROUNDS):
        closeness = (directions @ centres.T).abs()
        nearest = closeness.argmax(1)
        if torch.equal(nearest, assigned):
            break
        assigned = nearest
        for group in range(groups):
            members = directions[assigned == group]
            if len(members):
                centres[group] = torch.linalg.svd(members, full_matrices=False)[2][0]
            else:  # an empty group takes the direction that fits its own worst
                centres[group] = directions[closeness.max(1).values.argmin()]
    return assigned


def cluster_partition(directions: Tensor, groups: Tensor, widths: tuple[int, ...]) -> SubspacePartition:
    """A partition whose subspaces follow groups of directions, the largest group first.

    Each group gives its leading axes, as many as its subspace is wide; the nearest orthogonal matrix to all
    of them together is taken, so that no group comes before another.
    """
    counts = torch.bincount(groups, minlength=len(widths))
    columns = []
    for width, group in zip(widths, counts.argsort(descending=True).tolist(), strict=True):
        members = directions[groups == group]
        columns.append(torch.linalg.svd(members.double(), full_matrices=True)[2][:width].T)
    u, _, v = torch.linalg.svd(torch.cat(columns, 1))
    return SubspacePartition(u @ v, widths, {"baseline": "autoencoder clusters"})


def compare_autoencoder(partition: SubspacePartition, decoder: Tensor, seed: int = 0) -> list[dict[str, Any]]:
    """How well features of an autoencoder lie within single subspaces, for NDM, clusters and baselines.

    Args:
        decoder: [F, d] unit rows, as from :func:`read_decoder`.

    Returns:
        A row per method: ``mean_top_energy``, the mean over features of the largest share of a feature's
        energy in one subspace, and ``overlap_with_ndm``, the score of :func:`match_subspaces`.
    """
    groups = cluster_directions(decoder, len(partition), seed)
    methods = {
        "ndm": partition,
        "autoencoder_clusters": cluster_partition(decoder, groups, partition.widths),
        "identity": baseline_partition("identity", partition.widths, decoder),
        "random": baseline_partition("random", partition.widths, decoder, seed),
    }
    rows = []
    for kind, method in methods.items():
        energy = torch.stack([part.square().sum(1) for part in method.split(decoder)], 1)
        rows.append(
            {
                "method": kind,
                "mean_top_energy": float(energy.max(1).values.mean()),
                "overlap_with_ndm": match_subspaces(partition, method).score,
            }
        )
    return rows
