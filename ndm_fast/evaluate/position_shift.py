"""Is the position subspace causal? Patch it from the same text moved by some tokens, and look layers above.

If a subspace is what the model knows position by, then with that subspace taken from a run in which the text
stands ``k`` tokens later, the model goes on as if the token stood there: at a later layer the activations
whose position resembles it most lie ``k`` tokens farther on.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ndm_fast.activations.documents import harvest_documents
from ndm_fast.activations.hooks import collect_activations, replace_activations
from ndm_fast.activations.models import load_model
from ndm_fast.activations.packing import pack
from ndm_fast.activations.sites import number_of_blocks, resolve_site
from ndm_fast.errors import InputError
from ndm_fast.evaluate.patching.patching import subspace_patch
from ndm_fast.evaluate.patching.prompts import Prompts
from ndm_fast.partition import SubspacePartition
from ndm_fast.run.folder import RunFolder

_DIRECTIONS = 8
"""Of the mean activations by position. In MiniLM, layer 3, eight hold 98 % of their variance."""


class PositionReader:
    """Reads a token's position from an activation: that of the nearest of many others.

    Nearest among the directions in which mean activations by position differ most; those are found from the
    same activations.

    Args:
        activations: [N, T, d] of one site, without any patch.
    """

    def __init__(self, activations: Tensor) -> None:
        means = activations.float().mean(0)
        self._centre = means.mean(0)
        rank = min(_DIRECTIONS, len(means) - 1)
        self._basis = torch.linalg.svd(means - self._centre, full_matrices=False)[2][:rank].T
        self._keys = self._coordinates(activations).flatten(0, 1)
        self._places = torch.arange(activations.shape[1], device=activations.device).repeat(len(activations))

    def _coordinates(self, activations: Tensor) -> Tensor:
        return (activations.float() - self._centre) @ self._basis

    def read(self, activations: Tensor) -> Tensor:
        """[...] positions for [..., d] activations, which are none of those given at the start."""
        flat = self._coordinates(activations).flatten(0, -2)
        nearest = torch.cat([torch.cdist(part, self._keys).argmin(1) for part in flat.split(1024)])
        return self._places[nearest].unflatten(0, activations.shape[:-1])


@torch.no_grad()
def position_shift(
    model: nn.Module,
    site: str,
    later: str,
    partition: SubspacePartition,
    tokens: Tensor,
    shift: int,
    *,
    references: int | None = None,
) -> list[dict[str, Any]]:
    """How far the position read at a later site moves, as each subspace comes from the moved text.

    The text in columns ``shift ..`` of each row is run once at its place, and once ``shift`` columns earlier;
    the earlier run is patched at every token but the first.

    Args:
        site, later: where to patch, and where to read, above it.
        tokens: [N, T] rows of full text, the first column kept in place (a start token, if there is one).
        references: rows that positions are read from; default half of them. The others are patched.

    Returns:
        A row per subspace, before them ``none`` and ``all``: ``moved`` (mean over tokens of position read
        minus true position), ``share_moved`` (share of tokens within 1 of ``shift``), ``share_still`` (within
        1 of 0).

    Raises:
        InputError: a shift that leaves no tokens, or no rows on either side.
    """
    length = tokens.shape[1]
    split = len(tokens) // 2 if references is None else references
    if not 0 < shift < length // 2 or not 0 < split < len(tokens):
        raise InputError(
            f"a shift of {shift} with {split} of {len(tokens)} rows of {length} tokens: give a shift from "
            f"1 to {length // 2 - 1}, and rows on both sides"
        )
    reader = PositionReader(torch.cat([_run(model, part, later) for part in tokens[:split].split(64)]))
    there = tokens[split:]
    here = torch.cat([there[:, :1], there[:, 1 + shift :]], 1)  # the same text, ``shift`` tokens earlier
    source = _run(model, there, site)
    prompts = Prompts(here, torch.ones_like(here))
    origin = Prompts(there, torch.ones_like(there))
    places = torch.arange(1, here.shape[1]).repeat(len(here), 1)
    results = []
    everything = list(range(len(partition)))
    groups: dict[Any, list[int]] = {"none": [], "all": everything} | {s: [s] for s in everything}
    for name, group in groups.items():
        change = subspace_patch(partition, group, source, prompts, places, origin, places + shift)
        with replace_activations(model, {site: change}):
            found = reader.read(_run(model, here, later)[:, 1:])
        moved = (found - torch.arange(1, here.shape[1], device=found.device)).double()
        results.append(
            {
                "subspace": name,
                "width": sum(partition.widths[s] for s in group),
                "moved": float(moved.mean()),
                "share_moved": float(((moved - shift).abs() <= 1).double().mean()),
                "share_still": float((moved.abs() <= 1).double().mean()),
            }
        )
    return results


def _run(model: nn.Module, tokens: Tensor, site: str) -> Tensor:
    """[N, T, d] activations."""
    with collect_activations(model, [site]) as captured:
        model(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    return captured[site]


def _next_block(model: nn.Module, site: str) -> str:
    """The output of the first block that lies wholly above a site."""
    name = resolve_site(model, site).name
    block = re.match(r"blocks\.(\d+)\.", name)
    if block is None:
        raise InputError(f"which block comes after {name!r} is not known: give --later")
    return f"blocks.{min(int(block[1]) + 1, number_of_blocks(model) - 1)}.hook_resid_post"


def run_position_shift(
    path: str | Path,
    shift: int,
    *,
    later: str | None = None,
    references: int = 512,
    rows: int = 48,
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """:func:`position_shift` of a finished run, on its own text.

    Args:
        later: site to read positions at; default the output of the next block, as a model's last layers say
            little of position.
        references, rows: packed rows to read positions from, and to patch.
    """
    folder = RunFolder(path)
    config = folder.config().harvest
    partition = folder.partition().to(device)
    model, tokenizer = load_model(config.model, config.dtype, device)
    later = later or _next_block(model, config.site[0])
    documents = harvest_documents(config, folder.config().documents_seed)
    length = config.context_length or 128
    packed = pack(documents(), tokenizer, length, config.rows_per_batch, bos=config.bos)
    parts: list[Tensor] = []
    while sum(map(len, parts)) < references + rows:
        batch = next(packed, None)
        if batch is None:
            raise InputError(f"the text does not fill {references + rows} rows of {length} tokens: give more")
        parts.append(batch.tokens)
    tokens = torch.cat(parts)[: references + rows].to(device)
    return position_shift(model, config.site[0], later, partition, tokens, shift, references=references)
