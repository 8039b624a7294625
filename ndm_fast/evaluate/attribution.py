"""Which input tokens put an activation into its place of a subspace: integrated gradients.

Sundararajan, Taly and Yan 2017, "Axiomatic attribution for deep networks". What is explained is how similar
an activation's part in a subspace is to the part it has on the whole text, 1 there by definition. The path
leads from a text without tokens (every embedding the mean of the vocabulary's) to the text. Where attention
is frozen, its patterns stay those of the text along the path, so that only what is moved is explained, not
where it is looked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from ndm_fast.activations.hooks import collect_activations, replace_activations
from ndm_fast.errors import InputError
from ndm_fast.partition import SubspacePartition

_FROZEN = "ndm_fast_frozen"
"""Name under which transformers knows the attention that repeats recorded patterns."""


class Attribution(NamedTuple):
    """What each token adds to the similarity, in every subspace searched."""

    tokens: Tensor
    """[S', L] fp64; a row sums to ``1 - baseline``, up to the error of the ``steps``."""
    baseline: Tensor
    """[S'] fp64 similarity of the text without tokens."""


def attribute_tokens(
    model: nn.Module,
    site: str,
    tokens: Tensor,
    position: int,
    partition: SubspacePartition,
    *,
    subspaces: Sequence[int] | None = None,
    origin: Tensor | None = None,
    steps: int = 32,
    batch: int = 16,
    freeze_attention: bool = False,
) -> Attribution:
    """Integrated gradients of the similarity of one activation with itself on the whole text.

    The similarity in subspace s is ``<x, z> / <z, z>`` with z the part (less the origin) of the activation on
    the text and x that on the way, so that it is linear in the activation.

    Args:
        model: with input embeddings (``get_input_embeddings``) and an ``inputs_embeds`` argument.
        tokens: [L] int64, one text with its special tokens; position: of the activation in it.
        subspaces: S' numbers, default all.
        origin: [d] in rotated coordinates, for instance ``index.rows.origin``; default 0.
        steps: points on the path, at the middles of equal pieces; batch: of them at once.

    Raises:
        InputError: no such position or subspace, the part is zero, or attention cannot be frozen.
    """
    chosen = list(range(len(partition))) if subspaces is None else list(subspaces)
    _check(tokens, position, chosen, partition, steps, batch)
    with torch.no_grad():
        table = model.get_input_embeddings().weight  # type: ignore[operator]
        text = table[tokens]
        empty = table.mean(0, dtype=torch.float32).to(table.dtype).expand_as(text)
    with _frozen_attention(model) if freeze_attention else _as_it_is() as pattern:
        whole = _parts(model, site, text[None], position, partition, origin)[0].detach()
        targets = [whole[columns] for columns in _columns(partition, chosen)]
        if any(not target.square().sum() > 0 for target in targets):
            raise InputError("the activation has no part in a subspace: there is nothing to explain")
        pattern.replay()
        start = _parts(model, site, empty[None], position, partition, origin)[0].detach()
        totals = torch.zeros(len(chosen), len(tokens), dtype=torch.float64)
        places = (torch.arange(steps, dtype=torch.float32, device=text.device) + 0.5) / steps
        for some in places.to(text.dtype).split(batch):
            path = (empty + some[:, None, None] * (text - empty)).requires_grad_()
            parts = _parts(model, site, path, position, partition, origin)
            for i, (columns, target) in enumerate(zip(_columns(partition, chosen), targets, strict=True)):
                similarity = _similarity(parts[:, columns], target).sum()
                (gradient,) = torch.autograd.grad(similarity, path, retain_graph=i + 1 < len(chosen))
                totals[i] += (gradient * (text - empty)).sum((0, 2)).double().cpu() / steps
    baseline = [
        _similarity(start[columns], target)
        for columns, target in zip(_columns(partition, chosen), targets, strict=True)
    ]
    return Attribution(totals, torch.stack(baseline).double().cpu())


def _check(
    tokens: Tensor, position: int, chosen: Sequence[int], partition: SubspacePartition, steps: int, batch: int
) -> None:
    if tokens.ndim != 1 or not 0 <= position < len(tokens):
        raise InputError(
            f"no position {position} in tokens of shape {list(tokens.shape)}: give [L] and 0 to L-1"
        )
    if not chosen or not all(0 <= s < len(partition) for s in chosen):
        raise InputError(f"subspaces {list(chosen)}: give some of 0 to {len(partition) - 1}")
    if steps < 1 or batch < 1:
        raise InputError(f"steps is {steps} and batch {batch}: give at least 1 of each")


def _columns(partition: SubspacePartition, chosen: Sequence[int]) -> list[slice]:
    return [slice(partition.offsets[s], partition.offsets[s] + partition.widths[s]) for s in chosen]


def _similarity(parts: Tensor, target: Tensor) -> Tensor:
    return parts @ target / target.square().sum()


def _parts(
    model: nn.Module,
    site: str,
    embedded: Tensor,
    position: int,
    partition: SubspacePartition,
    origin: Tensor | None,
) -> Tensor:
    """[B, d] rotated activations of one position, with their gradient to the embeddings [B, L, e]."""
    kept: list[Tensor] = []

    def keep(activation: Tensor) -> Tensor:
        kept.append(activation)
        return activation

    mask = torch.ones(embedded.shape[:2], dtype=torch.int64, device=embedded.device)
    with collect_activations(model, site), replace_activations(model, {site: keep}):
        model(inputs_embeds=embedded, attention_mask=mask)
    rotated = partition.rotate(kept[0][:, position].float())
    return rotated if origin is None else rotated - origin


class _Pattern:
    """Attention patterns by module: recorded on the first pass, repeated from then on."""

    def __init__(self) -> None:
        self._seen: dict[nn.Module, Tensor] = {}
        self._replaying = False

    def replay(self) -> None:
        self._replaying = True

    def forget(self) -> None:
        self._seen.clear()

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        """As transformers' attention functions: [B, H, L, e] in, [B, L, H, e] out."""
        groups = query.shape[1] // key.shape[1]
        value = value.repeat_interleave(groups, dim=1)
        if not self._replaying:
            scores = query @ key.repeat_interleave(groups, dim=1).transpose(2, 3)
            scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
            if attention_mask is not None:
                scores = scores + attention_mask[:, :, :, : key.shape[2]]
            self._seen[module] = scores.softmax(-1, dtype=torch.float32).to(query.dtype).detach()
        weights = self._seen[module].expand(len(value), -1, -1, -1)
        return (weights @ value).transpose(1, 2).contiguous(), weights


@contextmanager
def _as_it_is() -> Iterator[_Pattern]:
    yield _Pattern()


@contextmanager
def _frozen_attention(model: nn.Module) -> Iterator[_Pattern]:
    """Make the model's attention record its patterns, and repeat them after ``replay``."""
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    config = getattr(model, "config", None)
    before = getattr(config, "_attn_implementation", None)
    if before is None or not hasattr(model, "set_attn_implementation"):
        raise InputError(f"attention of {type(model).__name__} cannot be frozen: pass freeze_attention=False")
    pattern = _Pattern()
    AttentionInterface.register(_FROZEN, pattern.attend)
    AttentionMaskInterface.register(_FROZEN, eager_mask)
    try:
        model.set_attn_implementation(_FROZEN)  # type: ignore[operator]
        yield pattern
    finally:
        model.set_attn_implementation(before)  # type: ignore[operator]
        pattern.forget()  # transformers keeps the function
