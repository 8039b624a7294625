"""Path patching: one subspace of a site replaced on its way into one side of one head, all else as it was.

    z_h = head h with  Q, K or V  read from  N(x + (h' - h) R_s R_s')  instead of  N(x)

x is the stream before the head's block, h and h' are the activations at the site below. Other heads, other
sides and the skip connection see nothing of it; what the head then writes flows on through the model. Beside
the exact effect stands its first order, gradient times difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ndm_fast.activations.hooks import collect_activations
from ndm_fast.errors import InputError
from ndm_fast.evaluate.connections.attribution import first_order
from ndm_fast.evaluate.connections.finding import entrance
from ndm_fast.evaluate.connections.heads import SIDES, Call, Heads, calls
from ndm_fast.evaluate.connections.weights import subspace_sums
from ndm_fast.evaluate.patching.layers_above import LayersAbove
from ndm_fast.evaluate.patching.patching import Metric, first_column
from ndm_fast.evaluate.patching.prefix import Prefix, PrefixReader
from ndm_fast.evaluate.patching.prompts import Positions, Prompts, columns_of
from ndm_fast.partition import SubspacePartition


class EdgeEffects(NamedTuple):
    """What a metric loses: clean less patched value, for every edge and each of N prompts.

    Edges are [S, B, H, 3]: subspaces of the site below, blocks, their heads, sides in the order of ``SIDES``.
    """

    clean: Tensor
    """[N] the metric without a patch."""
    patched: Tensor
    """[S, B, H, 3, N] drop where the edge is patched."""
    attributed: Tensor
    """[S, B, H, 3, N] the same to first order."""
    arriving: Tensor
    """[S, B, H, 3, S'] mean drop, to first order, straight through each subspace of the site above."""
    run: float
    """Share of the edges that were run through the layers above; see ``SMALL``."""


class _Batch(NamedTuple):
    """n prompts with all that does not depend on the edge."""

    prompts: Prompts
    which: Tensor
    """[n] numbers of the prompts."""
    reading: Tensor
    """[n, R] columns whose logits are read."""
    difference: Tensor
    """[n, T, d] counterfactual less own activation at the site below, 0 at positions that are not patched."""
    prefix: Prefix | None
    found: dict[int, Call]
    captured: dict[str, Tensor]

    @property
    def start(self) -> int:
        """First column that is run again."""
        return self.prefix.columns if self.prefix else 0


class _Seen(NamedTuple):
    """What patching the edges into one block's heads does, to first order above the heads."""

    size: Tensor
    """[S, H, 3] how much the head writes otherwise: length over tokens, the largest of the prompts."""
    drops: Tensor
    """[S, H, 3, n]"""
    through: Tensor
    """[S, H, 3, S'] drops through each subspace of the site above, summed over the prompts."""


SMALL = 0.1
"""Edges that change what a head writes by less than this share of the largest such change are not run through
the layers above: the gradient there tells their effect, with an error of second order, a hundredth."""


class PathPatcher:
    """Measures edges between two sites of a causal language model.

    Args:
        below, above: names of the two sites. heads: those between.
        partitions: of the two sites.
        rows: prompts in one forward pass, for each head of a block.
        small: see ``SMALL``; with 0 every edge is run.

    Raises:
        InputError: the heads do not write into the stream that the site above is part of.
    """

    def __init__(
        self,
        model: nn.Module,
        below: str,
        above: str,
        partitions: tuple[SubspacePartition, SubspacePartition],
        heads: Sequence[Heads],
        *,
        rows: int = 8,
        small: float = SMALL,
    ) -> None:
        self._model: Any = model
        self._cut = LayersAbove(model, below)
        self._above = LayersAbove(model, above)
        for cut, partition in zip((self._cut, self._above), partitions, strict=True):
            cut.check_fits(partition)
        self.below, self.partitions = self._cut.site.name, partitions
        self._heads, self._rows, self._small = heads, rows, small
        self._entries = {h.block: LayersAbove(model, entrance(model, h.block)) for h in heads}
        self._prefixes = PrefixReader(model)

    def measure(
        self,
        prompts: Prompts,
        counterfactuals: Prompts,
        metric: Metric,
        *,
        positions: Positions = None,
        read: Positions | int = -1,
    ) -> EdgeEffects:
        """Effects of all edges.

        Args:
            prompts, counterfactuals: N pairs of equal length. metric: as of ``patch_effects``.
            positions: per prompt, where the site below is patched; None for all tokens.
            read: positions whose logits the metric sees.

        Raises:
            InputError: pairs of unequal length, positions outside of a prompt.
        """
        if prompts.tokens.shape != counterfactuals.tokens.shape or not torch.equal(
            prompts.mask, counterfactuals.mask
        ):
            raise InputError(
                "a prompt and its counterfactual differ in length, so which tokens belong to each other is "
                "not known: give pairs of equal length"
            )
        wanted = [[read]] * len(prompts.tokens) if isinstance(read, int) else read
        reading, _ = columns_of(prompts, wanted)
        columns, used = columns_of(prompts, positions)
        parts = []
        for which in torch.arange(len(prompts.tokens), device=prompts.tokens.device).split(self._rows):
            batch = self._prepared(
                prompts.rows(which), counterfactuals.rows(which), which, columns[which], used[which],
                reading[which],
            )  # fmt: skip
            parts.append(self._measured(batch, metric))
        clean, patched, attributed, arriving, exact = zip(*parts, strict=True)
        return EdgeEffects(
            torch.cat(clean),
            torch.cat(patched, -1),
            torch.cat(attributed, -1),
            torch.stack(arriving).sum(0) / len(prompts.tokens),
            float(torch.cat(exact).double().mean()) / (patched[0][..., 0].numel() or 1),
        )

    @torch.no_grad()
    def _prepared(
        self, here: Prompts, there: Prompts, which: Tensor, columns: Tensor, used: Tensor, reading: Tensor
    ) -> _Batch:
        names = [self._cut.site.name, self._above.site.name]
        names += [f"blocks.{h.block}.hook_resid_pre" for h in self._heads]
        names += [cut.site.name for cut in self._entries.values()]
        with (
            self._watching(),
            calls(self._heads) as found,
            collect_activations(self._model, dict.fromkeys(names)) as captured,
        ):
            self._model(**here.model_inputs(), use_cache=False)
        other = self._cut.below(there)
        own = captured[self._cut.site.name]
        row, place = used.nonzero(as_tuple=True)
        column = columns[row, place]
        difference = torch.zeros_like(own, dtype=torch.float32)
        difference[row, column] = other[row, column].float() - own[row, column].float()
        prefix = self._prefixes.read(here, first_column(columns, used, reading))
        return _Batch(here, which, reading, difference, prefix, found, captured)

    def _watching(self) -> ExitStack:
        stack = ExitStack()
        for cut in (self._cut, self._above, *self._entries.values()):
            stack.enter_context(cut.watching())
        return stack

    def _measured(self, batch: _Batch, metric: Metric) -> tuple[Tensor, ...]:
        """[n], [S, B, H, 3, n] patched and attributed drops, [S, B, H, 3, S'] summed, and how many ran."""
        gradient = self._gradient(self._above, batch, metric)
        first = self._entries[self._heads[0].block]
        clean = self._logits(first, batch.captured[first.site.name][:, batch.start :], batch, 1, metric)
        seen, attributed = [], []
        for heads in self._heads:
            own = self._gradient(self._entries[heads.block], batch, metric)
            seen.append(self._first_pass(heads, batch, gradient, own))
            stream = batch.captured[f"blocks.{heads.block}.hook_resid_pre"]
            call = batch.found[heads.block]
            attributed.append(-first_order(call, stream, own, batch.difference, self.partitions[0]))
        largest = max(float(one.size.max()) for one in seen)
        patched, count = [], 0
        for heads, one in zip(self._heads, seen, strict=True):
            exact = one.size > self._small * largest
            patched.append(self._second_pass(heads, batch, metric, clean, one.drops, exact))
            count += int(exact.sum())
        through = torch.stack([one.through for one in seen], 1)
        return clean, torch.stack(patched, 1), torch.stack(attributed, 1), through, torch.tensor([count])

    def _gradient(self, cut: LayersAbove, batch: _Batch, metric: Metric) -> Tensor:
        """[n, T, d] gradient of the metric's sum at a site; 0 in columns that are not run."""
        activation = batch.captured[cut.site.name][:, batch.start :].detach().clone().requires_grad_()
        with torch.enable_grad():
            every = torch.arange(len(batch.which), device=activation.device)
            before = batch.prefix.rows(every) if batch.prefix else None
            logits = cut.above_with_gradient(activation, batch.prompts, batch.reading, before)
            value = metric(logits, batch.which).sum()
            (found,) = torch.autograd.grad(value, activation)
        return nn.functional.pad(found.float(), (0, 0, batch.start, 0))

    def _logits(
        self, cut: LayersAbove, activations: Tensor, batch: _Batch, times: int, metric: Metric
    ) -> Tensor:
        """[times n] metric of activations at a site, of the columns after the prefix."""
        every = torch.arange(len(batch.which), device=activations.device).repeat(times)
        before = batch.prefix.rows(every) if batch.prefix else None
        logits = cut.above(activations, batch.prompts.rows(every), batch.reading[every], before)
        return metric(logits, batch.which[every]).float()

    @torch.no_grad()
    def _first_pass(self, heads: Heads, batch: _Batch, above: Tensor, own: Tensor) -> _Seen:
        """What every head of a block then writes, and what follows to first order above it.

        Args:
            above, own: [n, T, d] gradients of the metric at the site above, and where attention is added.
        """
        rotation = self.partitions[1].rotation.to(above.device)
        towards, widths = above @ rotation, self.partitions[1].widths
        size, drops, through = [], [], []
        for change in self._changes(heads, batch):
            size.append(change.flatten(2).norm(dim=2).amax(1))
            drops.append(-(change * own).sum((2, 3)))
            through.append(-subspace_sums(((change @ rotation) * towards).sum((1, 2)), widths))
        shape = (len(self.partitions[0]), len(SIDES), heads.count)
        parts = (torch.stack(some).view(*shape, *some[0].shape[1:]) for some in (size, drops, through))
        return _Seen(*(part.transpose(1, 2) for part in parts))

    @torch.no_grad()
    def _second_pass(
        self, heads: Heads, batch: _Batch, metric: Metric, clean: Tensor, drops: Tensor, exact: Tensor
    ) -> Tensor:
        """[S, H, 3, n] drops, those of the ``exact`` edges [S, H, 3] from passes through the model."""
        entry = self._entries[heads.block]
        base = batch.captured[entry.site.name][:, batch.start :]
        found = drops.clone()
        for number, change in enumerate(self._changes(heads, batch, exact)):
            s, side = divmod(number, len(SIDES))
            chosen = exact[s, :, side]
            if not chosen.any():
                continue
            new = (base + change[chosen, :, batch.start :].to(base.dtype)).flatten(0, 1)
            after = self._logits(entry, new, batch, int(chosen.sum()), metric)
            found[s, chosen, side] = clean - after.view(-1, len(clean))
        return found

    def _changes(self, heads: Heads, batch: _Batch, wanted: Tensor | None = None) -> Iterator[Tensor]:
        """For each subspace and side: [H, n, T, d] what each head then writes, less what it did.

        Args:
            wanted: [S, H, 3] bool; where no head is, nothing is run and what is given is empty.
        """
        call = batch.found[heads.block]
        stream = batch.captured[f"blocks.{heads.block}.hook_resid_pre"]
        results = call.results()
        written = call.written(results)
        slices = heads.slices.to(results.device)
        for subspace in range(len(self.partitions[0])):
            part = self.partitions[0].to(stream.device).project(batch.difference, subspace)
            read = (stream.float() + part).to(stream.dtype)
            read = read if heads.norm is None else heads.norm.forward(read)
            for place, side in enumerate(SIDES):
                if wanted is not None and not wanted[subspace, :, place].any():
                    yield read.new_empty(0)
                    continue
                other = call.results({side: read})
                alone = torch.stack(
                    [results.index_copy(-1, own, other.index_select(-1, own)) for own in slices]
                )
                yield (call.written(alone) - written).float()
