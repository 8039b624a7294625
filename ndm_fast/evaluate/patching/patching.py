"""Subspace patching: put one subspace of a counterfactual run's activation into a run, and see what changes.

    h <- h + (h' - h) R_s R_s'        at given positions (docs/method.md)

``subspace_patch`` is a replacement for ``ndm_fast.replace_activations``, for any model and any use;
``patch_effects`` measures the effects of many subspaces over many prompts in one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ndm_fast.activations.hooks import Replacement
from ndm_fast.errors import InputError
from ndm_fast.evaluate.patching.head import TokenMetric, tokens_of
from ndm_fast.evaluate.patching.layers_above import LayersAbove
from ndm_fast.evaluate.patching.prefix import PrefixReader
from ndm_fast.evaluate.patching.prompts import Positions, Prompts, columns_of
from ndm_fast.partition import SubspacePartition

Metric = Callable[[Tensor, Tensor], Tensor]
"""From logits [n, R, V] at the positions read and the numbers [n] of the prompts to values [n] or [n, M]."""


class PatchEffects(NamedTuple):
    """What a metric loses by patching: clean value minus patched value, for each of N prompts.

    Where the metric has M values a prompt, every tensor has a last dimension M.
    """

    clean: Tensor
    """[N] the metric without a patch."""
    whole: Tensor
    """[N] drop where the whole activation is patched."""
    by_group: Tensor
    """[G, N] drop where one group of subspaces is patched."""

    @property
    def means(self) -> Tensor:
        """[G] mean drop over the prompts, fp64."""
        return self.by_group.double().mean(1)


def patch(
    activations: Tensor,
    source: Tensor,
    partition: SubspacePartition,
    subspaces: Sequence[int],
    columns: Tensor,
    source_columns: Tensor | None = None,
    used: Tensor | None = None,
) -> Tensor:
    """[N, T, d] activations with some subspaces taken from ``source``; the inputs are left as they are.

    Args:
        activations: [N, T, d]. source: [N, T', d].
        subspaces: which; with all of them the activation is the source's exactly, with none nothing changes.
        columns, source_columns: [N, P] where to put and where to take; the latter default to the former.
        used: [N, P] bool, False for entries to skip.
    """
    rows = torch.arange(len(activations), device=activations.device)[:, None]
    here = activations[rows, columns]
    there = source[rows, columns if source_columns is None else source_columns].to(here.dtype)
    if set(subspaces) == set(range(len(partition))):
        new = there
    else:
        # Computed in the precision of the rotation, whatever the model runs in.
        basis = torch.cat([partition.basis(s) for s in subspaces] or [partition.rotation[:, :0]], 1)
        basis = basis.to(here.device)
        new = (here.float() + (there.float() - here.float()) @ basis @ basis.T).to(here.dtype)
    changed = activations.clone()
    if used is None:
        changed[rows, columns] = new
    else:
        row, place = used.nonzero(as_tuple=True)
        changed[row, columns[row, place]] = new[row, place]
    return changed


def subspace_patch(
    partition: SubspacePartition,
    subspaces: Sequence[int],
    source: Tensor,
    prompts: Prompts,
    positions: Positions,
    source_prompts: Prompts | None = None,
    source_positions: Positions = None,
) -> Replacement:
    """A replacement for ``replace_activations`` that patches some subspaces.

    Args:
        source: [N, T', d] activations of the counterfactual run, as ``collect_activations`` reads them.
        prompts: the padded prompts that the model will be run on.
        positions: where to patch, per prompt; None for all tokens.
        source_prompts, source_positions: where to take from, if other than ``prompts`` and ``positions``.

    Raises:
        InputError: positions out of range or that do not pair up; unknown subspaces.
    """
    for subspace in subspaces:
        partition.basis(subspace)
    columns, taken, used = _paired(prompts, positions, source_prompts, source_positions)
    return lambda activations: patch(activations, source, partition, subspaces, columns, taken, used)


def patch_effects(
    model: nn.Module,
    site: str,
    partition: SubspacePartition,
    prompts: Prompts,
    counterfactuals: Prompts,
    metric: Metric,
    *,
    positions: Positions = None,
    counterfactual_positions: Positions = None,
    groups: Sequence[Sequence[int]] | None = None,
    read: Positions | int = -1,
    rows: int = 64,
) -> PatchEffects:
    """Patch every subspace of every prompt, and measure.

    The model runs once to the site on prompts and counterfactuals, then only the layers above it, on the
    tokens from the first patched one on, once per prompt and group (see :class:`LayersAbove`,
    :class:`PrefixReader`).

    Args:
        model: Hugging Face causal language model; its dtype is kept.
        site: where, in any form of ``ndm_fast.activations.sites``.
        prompts, counterfactuals: N padded prompts each; their lengths may differ.
        metric: see ``Metric``.
        positions, counterfactual_positions: per prompt, where to patch and where to take from. None means all
            tokens, for the latter the same positions as the former.
        groups: sets of subspaces patched together; default each subspace alone.
        read: positions whose logits the metric sees: one for all prompts, or as ``positions``, equally many.
        rows: prompts in one forward pass.

    Raises:
        InputError: a partition of another width than the site, positions that do not fit, unknown subspaces.
    """
    cut = LayersAbove(model, site)
    cut.check_fits(partition)
    chosen = _known_groups(partition, groups)
    columns, taken, used = _paired(prompts, positions, counterfactuals, counterfactual_positions)
    reading = _reading(prompts, read)
    prefixes, tokens = PrefixReader(model), tokens_of(metric)
    order = _by_first_patched(columns, used)
    patched: list[Tensor] = []
    for batch in order.split(rows):
        here, there = cut.below(prompts.rows(batch)), cut.below(counterfactuals.rows(batch))
        prefix = prefixes.read(prompts.rows(batch), first_column(columns[batch], used[batch], reading[batch]))
        start = prefix.columns if prefix else 0
        # Entries that are not used may lie before the start; they are skipped, so any column serves.
        where = ((columns[batch] - start).clamp_min(0), taken[batch], used[batch])
        values = []
        for some in _chunks([[], [*range(len(partition))], *chosen], max(1, rows // len(batch))):
            activations = torch.cat([patch(here[:, start:], there, partition, g, *where) for g in some])
            which = batch.repeat(len(some))
            every = torch.arange(len(batch), device=batch.device).repeat(len(some))
            before = prefix.rows(every) if prefix else None
            logits = cut.above(activations, prompts.rows(which), reading[which], before, tokens)
            values.append(metric(logits, which).unflatten(0, (len(some), len(batch))))
        patched.append(torch.cat(values))
    clean, *after = torch.cat(patched, 1)[:, order.argsort()]
    drops = clean - torch.stack(after)
    return PatchEffects(clean, drops[0], drops[1:])


def _by_first_patched(columns: Tensor, used: Tensor) -> Tensor:
    """[N] numbers of prompts, those with like columns beside each other: patched late, a prefix is long."""
    return torch.where(used, columns, columns.amax() + 1).amin(1).argsort(stable=True)


def first_column(columns: Tensor, used: Tensor, reading: Tensor) -> int:
    """The first column patched, of [N, P] with [N, P] ``used``, or read, of [N, R]."""
    return int(torch.cat([columns[used], reading.flatten()]).min())


def _chunks(groups: Sequence[Sequence[int]], size: int) -> Iterator[Sequence[Sequence[int]]]:
    return (groups[first : first + size] for first in range(0, len(groups), size))


def _known_groups(partition: SubspacePartition, groups: Sequence[Sequence[int]] | None) -> list[list[int]]:
    chosen = [[s] for s in range(len(partition))] if groups is None else [list(group) for group in groups]
    for subspace in {s for group in chosen for s in group}:
        partition.basis(subspace)
    return chosen


def _reading(prompts: Prompts, read: Positions | int) -> Tensor:
    """[N, R] columns whose logits are read."""
    wanted = [[read]] * len(prompts.tokens) if isinstance(read, int) else read
    reading, complete = columns_of(prompts, wanted)
    if not complete.all():
        raise InputError("prompts are read at different numbers of positions: read as many of each")
    return reading


def _paired(
    prompts: Prompts, positions: Positions, source: Prompts | None, source_positions: Positions
) -> tuple[Tensor, Tensor, Tensor]:
    """Columns to patch, columns to take from, and which entries of both count; [N, P] each."""
    source = prompts if source is None else source
    if len(prompts.tokens) != len(source.tokens):
        raise InputError(
            f"{len(prompts.tokens)} prompts but {len(source.tokens)} counterfactuals: give pairs"
        )
    columns, used = columns_of(prompts, positions)
    asked = positions if source_positions is None else source_positions
    taken, also = columns_of(source, asked)
    if used.shape != also.shape or not bool((used == also).all()):
        row = next((r for r, (a, b) in enumerate(zip(used.sum(1), also.sum(1), strict=True)) if a != b), 0)
        raise InputError(
            f"prompt {row} is patched at {int(used[row].sum())} positions from "
            f"{int(also[row].sum())} of its counterfactual: give as many of both"
        )
    return columns, taken, used


def logit_of(targets: Iterable[int] | Tensor) -> Metric:
    """A metric: the logit of one token per prompt, [N] ids, at the one position read."""
    wanted = torch.as_tensor(targets if isinstance(targets, Tensor) else list(targets))

    def value(logits: Tensor, batch: Tensor) -> Tensor:
        return logits[:, 0].gather(1, wanted.to(logits.device)[batch][:, None])[:, 0].float()

    return TokenMetric(value, wanted)
