"""Path patching: one subspace of a site replaced on its way into one side of one head, all else as it was.

    z_h = head h with  Q, K or V  read from  N(x + (h' - h) R_s R_s')  instead of  N(x)

x is the stream before the head's block, h and h' are the activations at the site below. Other heads, other
sides and the skip connection see nothing of it; what the head then writes flows on through the model. Beside
the exact effect stands its first order, gradient times difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ndm_fast.evaluate.connections.attribution import first_order
from ndm_fast.evaluate.connections.finding import entrance
from ndm_fast.evaluate.connections.heads import SIDES, Heads, calls
from ndm_fast.evaluate.connections.passes import Batch, Passes
from ndm_fast.evaluate.connections.weights import subspace_sums
from ndm_fast.evaluate.patching.patching import Metric
from ndm_fast.evaluate.patching.prompts import Positions, Prompts
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
        self.partitions = partitions
        self._heads, self._rows, self._small = heads, rows, small
        self._passes = Passes(
            model, below, above, partitions,
            entries={h.block: entrance(model, h.block) for h in heads},
            names=[f"blocks.{h.block}.hook_resid_pre" for h in heads],
            watch=lambda: calls(heads),
        )  # fmt: skip

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
        batches = self._passes.batches(prompts, counterfactuals, self._rows, positions, read)
        parts = [self._measured(batch, metric) for batch in batches]
        clean, patched, attributed, arriving, exact = zip(*parts, strict=True)
        return EdgeEffects(
            torch.cat(clean),
            torch.cat(patched, -1),
            torch.cat(attributed, -1),
            torch.stack(arriving).sum(0) / len(prompts.tokens),
            float(torch.cat(exact).double().mean()) / (patched[0][..., 0].numel() or 1),
        )

    def _measured(self, batch: Batch, metric: Metric) -> tuple[Tensor, ...]:
        """[n], [S, B, H, 3, n] patched and attributed drops, [S, B, H, 3, S'] summed, and how many ran."""
        passes = self._passes
        gradient = passes.gradient(passes.above, batch, metric)
        clean = passes.clean(passes.entries[self._heads[0].block], batch, metric)
        seen, attributed = [], []
        for heads in self._heads:
            own = passes.gradient(passes.entries[heads.block], batch, metric)
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

    @torch.no_grad()
    def _first_pass(self, heads: Heads, batch: Batch, above: Tensor, own: Tensor) -> _Seen:
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
        self, heads: Heads, batch: Batch, metric: Metric, clean: Tensor, drops: Tensor, exact: Tensor
    ) -> Tensor:
        """[S, H, 3, n] drops, those of the ``exact`` edges [S, H, 3] from passes through the model."""
        entry = self._passes.entries[heads.block]
        found = drops.clone()
        for number, change in enumerate(self._changes(heads, batch, exact)):
            s, side = divmod(number, len(SIDES))
            chosen = exact[s, :, side]
            if not chosen.any():
                continue
            found[s, chosen, side] = clean - self._passes.changed(entry, batch, change[chosen], metric)
        return found

    def _changes(self, heads: Heads, batch: Batch, wanted: Tensor | None = None) -> Iterator[Tensor]:
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
