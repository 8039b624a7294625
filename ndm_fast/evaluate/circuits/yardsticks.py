"""Yardsticks: subspaces that were made with the labels, to see what is possible at a width.

DAS (distributed alignment search, Geiger et al. 2024) learns by gradient the directions whose exchange
changes the answer most. The differences of patched activations give two cheaper ones: the mean difference
(one direction, signed so that opposite changes do not cancel) and the leading singular vectors. None is a
rival of NDM, which sees no labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ndm_fast.evaluate.circuits.words import CircuitPrompts
from ndm_fast.evaluate.patching.head import tokens_of
from ndm_fast.evaluate.patching.layers_above import LayersAbove
from ndm_fast.evaluate.patching.patching import first_column
from ndm_fast.evaluate.patching.prefix import Prefix, PrefixReader
from ndm_fast.evaluate.patching.prompts import Prompts, columns_of, pad_prompts
from ndm_fast.partition import SubspacePartition
from ndm_fast.seeds import seeded

DAS_STEPS = 200
"""Of Adam."""

_RATE = 1e-2
_ROWS = 32


class _Batch(NamedTuple):
    """n prompts with everything that does not depend on the directions."""

    prompts: Prompts
    activations: Tensor
    """[n, T', d] at the site, after the prefix."""
    differences: Tensor
    """[n, P, d] counterfactual less own activation at the patched positions, 0 where not used."""
    columns: Tensor
    """[n, P] of ``activations``."""
    used: Tensor
    reading: Tensor
    """[n, 1] columns of the prompts."""
    prefix: Prefix | None
    which: Tensor
    """[n] numbers of the prompts."""


def yardstick_partitions(
    model: nn.Module,
    site: str,
    made: CircuitPrompts,
    widths: Sequence[int],
    best: int,
    *,
    steps: int = DAS_STEPS,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, SubspacePartition]:
    """``das``, ``svd`` and ``mean_difference``, each the first subspace of a partition.

    The rest is split at random into the widths of the other subspaces; the mean difference is one direction
    wide, so its partition has one subspace more.

    Args:
        made: the prompts to learn from.
        best: the subspace whose width DAS and SVD get.
        steps: of Adam for DAS, at the batch size 32.
    """
    cut = LayersAbove(model, site)
    batches = _batches(model, cut, made)
    width = widths[best]
    others = [w for s, w in enumerate(widths) if s != best]
    rest = [width - 1, *others] if width > 1 else others
    learnt = learn_das(cut, batches, made, width, steps=steps, seed=seed, progress=progress)
    return {
        "das": _completed(learnt, others, seed),
        "svd": _completed(_leading(batches, width), others, seed),
        "mean_difference": _completed(_mean_difference(batches, made.signs), rest, seed),
    }


def _batches(model: nn.Module, cut: LayersAbove, made: CircuitPrompts) -> list[_Batch]:
    device = next(model.parameters()).device
    prefixes = PrefixReader(model)
    batches = []
    for which in torch.arange(len(made.prompts)).split(_ROWS):
        prompts, others = (
            pad_prompts([all_of[row] for row in which.tolist()], device=device)
            for all_of in (made.prompts, made.counterfactuals)
        )
        columns, used = columns_of(prompts, [made.positions[row] for row in which.tolist()])
        reading = columns_of(prompts, [[-1]] * len(which))[0]
        here, there = cut.below(prompts), cut.below(others)
        prefix = prefixes.read(prompts, first_column(columns, used, reading))
        start = prefix.columns if prefix else 0
        row = torch.arange(len(which), device=device)[:, None]
        differences = (there[row, columns] - here[row, columns]).float() * used[..., None]
        columns = (columns - start).clamp_min(0)
        batches.append(_Batch(prompts, here[:, start:], differences, columns, used, reading, prefix, which))
    return batches


def learn_das(
    cut: LayersAbove,
    batches: Sequence[_Batch],
    made: CircuitPrompts,
    width: int,
    *,
    steps: int,
    seed: int,
    progress: bool,
) -> Tensor:
    """[d, width] orthonormal directions whose exchange lowers the metric most, by Adam and QR retraction."""
    first = batches[0].differences
    start = torch.randn(first.shape[-1], width, generator=seeded(seed, 32)).to(first.device)
    basis = torch.linalg.qr(start).Q.requires_grad_()
    optimiser = torch.optim.Adam([basis], lr=_RATE)
    tokens = tokens_of(made.metric)
    for step in tqdm(range(steps), "DAS", leave=False, disable=None if progress else True):
        batch = batches[step % len(batches)]
        loss = made.metric(_patched_logits(cut, batch, torch.linalg.qr(basis).Q, tokens), batch.which).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            basis.copy_(torch.linalg.qr(basis).Q)
    return basis.detach()


def _patched_logits(cut: LayersAbove, batch: _Batch, basis: Tensor, tokens: Tensor | None) -> Tensor:
    change = (batch.differences @ basis @ basis.T).to(batch.activations.dtype)
    rows = torch.arange(len(batch.which), device=change.device)[:, None].expand_as(batch.columns)
    activations = batch.activations.index_put((rows, batch.columns), change, accumulate=True)
    every = torch.arange(len(batch.which), device=change.device)
    prefix = batch.prefix.rows(every) if batch.prefix else None
    return cut.above_with_gradient(activations, batch.prompts, batch.reading, prefix, tokens)


def _leading(batches: Sequence[_Batch], width: int) -> Tensor:
    """[d, width] leading right singular vectors of all differences."""
    rows = torch.cat([batch.differences[batch.used] for batch in batches]).double()
    return torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -width:].float()


def _mean_difference(batches: Sequence[_Batch], signs: Sequence[int]) -> Tensor:
    """[d, 1] mean over prompts and positions, signed by which way the variable changes."""
    sign = torch.tensor(signs, dtype=torch.float32)
    total = sum(
        (batch.differences.sum(1) * sign[batch.which, None].to(batch.differences.device)).sum(0)
        for batch in batches
    )
    assert isinstance(total, Tensor)
    return nn.functional.normalize(total, dim=0)[:, None]


def _completed(basis: Tensor, rest: Sequence[int], seed: int) -> SubspacePartition:
    """A partition with these [d, p] orthonormal directions first and random ones of the rest's widths."""
    d, width = basis.shape
    drawn = torch.randn(d, d - width, generator=seeded(seed, 33), dtype=torch.float64)
    own = basis.double().cpu()
    square, _ = torch.linalg.qr(torch.cat([own, drawn], 1))
    square[:, :width] = own  # QR may turn the signs
    return SubspacePartition(square.float().to(basis.device), [width, *rest])
