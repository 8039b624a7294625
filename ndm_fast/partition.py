"""SubspacePartition: an orthogonal rotation and the widths of the subspaces it uncovers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelHubMixin, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from ndm_fast.errors import InputError
from ndm_fast.files import digest, read_json, write_atomic, write_json

ORTHOGONALITY_TOLERANCE = 1e-4
"""Largest ``|RᵀR - I|`` accepted from outside; our own rotations stay within 1e-5."""

WEIGHTS_NAME = "partition.safetensors"


CONFIG_NAME = "config.json"


_CONFIG = {"widths": [int], "source": {str: object}, "weights_sha256": str}
_AGAIN = "save or download it again"


def orthogonality_error(rotation: Tensor) -> float:
    """Largest absolute entry of ``RᵀR - I`` in float64, for a [d, d] rotation."""
    product = rotation.double().T @ rotation.double()
    product.diagonal().sub_(1)
    return float(product.abs().max())


def merged_order(widths: Sequence[int], pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Old subspaces that make up each new one after disjoint ``pairs`` merge, in order of falling width."""
    groups = {s: [s] for s in range(len(widths))}
    free = set(groups)
    for a, b in pairs:
        if a == b or not {a, b} <= free:
            raise InputError(
                f"pair ({a}, {b}) cannot merge: give disjoint pairs of the {len(widths)} subspaces"
            )
        free -= {a, b}
        groups[min(a, b)] = sorted(groups.pop(a) + groups.pop(b))
    return sorted(groups.values(), key=lambda group: (-sum(widths[s] for s in group), group[0]))


HUB_ABOUT: dict[str, Any] = {
    "library_name": "ndm_fast",
    "license": "apache-2.0",
    "tags": ["interpretability", "ndm", "subspaces"],
}
"""What every card on the hub says."""


