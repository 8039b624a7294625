"""Activations of a site on ordinary text, for variances, principal components and information."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ndm_fast.activations.documents import open_documents
from ndm_fast.activations.rows import take_rows
from ndm_fast.activations.stream import ActivationStream
from ndm_fast.config import HarvestConfig
from ndm_fast.errors import InputError


def site_activations(
    model: Any,
    tokenizer: Any,
    site: str,
    data: str | None,
    *,
    rows: int = 16384,
    context_length: int | None = None,
    seed: int = 0,
) -> Tensor:
    """[rows, d] activations of the first tokens of a text.

    Raises:
        InputError: no text given, or it is too short.
    """
    if not data:
        raise InputError("no text is known for variances and principal components: pass --data")
    config = HarvestConfig(data=data, context_length=context_length, repeat_data=True)
    stream = ActivationStream(model, tokenizer, site, open_documents(data, seed=seed), config)
    return take_rows(stream.batches(), rows)[0]
