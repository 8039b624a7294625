"""Neighbor purity for any label: the k nearest neighbors, and confidence intervals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ndm_fast import ops
from ndm_fast.errors import InputError
from ndm_fast.partition import SubspacePartition

_DRAWS, _LEVEL = 1000, 0.95


def nearest_keys(
    queries: Tensor, keys: Tensor, partition: SubspacePartition, top: int, *, metric: str = "euclidean"
) -> Tensor:
    """[S, Q, top] int64, the nearest keys of every query in every subspace, nearest first.

    Args:
        queries: [Q, d]; keys: [K, d].

    Raises:
        InputError: ``top`` is below 1 or above K.
    """
    if not 1 <= top <= len(keys):
        raise InputError(f"the {top} nearest of {len(keys)} keys: give from 1 to as many as there are")
    given = (queries, keys, partition.rotation, partition.widths)
    if top == 1:
        return ops.nearest_neighbors(*given, metric=metric).index[..., None]
    return ops.k_nearest_neighbors(*given, top, metric=metric).index


def agreement(index: Tensor, query_label: Tensor, key_label: Tensor) -> Tensor:
    """[S, Q] fp64 share of each query's nearest keys that have its label.

    Args:
        index: [S, Q, top], as from :func:`nearest_keys`. query_label: [Q]; key_label: [K], any integers.
    """
    return (key_label.to(index.device)[index] == query_label.to(index.device)[:, None]).double().mean(2)


def bootstrap_intervals(shares: Tensor, generator: torch.Generator) -> Tensor:
    """[..., 2] bounds of a 95 % interval of the mean over the last dimension, by resampling it 1,000 times.

    Args:
        shares: [..., Q], one value per query.
    """
    count = shares.shape[-1]
    drawn = torch.randint(count, (_DRAWS, count), generator=generator)
    weights = torch.zeros(_DRAWS, count, dtype=torch.float64)
    weights.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    means = shares.double().cpu() @ weights.T / count
    tail = (1 - _LEVEL) / 2
    return torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64), -1).movedim(0, -1)


def read_labels(path: str | Path, tokenizer: Any) -> Tensor:
    """[V] a label per token id from a JSON file ``{token text: label}``; tokens left out share one label, -1.

    Token texts are as the tokenizer spells them; a word that is one token may be given as it is written.

    Raises:
        InputError: the file cannot be read, or names no token of this tokenizer.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        items = {str(token): str(label) for token, label in content.items()}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"cannot read {path} ({error}): give a JSON file {{token: label}}") from None
    numbers = {label: number for number, label in enumerate(sorted(set(items.values())))}
    vocabulary = tokenizer.get_vocab()
    labels = torch.full((max(vocabulary.values()) + 1,), -1)
    known = 0
    for token, label in items.items():
        ids = {vocabulary[token]} if token in vocabulary else set()
        for written in (token, f" {token}"):
            encoded = tokenizer(written, add_special_tokens=False)["input_ids"]
            ids |= set(encoded) if len(encoded) == 1 else set()
        known += len(ids)
        labels[list(ids)] = numbers[label]
    if not known:
        raise InputError(f"{path} names no token of this tokenizer: use its own spelling, or whole words")
    return labels
