"""pyvene 0.1.8: an intervention made of a partition: rotate, swap subspaces, rotate back.

    config = pyvene.IntervenableConfig([representation(model, "x9.mid", partition)])
    intervenable = pyvene.IntervenableModel(config, model)
    _, patched = intervenable(
        base={"input_ids": tokens},
        sources=[{"input_ids": counterfactuals}],
        unit_locations={"sources->base": 5},              # the position, counted in the padded rows
        subspaces=[[[3]] * len(tokens)],                  # the subspace, for every prompt
    )

The intervention is pyvene's own ``RotatedSpaceIntervention``, so it can be trained on from there: DAS that
starts from a partition.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ndm_fast.activations.layout import PLAIN
from ndm_fast.activations.sites import resolve_site, site_width
from ndm_fast.adapters.packages import needed
from ndm_fast.errors import InputError
from ndm_fast.partition import SubspacePartition


def intervention(partition: SubspacePartition) -> Any:
    """A ``pyvene.RotatedSpaceIntervention`` with the partition's rotation; its subspaces are the partition's.

    Raises:
        InputError: pyvene is not installed.
    """
    columns = [
        [start, start + width] for start, width in zip(partition.offsets, partition.widths, strict=True)
    ]
    made = needed("pyvene", "pyvene").RotatedSpaceIntervention(
        embed_dim=partition.width, subspace_partition=columns
    )
    made.rotate_layer.weight = partition.rotation.clone()
    return made.to(partition.rotation.device)


def representation(model: nn.Module, site: str, partition: SubspacePartition) -> Any:
    """A ``pyvene.RepresentationConfig`` that patches subspaces at a site.

    Args:
        model: Hugging Face model, as given to ``pyvene.IntervenableModel``.
        site: in any form of ``ndm_fast.activations.sites``.

    Raises:
        InputError: no such site, one that pyvene cannot address, or one of another width than the partition.
    """
    found = resolve_site(model, site)
    if not found.is_whole_tensor:
        inside = found.layout == PLAIN and found.counted_in is None
        remedy = "take a resid_pre or resid_post" if inside else "take another model, or our own hooks"
        raise InputError(
            f"pyvene cannot address {found.name} of this model, which is no module's tensor [B, T, d] as it "
            f"is: {remedy}"
        )
    width = site_width(model, found)
    if width != partition.width:
        raise InputError(
            f"{found.name} is {width} wide, the partition is for {partition.width}: take the site it was "
            "trained on"
        )
    return needed("pyvene", "pyvene").RepresentationConfig(
        component=f"{found.module}.{found.end}", unit="pos", intervention=intervention(partition)
    )
