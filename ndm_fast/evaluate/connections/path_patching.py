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
from ndm_fast.activations.block_points import PARALLEL, POST_NORM, SEQUENTIAL
from ndm_fast.activations.families import family_of
from ndm_fast.activations.structure import structure_of
from ndm_fast.activations.wrappers import describe, unwrapped
from ndm_fast.errors import InputError
from ndm_fast.evaluate.connections.attribution import first_order
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
    """[S, B, H, 3, S'] mean drop, to first order, through each subspace of the site above."""


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


class PathPatcher:
    """Measures edges between two sites of a causal language model.

    Args:
        below, above: names of the two sites. heads: those between.
        partitions: of the two sites.
        rows: prompts in one forward pass, for each head of a block.

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
    ) -> None:
        self._model: Any = model
        self._cut = LayersAbove(model, below)
        self._above = LayersAbove(model, above)
        for cut, partition in zip((self._cut, self._above), partitions, strict=True):
            cut.check_fits(partition)
        self.below, self.partitions = self._cut.site.name, partitions
        self._heads, self._rows = heads, rows
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
        clean, patched, attributed, arriving = zip(*parts, strict=True)
        return EdgeEffects(
            torch.cat(clean),
            torch.cat(patched, -1),
            torch.cat(attributed, -1),
            torch.stack(arriving).sum(0) / len(prompts.tokens),
        )

    @torch.no_grad()
    def _prepared(
        self, here: Prompts, there: Prompts, which: Tensor, columns: Tensor, used: Tensor, reading: Tensor
    ) -> _Batch:
        names = [self._cut.site.name, self._above.site.name]
        names += [f"blocks.{h.block}.hook_resid_pre" for h in self._heads]
        names += [cut.site.name for cut in self._entries.values()]
        with self._watching(), calls(self._heads) as found:
            with collect_activations(self._model, dict.fromkeys(names)) as captured:
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

    def _measured(self, batch: _Batch, metric: Metric) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        gradient = self._gradient(self._above, batch, metric)
        first = self._entries[self._heads[0].block]
        clean = self._logits(first, batch.captured[first.site.name][:, batch.start :], batch, 1, metric)
        patched, attributed, arriving = [], [], []
        for heads in self._heads:
            entry = self._entries[heads.block]
            drops, through = self._block(heads, batch, metric, gradient)
            patched.append(clean - drops)
            arriving.append(through)
            attributed.append(
                -first_order(
                    batch.found[heads.block],
                    batch.captured[f"blocks.{heads.block}.hook_resid_pre"],
                    self._gradient(entry, batch, metric),
                    batch.difference,
                    self.partitions[0],
                )
            )
        return clean, torch.stack(patched, 1), torch.stack(attributed, 1), torch.stack(arriving, 1)

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

    def _logits(self, cut: LayersAbove, activations: Tensor, batch: _Batch, times: int, metric: Metric) -> Tensor:
        """[times n] metric of activations at a site, of the columns after the prefix."""
        every = torch.arange(len(batch.which), device=activations.device).repeat(times)
        before = batch.prefix.rows(every) if batch.prefix else None
        logits = cut.above(activations, batch.prompts.rows(every), batch.reading[every], before)
        return metric(logits, batch.which[every]).float()

    @torch.no_grad()
    def _block(
        self, heads: Heads, batch: _Batch, metric: Metric, gradient: Tensor
    ) -> tuple[Tensor, Tensor]:
        """[S, H, 3, n] patched values, and [S, H, 3, S'] first-order drops through the site above, summed."""
        entry = self._entries[heads.block]
        base = batch.captured[entry.site.name][:, batch.start :]
        rotation = self.partitions[1].rotation.to(base.device)
        towards = gradient[:, batch.start :] @ rotation
        values, through = [], []
        for change in self._changes(heads, batch):
            new = base + change[:, :, batch.start :].to(base.dtype)
            values.append(self._logits(entry, new.flatten(0, 1), batch, heads.count, metric))
            moved = (change[:, :, batch.start :] @ rotation) * towards
            through.append(-subspace_sums(moved.sum((1, 2)), self.partitions[1].widths))
        shape = (len(self.partitions[0]), len(SIDES), heads.count)
        return (
            torch.stack(values).view(*shape, -1).transpose(1, 2),
            torch.stack(through).view(*shape, -1).transpose(1, 2),
        )

    def _changes(self, heads: Heads, batch: _Batch) -> Iterator[Tensor]:
        """For each subspace and side: [H, n, T, d] what each head then writes into the stream, less what it did."""
        call = batch.found[heads.block]
        stream = batch.captured[f"blocks.{heads.block}.hook_resid_pre"]
        results = call.results()
        written = call.written(results)
        slices = heads.slices.to(results.device)
        for subspace in range(len(self.partitions[0])):
            part = self.partitions[0].to(stream.device).project(batch.difference, subspace)
            read = (stream.float() + part).to(stream.dtype)
            read = read if heads.norm is None else heads.norm.forward(read)
            for side in SIDES:
                other = call.results({side: read})
                alone = torch.stack(
                    [results.index_copy(-1, own, other.index_select(-1, own)) for own in slices]
                )
                yield (call.written(alone) - written).float()


def entrance(model: nn.Module, block: int) -> str:
    """Where the change of one head is added: after the attention, or after both branches that run at once.

    Raises:
        InputError: the block normalises the sum, or no module takes or gives it.
    """
    model = unwrapped(model)
    family = family_of(model)
    if family is None:
        form = structure_of(model).forms[block]
    elif family.is_post_norm:
        form = POST_NORM
    else:
        form = SEQUENTIAL if "resid_mid" in family.points(model.config) else PARALLEL
    if form not in (SEQUENTIAL, PARALLEL):
        raise InputError(
            f"what a head of block {block} of {describe(model)} writes is not simply added to the stream at a "
            "known place, so its paths cannot be patched: leave --tests away, weights alone are read"
        )
    return f"blocks.{block}.hook_resid_{'mid' if form == SEQUENTIAL else 'post'}"
