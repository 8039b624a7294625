"""Activations of a model on text, row by row, in an order that can be entered anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ndm_fast.activations.documents import Document, Documents
from ndm_fast.activations.hooks import collect_activations, forward_errors
from ndm_fast.activations.models import DEFAULT_CONTEXT, longest_context
from ndm_fast.activations.packing import PackedRows, packed_text
from ndm_fast.activations.rows import HarvestedRows, TokenRows, token_columns
from ndm_fast.activations.sites import resolve_sites, site_width
from ndm_fast.activations.wrappers import input_device, unwrapped
from ndm_fast.config import HarvestConfig
from ndm_fast.errors import InputError


class Harvester:
    """Activations of one or more sites on a text, in numbered batches; one forward pass gives all sites.

    The same number always gives the same rows, whatever other sites are read beside.

    Args:
        model, tokenizer: as from :func:`load_model`.
        sites: any names of ``ndm_fast.activations.sites``.
        open_documents: as from ``ndm_fast.activations.documents.open_documents``.
        config: context length, rows per batch, BOS, repetition, outlier filter, autocast.

    Raises:
        InputError: unknown site; activations that are not finite.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        sites: Sequence[str],
        open_documents: Callable[[], Iterator[Document]],
        config: HarvestConfig,
    ) -> None:
        model = unwrapped(model)
        resolved = resolve_sites(model, sites)
        self.widths = {site.name: site_width(model, site) for site in resolved}
        """Site in its canonical form -> width."""
        self._model = model
        self._tokenizer = tokenizer
        self._open_documents = open_documents
        self._config = config
        self._length = row_length(config, model.config)

    @property
    def largest_batch(self) -> int:
        """Rows that a batch holds at most."""
        return self._config.rows_per_batch * self._length

    @property
    def text_skipped(self) -> dict[str, int]:
        """Records and documents that the latest reading of the text left out so far, by reason."""
        documents = self._open_documents
        return dict(documents.skipped) if isinstance(documents, Documents) else {}

    def batches(self, start: int = 0) -> Iterator[dict[str, HarvestedRows]]:
        """Site -> its rows, from batch number ``start`` on."""
        batches = packed_text(self._open_documents, self._tokenizer, self._length, self._config)
        for number, rows in enumerate(islice(batches, start, None), start):
            yield self._forward(rows, number)

    @torch.no_grad()
    def _forward(self, rows: PackedRows, number: int) -> dict[str, HarvestedRows]:
        device = input_device(self._model)
        tokens = rows.tokens.to(device)
        what = f"{', '.join(self.widths)}, batch {number}"
        with (
            collect_activations(self._model, self.widths) as captured,
            self._autocast(device.type),
            forward_errors(self._model, what, tokens, self._config.model),
        ):
            self._model(input_ids=tokens, attention_mask=torch.ones_like(tokens))
        return {site: self._found(site, rows, captured.pop(site), number) for site in self.widths}

    def _autocast(self, device_type: str) -> AbstractContextManager[Any]:
        if self._config.autocast is None:
            return nullcontext()
        return torch.autocast(device_type, getattr(torch, self._config.autocast))

    def _found(self, site: str, rows: PackedRows, captured: Tensor, number: int) -> HarvestedRows:
        activations = captured.flatten(0, 1)
        wanted = ~rows.special.flatten().to(activations.device)
        # One pass that reads all and writes little: a row's sum is finite only where all its terms are.
        if not torch.isfinite(activations.sum(1, dtype=torch.float32)[wanted]).all():
            raise InputError(
                f"activations of {site} hold NaN or Inf (batch {number}): run the model in bfloat16 or "
                "float32 with --dtype, or check its weights"
            )
        keep = self._without_outliers(activations, wanted)
        kept = keep.cpu()
        found = TokenRows(activations[keep], *(column[kept] for column in token_columns(rows)))
        return HarvestedRows(rows, kept.view_as(rows.special), found, int((wanted & ~keep).sum()))

    def _without_outliers(self, activations: Tensor, wanted: Tensor) -> Tensor:
        if self._config.max_norm_ratio is None or not wanted.any():
            return wanted
        norms = torch.linalg.vector_norm(activations, dim=1, dtype=torch.float32)
        return wanted & (norms <= self._config.max_norm_ratio * norms[wanted].median())


class ActivationStream:
    """Activations of one site on a text, in numbered batches: the same number always gives the same rows.

    Args:
        model, tokenizer, open_documents, config: see :class:`Harvester`.
        site: any name of ``ndm_fast.activations.sites``.

    Raises:
        InputError: unknown site; activations that are not finite.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        site: str,
        open_documents: Callable[[], Iterator[Document]],
        config: HarvestConfig,
    ) -> None:
        self.harvester = Harvester(model, tokenizer, [site], open_documents, config)
        ((self.site, self.width),) = self.harvester.widths.items()
        self.outliers_dropped = 0

    @property
    def text_skipped(self) -> dict[str, int]:
        """See ``Harvester.text_skipped``."""
        return self.harvester.text_skipped

    def batches(self, start: int = 0) -> Iterator[Tensor]:
        """[n, d] activations, from batch number ``start`` on; n varies a little."""
        for rows in self.token_rows(start):
            yield rows.activations

    def token_rows(self, start: int = 0) -> Iterator[TokenRows]:
        """As :meth:`batches`, with the tokens that the activations belong to."""
        for harvested in self.harvested_rows(start):
            yield harvested.rows

    def harvested_rows(self, start: int = 0) -> Iterator[HarvestedRows]:
        """As :meth:`token_rows`, with the packed rows of text that they come from."""
        for found in self.harvester.batches(start):
            self.outliers_dropped += found[self.site].outliers
            yield found[self.site]


def row_length(config: HarvestConfig, of_model: Any) -> int:
    """Tokens in a row of text, for a model with this Hugging Face config.

    Raises:
        InputError: the model does not take as many.
    """
    longest = longest_context(of_model)
    length = config.context_length or min(longest, DEFAULT_CONTEXT)
    if length > longest:
        raise InputError(f"context_length is {length}, the model takes up to {longest} tokens: lower it")
    return length
