"""The rows of a cache in their text: it is packed anew, as a cache leaves out special tokens and outliers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ndm_fast.activations.cache import ActivationCache
from ndm_fast.activations.models import load_config, load_tokenizer
from ndm_fast.activations.packing import PackedRows, packed_text
from ndm_fast.activations.rows import HarvestedRows, TokenRows, token_columns
from ndm_fast.activations.stream import row_length
from ndm_fast.config import RunConfig
from ndm_fast.errors import InputError
from ndm_fast.run.source import documents, model_stream, refuse_rows, run_cache


def run_text(config: RunConfig, rows: int, device: str = "cpu") -> Iterator[HarvestedRows]:
    """What a run of one site was trained on, in its text: from its cache where that will do, else its model.

    Args:
        rows: how many activations are wanted.

    Raises:
        InputError: see ``run_cache`` and ``model_stream``; or the text has changed since the harvest.
    """
    refuse_rows(config)
    cache = run_cache(config, rows)
    return model_stream(config, device).harvested_rows() if cache is None else _cached_text(cache, config)


def _cached_text(cache: ActivationCache, config: RunConfig) -> Iterator[HarvestedRows]:
    harvest, stream = config.harvest, cache.stream(config.harvest.site[0])
    tokenizer = load_tokenizer(harvest.model, **harvest.hub_options)
    length = row_length(harvest, load_config(harvest.model, **harvest.hub_options))
    text = packed_text(documents(config), tokenizer, length, cache.config)
    for rows in stream.token_rows():
        packed = next(text, None)
        kept = None if packed is None else kept_tokens(packed, rows)
        if packed is None or kept is None:
            raise InputError(
                f"the text {harvest.data} has changed since {cache.folder} was harvested: bring it back, or "
                f"move {cache.folder} away, and the model is run instead"
            )
        yield HarvestedRows(packed, kept, rows, int((~packed.special).sum()) - len(rows.token))


def kept_tokens(packed: PackedRows, rows: TokenRows) -> Tensor | None:
    """[B, L] bool: which tokens of a batch the rows belong to; None where they belong to another text."""
    columns = torch.stack(token_columns(packed), 1)
    wanted = torch.stack(rows[1:], 1)
    places = (~packed.special).flatten().nonzero()[:, 0]
    if len(places) != len(wanted):
        chosen = _places_of(wanted.tolist(), columns[places].tolist())
        places = places[torch.tensor(chosen, dtype=torch.int64)]
    if not torch.equal(columns[places], wanted):
        return None
    kept = torch.zeros(len(columns), dtype=torch.bool)
    kept[places] = True
    return kept.view_as(packed.special)


def _places_of(some: list[Any], everything: list[Any]) -> list[int]:
    """Where items stand that were taken from a list in its order; fewer where they were not."""
    left = iter(range(len(everything)))
    found = (next((place for place in left if everything[place] == item), None) for item in some)
    return [place for place in found if place is not None]
