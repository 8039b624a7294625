"""SAELens 6: a partition's directions as an SAE-like object, and what SAELens saved for ``evaluate sae``.

    sae = as_sae(partition, rows)                         # a sae_lens.StandardSAE of 2 d features
    sae.save_model("ndm-sae")                             # SAE.load_from_disk("ndm-sae") reads it back

What :func:`as_sae` makes is an exact change of basis in the dress of an SAE, so that dashboards can show
which texts lie far out along a subspace's directions. It was not trained to be sparse and it is not: on every
token half of its features are active. Its scores for sparsity and reconstruction say nothing about the
partition.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ndm_fast.adapters.packages import needed
from ndm_fast.errors import InputError
from ndm_fast.geometry.orthogonal import principal_components
from ndm_fast.partition import SubspacePartition


def as_sae(partition: SubspacePartition, rows: Tensor) -> Any:
    """A ``sae_lens.StandardSAE`` whose features are the principal directions of every subspace, both ways.

    Feature ``2 c`` is how far an activation lies from the mean along column c, feature ``2 c + 1`` how far
    the other way; the columns are those of the partition, turned inside each subspace to its principal axes.
    ``sae.cfg.metadata["ndm_subspaces"]`` has each feature's subspace.

    Args:
        rows: [n, d] activations of the site, n at least 2: mean and principal axes are theirs.

    Raises:
        InputError: rows of another width, fewer than two, or SAELens is not installed.
    """
    package = needed("sae_lens", "sae-lens")
    if rows.ndim != 2 or len(rows) < 2 or rows.shape[1] != partition.width:
        raise InputError(
            f"rows have shape {list(rows.shape)}: give at least two activations, {partition.width} wide"
        )
    rows = rows.detach().float().to(partition.rotation.device)
    axes = torch.cat(
        [
            partition.basis(s) @ principal_components(coordinates)
            for s, coordinates in enumerate(partition.split(rows))
        ],
        1,
    ).T
    both_ways = torch.stack([axes, -axes], 1).flatten(0, 1)  # [2 d, d]
    source = partition.source
    metadata = needed("sae_lens.saes.sae", "sae-lens").SAEMetadata(
        model_name=source.get("model"),
        hook_name=source.get("site"),
        made_by="ndm-fast: principal directions of a subspace partition, not a trained autoencoder",
        ndm_widths=list(partition.widths),
        ndm_subspaces=[s for s, width in enumerate(partition.widths) for _ in range(2 * width)],
    )
    sae = package.StandardSAE(
        package.StandardSAEConfig(d_in=partition.width, d_sae=2 * partition.width, metadata=metadata)
    )
    weights = {
        "W_enc": both_ways.T,
        "W_dec": both_ways,
        "b_enc": torch.zeros(2 * partition.width),
        "b_dec": rows.mean(0),
    }
    sae.load_state_dict({name: value.cpu().contiguous() for name, value in weights.items()})
    return sae


def directions(sae: Any) -> Tensor:
    """[F, d] unit directions of the features of a SAELens SAE, for ``compare_autoencoder``.

    Raises:
        InputError: it has no decoder ``W_dec``.
    """
    decoder = getattr(sae, "W_dec", None)
    if not isinstance(decoder, Tensor):
        raise InputError(f"{type(sae).__name__} has no decoder W_dec: give an SAE of SAELens")
    return torch.nn.functional.normalize(decoder.detach().float().cpu(), dim=1)
