"""Activations of a site on ordinary text, for variances, principal components and information."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ndm_fast.activations.documents import harvest_documents
from ndm_fast.activations.rows import take_rows
from ndm_fast.activations.stream import ActivationStream
from ndm_fast.config import from_flat
from ndm_fast.errors import InputError


def site_activations(
    model: Any,
    tokenizer: Any,
    site: str,
    source: Mapping[str, Any],
    *,
    data: str | None = None,
    rows: int = 16384,
    context_length: int | None = None,
    seed: int = 0,
) -> Tensor:
    """[rows, d] activations of the first tokens of a text, read as those that a partition was trained on.

    Args:
        source: of the partition: its text, and how that was read (BOS, context, rows that are dropped).
        data, context_length: instead of the source's.

    Raises:
        InputError: no text is known, or it is too short.
    """
    known = from_flat(source.get("harvest", {})).harvest
    text = data or known.data or source.get("data", "")
    if not text:
        raise InputError("no text is known for variances and principal components: pass --data")
    length = context_length or known.context_length
    config = dataclasses.replace(known, data=text, context_length=length, repeat_data=True)
    stream = ActivationStream(model, tokenizer, site, harvest_documents(config, seed), config)
    return take_rows(stream.batches(), rows)[0]
