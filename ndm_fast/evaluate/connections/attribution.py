"""Gradient times difference: the effect of every edge to first order, by one backward pass a head."""

from __future__ import annotations

import torch
from torch import Tensor

from ndm_fast.evaluate.connections.heads import SIDES, Call
from ndm_fast.evaluate.connections.weights import subspace_sums
from ndm_fast.partition import SubspacePartition


def first_order(
    call: Call, stream: Tensor, gradient: Tensor, difference: Tensor, partition: SubspacePartition
) -> Tensor:
    """[S, H, 3, n] change of a metric to first order, where a subspace moves on its way into a side.

    Args:
        stream: [n, T, d] input of the block. gradient: [n, T, d] of the metric, where attention is added.
        difference: [n, T, d] how the activation at the site below moves.
    """
    heads = call.heads
    rotation = partition.rotation.to(difference.device)
    moved = difference @ rotation
    with torch.enable_grad():
        leaves = [stream.detach().clone().requires_grad_() for _ in SIDES]
        read = [leaf if heads.norm is None else heads.norm.forward(leaf) for leaf in leaves]
        results = call.results(dict(zip(SIDES, read, strict=True)))
        made = results.detach().clone().requires_grad_()
        wanted = (call.written(made).float() * gradient).sum()
        (by_result,) = torch.autograd.grad(wanted, made)
        found = []
        for own in heads.slices.to(results.device):
            value = (results.index_select(-1, own) * by_result.index_select(-1, own)).sum()
            found.append(torch.stack(torch.autograd.grad(value, leaves, retain_graph=True)))
    towards = torch.stack(found).float() @ rotation  # [H, 3, n, T, d]
    return subspace_sums((towards * moved).sum(3), partition.widths).permute(3, 0, 1, 2)
