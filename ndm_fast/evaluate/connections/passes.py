"""What all path patching shares: prompts prepared once, and passes through the model above a place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ndm_fast.activations.hooks import collect_activations
from ndm_fast.errors import InputError
from ndm_fast.evaluate.patching.head import Head
from ndm_fast.evaluate.patching.layers_above import LayersAbove
from ndm_fast.evaluate.patching.patching import Metric, first_column
from ndm_fast.evaluate.patching.prefix import Prefix, PrefixReader
from ndm_fast.evaluate.patching.prompts import Positions, Prompts, columns_of
from ndm_fast.partition import SubspacePartition


class Batch(NamedTuple):
    """n prompts with all that does not depend on the edge."""

    prompts: Prompts
    which: Tensor
    """[n] numbers of the prompts."""
    reading: Tensor
    """[n, R] columns whose logits are read."""
    difference: Tensor
    """[n, T, d] counterfactual less own activation at the site below, 0 at positions that are not patched."""
    prefix: Prefix | None
    found: Mapping[int, Any]
    """Block -> how the model called what is patched."""
    captured: dict[str, Tensor]

    @property
    def start(self) -> int:
        """First column that is run again."""
        return self.prefix.columns if self.prefix else 0


class Passes:
    """Two sites of a causal language model, and passes through what lies above a place between them.

    Args:
        below, above: names of the two sites. partitions: of them.
        entries: block -> name of the site where a change of that block is added.
        names: sites that are captured besides.
        watch: notes, inside a ``with`` block, how the model calls what is patched.
    """

    def __init__(
        self,
        model: nn.Module,
        below: str,
        above: str,
        partitions: tuple[SubspacePartition, SubspacePartition],
        entries: Mapping[int, str],
        names: Sequence[str],
        watch: Callable[[], AbstractContextManager[Mapping[int, Any]]],
    ) -> None:
        self._model: Any = model
        head = Head(model)
        self.below, self.above = LayersAbove(model, below, head), LayersAbove(model, above, head)
        for cut, partition in zip((self.below, self.above), partitions, strict=True):
            cut.check_fits(partition)
        self.entries = {block: LayersAbove(model, name, head) for block, name in entries.items()}
        self._names, self._watch = names, watch
        self._prefixes = PrefixReader(model)

    def batches(
        self,
        prompts: Prompts,
        counterfactuals: Prompts,
        rows: int,
        positions: Positions = None,
        read: Positions | int = -1,
    ) -> Iterator[Batch]:
        """The prompts, so many at a time, ready to be patched.

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
        for which in torch.arange(len(prompts.tokens), device=prompts.tokens.device).split(rows):
            yield self.prepared(
                prompts.rows(which), counterfactuals.rows(which), which, columns[which], used[which],
                reading[which],
            )  # fmt: skip

    @torch.no_grad()
    def prepared(
        self, here: Prompts, there: Prompts, which: Tensor, columns: Tensor, used: Tensor, reading: Tensor
    ) -> Batch:
        """One batch.

        Args:
            columns, used: [n, P] what is patched, as of ``columns_of``. reading: [n, R] columns.
        """
        cuts = (self.below, self.above, *self.entries.values())
        names = [*(cut.site.name for cut in cuts), *self._names]
        with (
            ExitStack() as stack,
            self._watch() as found,
            collect_activations(self._model, dict.fromkeys(names)) as captured,
        ):
            for cut in cuts:
                stack.enter_context(cut.watching())
            self._model(**here.model_inputs(), use_cache=False)
        other = self.below.below(there)
        own = captured[self.below.site.name]
        row, place = used.nonzero(as_tuple=True)
        column = columns[row, place]
        difference = torch.zeros_like(own, dtype=torch.float32)
        difference[row, column] = other[row, column].float() - own[row, column].float()
        prefix = self._prefixes.read(here, first_column(columns, used, reading))
        return Batch(here, which, reading, difference, prefix, found, captured)

    def gradient(self, cut: LayersAbove, batch: Batch, metric: Metric) -> Tensor:
        """[n, T, d] gradient of the metric's sum at a site; 0 in columns that are not run."""
        activation = batch.captured[cut.site.name][:, batch.start :].detach().clone().requires_grad_()
        with torch.enable_grad():
            every = torch.arange(len(batch.which), device=activation.device)
            before = batch.prefix.rows(every) if batch.prefix else None
            logits = cut.above_with_gradient(activation, batch.prompts, batch.reading, before)
            value = metric(logits, batch.which).sum()
            (found,) = torch.autograd.grad(value, activation)
        return nn.functional.pad(found.float(), (0, 0, batch.start, 0))

    @torch.no_grad()
    def changed(self, cut: LayersAbove, batch: Batch, change: Tensor, metric: Metric) -> Tensor:
        """[K, n] metric where a site has [K, n, T, d] added to it."""
        base = batch.captured[cut.site.name][:, batch.start :]
        activations = (base + change[:, :, batch.start :].to(base.dtype)).flatten(0, 1)
        every = torch.arange(len(batch.which), device=base.device).repeat(len(change))
        before = batch.prefix.rows(every) if batch.prefix else None
        logits = cut.above(activations, batch.prompts.rows(every), batch.reading[every], before)
        return metric(logits, batch.which[every]).float().view(len(change), -1)

    def clean(self, cut: LayersAbove, batch: Batch, metric: Metric) -> Tensor:
        """[n] metric without a change, by way of the same passes."""
        nothing = torch.zeros_like(batch.difference)[None]
        return self.changed(cut, batch, nothing, metric)[0]