class SubspacePartition(
    nn.Module,
    ModelHubMixin,
    library_name=HUB_ABOUT["library_name"],
    tags=[*HUB_ABOUT["tags"]],
    license=HUB_ABOUT["license"],
    paper_url="https://arxiv.org/abs/2508.01916",
):
    """An orthogonal rotation of activations, and contiguous subspaces of the rotated coordinates.

    Args:
        rotation: [d, d] orthogonal; activations ``h`` ([..., d], rows) rotate as ``h @ rotation``.
        widths: widths of the S subspaces, in the order of the columns; they sum to d.
        source: where it came from (model, site, ...), plain JSON values, saved with it.

    Raises:
        InputError: the matrix is not square, not finite, not orthogonal, or does not fit the widths.
    """

    rotation: Tensor

    def __init__(self, rotation: Tensor, widths: Sequence[int], source: dict[str, Any] | None = None) -> None:
        super().__init__()
        widths = tuple(int(width) for width in widths)
        _check(rotation, widths)
        self.register_buffer("rotation", rotation.detach().clone().float())
        self.widths = widths
        self.source = dict(source or {})

    @property
    def width(self) -> int:
        """Width d of the activations."""
        return self.rotation.shape[0]

    @property
    def offsets(self) -> tuple[int, ...]:
        """First column of each subspace."""
        return tuple(sum(self.widths[:s]) for s in range(len(self.widths)))

    def __len__(self) -> int:
        return len(self.widths)

    def extra_repr(self) -> str:
        return f"width={self.width}, widths={list(self.widths)}"

    def basis(self, subspace: int) -> Tensor:
        """[d, p_s] orthonormal columns that span a subspace."""
        if not 0 <= subspace < len(self):
            raise InputError(f"subspace {subspace} does not exist: there are {len(self)}, counted from 0")
        start = self.offsets[subspace]
        return self.rotation[:, start : start + self.widths[subspace]]

    def rotate(self, activations: Tensor) -> Tensor:
        """[..., d] activations in rotated coordinates."""
        self._check_width(activations)
        return activations @ self.rotation.to(activations.dtype)

    def unrotate(self, coordinates: Tensor) -> Tensor:
        """[..., d] activations from rotated coordinates; the inverse of :meth:`rotate`."""
        self._check_width(coordinates)
        return coordinates @ self.rotation.T.to(coordinates.dtype)

    def split(self, activations: Tensor) -> tuple[Tensor, ...]:
        """Coordinates in every subspace: S tensors of [..., p_s]."""
        return self.rotate(activations).split(list(self.widths), dim=-1)

    def project(self, activations: Tensor, subspace: int) -> Tensor:
        """[..., d] the part of the activations that lies in one subspace; the parts sum to the whole."""
        self._check_width(activations)
        basis = self.basis(subspace).to(activations.dtype)
        return activations @ basis @ basis.T

    def merge(self, pairs: Iterable[tuple[int, int]]) -> SubspacePartition:
        """A partition in which each pair is one subspace, columns re-ordered so that widths descend.

        Args:
            pairs: disjoint pairs of subspaces.
        """
        ordered = merged_order(self.widths, pairs)
        columns = torch.cat([self.basis(s) for group in ordered for s in group], dim=1)
        return SubspacePartition(
            columns, [sum(self.widths[s] for s in group) for group in ordered], self.source
        )

    def orthogonality_error(self) -> float:
        """Largest absolute entry of ``RᵀR - I``."""
        return orthogonality_error(self.rotation)

    def _check_width(self, activations: Tensor) -> None:
        if activations.shape[-1] != self.width:
            raise InputError(
                f"activations are {activations.shape[-1]} wide, the partition is for {self.width}: "
                "take activations of the site it was trained on"
            )

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        model_card_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> str | None:
        """Save into a folder, which is made; options as for ``huggingface_hub``'s mixin."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        card = folder / "README.md"
        if not card.exists():  # the mixin would write it in place, and keep one that a kill has cut
            write_atomic(card, str(self.generate_model_card(**(model_card_kwargs or {}))).encode())
        return super().save_pretrained(folder, model_card_kwargs=model_card_kwargs, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        weights = save({"rotation": self.rotation.cpu().contiguous()})
        write_atomic(save_directory / WEIGHTS_NAME, weights)
        config = {"widths": list(self.widths), "width": self.width, "source": self.source}
        write_json(save_directory / CONFIG_NAME, {**config, "weights_sha256": digest(weights)}, seal=True)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        subfolder: str | None = None,
        **_: Any,
    ) -> SubspacePartition:
        def find(name: str) -> Path:
            local = Path(model_id) / name
            if Path(model_id).is_dir():
                if not local.is_file():
                    raise InputError(f"{local} is missing: {model_id} is not a saved partition")
                return local
            return Path(
                hf_hub_download(
                    model_id,
                    name,
                    subfolder=subfolder,
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    token=token,
                )
            )

        config = read_json(find(CONFIG_NAME), _CONFIG, remedy=_AGAIN)
        weights = find(WEIGHTS_NAME).read_bytes()
        if digest(weights) != config["weights_sha256"]:
            raise InputError(
                f"the partition in {model_id} is damaged (its checksum does not match): {_AGAIN}"
            )
        return cls(load(weights)["rotation"], config["widths"], config["source"])

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> SubspacePartition:
        """The partition in a folder or hub repository; options as for ``huggingface_hub``'s mixin.

        ``subfolder`` names one of a repository that holds several, a folder for each hook.

        Raises:
            InputError: there is none, or it is damaged.
        """
        place = Path(pretrained_model_name_or_path)
        name = str(place / (options.get("subfolder") or ""))
        if place.is_dir():
            place, options = Path(name), {**options, "subfolder": None}
        try:
            if options.get("subfolder"):  # the mixin would ask for a config.json at the root
                return cls._from_pretrained(model_id=str(place), **options)
            return super().from_pretrained(place, **options)
        except InputError:
            raise
        except (RepositoryNotFoundError, LocalEntryNotFoundError, HFValidationError):
            raise InputError(
                f"{name} is neither a folder nor a repository that can be read: check the name, and the "
                "network or HF_TOKEN"
            ) from None
        except EntryNotFoundError as error:
            raise InputError(f"{name} is not a saved partition ({error}): check the name") from None
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"the partition in {name} is damaged ({error}): {_AGAIN}") from None


def _check(rotation: Tensor, widths: tuple[int, ...]) -> None:
    if rotation.ndim != 2 or rotation.shape[0] != rotation.shape[1]:
        raise InputError(f"the rotation has shape {list(rotation.shape)}: give a square [d, d] matrix")
    if not widths or min(widths) < 1 or sum(widths) != rotation.shape[0]:
        raise InputError(
            f"widths {list(widths)} sum to {sum(widths)}, the rotation is {rotation.shape[0]} wide: "
            "give positive widths that sum to it"
        )
    error = orthogonality_error(rotation)
    if not error <= ORTHOGONALITY_TOLERANCE:
        raise InputError(
            f"the rotation is not orthogonal: |RᵀR - I| reaches {error:.2g}, at most "
            f"{ORTHOGONALITY_TOLERANCE:g} is allowed; "
            "orthogonalise it (for instance U Vᵀ of its SVD) or check that it was loaded whole"
        )
