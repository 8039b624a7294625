"""Path patching of what is no head: a subspace on its way into one MLP, or straight on to the site above.

    MLP of block b    MLP(N(x + (h' - h) R_s R_s'))  instead of  MLP(N(x))     x: what the MLP reads
    skip connection   the site above takes  (h' - h) R_s R_s'  on top, nothing between sees it

What the MLP then writes flows on through the model. All edges are run exactly; those into MLPs also to first
order, gradient times difference, by one backward pass an MLP.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ndm_fast.activations.site import parse
from ndm_fast.evaluate.connections.mlps import Mlp, MlpCall, mlp_calls
from ndm_fast.evaluate.connections.passes import Batch, Passes
from ndm_fast.evaluate.connections.weights import subspace_sums
from ndm_fast.evaluate.patching.layers_above import LayersAbove
from ndm_fast.evaluate.patching.patching import Metric
from ndm_fast.evaluate.patching.prompts import Positions, Prompts
from ndm_fast.partition import SubspacePartition


class MlpEffects(NamedTuple):
    """What a metric loses: clean less patched value, for every edge and each of N prompts.

    Edges are [S, B]: subspaces of the site below, MLPs; the skip connection has one more of each subspace.
    """

    clean: Tensor
    """[N] the metric without a patch."""
    patched: Tensor
    """[S, B, N] drop where the subspace is patched on its way into the MLP."""
    attributed: Tensor
    """[S, B, N] the same to first order."""
    arriving: Tensor
    """[S, B, S'] mean drop, to first order, straight through each subspace of the site above."""
    straight: Tensor
    """[S, N] drop where the subspace goes straight to the site above."""
    straight_into: Tensor
    """[S, S'] mean drop of it, to first order, through each subspace there."""


class MlpPatcher:
    """Measures edges into MLPs, and the skip connection, between two sites of a causal language model.

    Args:
        below, above: names of the two sites. mlps: those between.
        partitions: of the two sites.
        rows: prompts in one forward pass, for each of ``together`` subspaces.
    """

    def __init__(
        self,
        model: nn.Module,
        below: str,
        above: str,
        partitions: tuple[SubspacePartition, SubspacePartition],
        mlps: Sequence[Mlp],
        *,
        rows: int = 8,
        together: int = 8,
    ) -> None:
        self.partitions = partitions
        self._mlps, self._rows, self._together = mlps, rows, together
        entries = {mlp.block: f"blocks.{mlp.block}.hook_resid_post" for mlp in mlps}
        self._passes = Passes(model, below, above, partitions, entries, [], lambda: mlp_calls(mlps))

    def measure(
        self,
        prompts: Prompts,
        counterfactuals: Prompts,
        metric: Metric,
        *,
        positions: Positions = None,
        read: Positions | int = -1,
    ) -> MlpEffects:
        """Effects of all edges; arguments and errors as of ``PathPatcher.measure``."""
        batches = self._passes.batches(prompts, counterfactuals, self._rows, positions, read)
        parts = [self._measured(batch, metric) for batch in batches]
        clean, patched, attributed, arriving, straight, into = zip(*parts, strict=True)
        count = len(prompts.tokens)
        return MlpEffects(
            torch.cat(clean),
            torch.cat(patched, -1),
            torch.cat(attributed, -1),
            torch.stack(arriving).sum(0) / count,
            torch.cat(straight, -1),
            torch.stack(into).sum(0) / count,
        )

    def _measured(self, batch: Batch, metric: Metric) -> tuple[Tensor, ...]:
        passes = self._passes
        gradient = passes.gradient(passes.above, batch, metric)
        clean = passes.clean(passes.above, batch, metric)
        shape = (len(self.partitions[0]), 0, len(clean))
        patched, attributed = [clean.new_empty(shape)], [clean.new_empty(shape)]
        arriving = [clean.new_empty(len(self.partitions[0]), 0, len(self.partitions[1]))]
        for mlp in self._mlps:
            call, entry = batch.found[mlp.block], passes.entries[mlp.block]
            drops, through = self._run(
                self._changes(call, batch), entry, gradient, batch, metric, passes.clean(entry, batch, metric)
            )
            patched.append(drops[:, None])
            arriving.append(through[:, None])
            own = passes.gradient(entry, batch, metric)
            attributed.append(-_first_order(call, own, batch.difference, self.partitions[0])[:, None])
        straight, into = self._run(self._parts(batch), passes.above, gradient, batch, metric, clean)
        joined = (torch.cat(parts, 1) for parts in (patched, attributed, arriving))
        return clean, *joined, straight, into

    @torch.no_grad()
    def _run(
        self,
        changes: Iterator[Tensor],
        entry: LayersAbove,
        gradient: Tensor,
        batch: Batch,
        metric: Metric,
        clean: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """[S, n] drops of changes at a site, and [S, S'] summed, to first order through those above."""
        rotation, widths = self.partitions[1].rotation.to(gradient.device), self.partitions[1].widths
        towards = gradient @ rotation
        drops, through = [], []
        for change in changes:
            drops.append(clean - self._passes.changed(entry, batch, change, metric))
            through.append(-subspace_sums(((change @ rotation) * towards).sum((1, 2)), widths))
        return torch.cat(drops), torch.cat(through)

    def _parts(self, batch: Batch) -> Iterator[Tensor]:
        """[K, n, T, d] what each subspace of the site below changes by, some subspaces at a time."""
        partition = self.partitions[0].to(batch.difference.device)
        for some in torch.arange(len(partition)).split(self._together):
            yield torch.stack([partition.project(batch.difference, s) for s in some.tolist()])

    @torch.no_grad()
    def _changes(self, call: MlpCall, batch: Batch) -> Iterator[Tensor]:
        """[K, n, T, d] what an MLP writes where each subspace is changed, less what it did."""
        stream = call.stream.view(batch.difference.shape)
        before = call.written(stream)
        for parts in self._parts(batch):
            moved = (stream.float() + parts).to(stream.dtype).flatten(0, 1)
            yield (call.written(moved).view(parts.shape) - before).float()


def between(below: str, above: str) -> range:
    """Blocks whose MLPs read above one site of the residual stream and write below or at the other.

    Args:
        below, above: canonical names, of resid_pre, resid_mid or resid_post.
    """
    ends = []
    for site in (below, above):
        point = parse(site)
        assert point is not None
        ends.append(point[0] + (point[1] == "resid_post"))
    return range(*ends)


def _first_order(call: MlpCall, gradient: Tensor, difference: Tensor, partition: SubspacePartition) -> Tensor:
    """[S, n] change of a metric to first order, where a subspace moves on its way into an MLP."""
    with torch.enable_grad():
        stream = call.stream.view(difference.shape).detach().clone().requires_grad_()
        value = (call.written(stream).float() * gradient).sum()
        (own,) = torch.autograd.grad(value, stream)
    rotation = partition.rotation.to(difference.device)
    moved = (own.float() @ rotation) * (difference @ rotation)
    return subspace_sums(moved.sum(1), partition.widths).T
