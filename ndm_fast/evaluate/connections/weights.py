"""What heads and MLPs read of each subspace, and write into each, told by their weights alone.

A head h reads the stream ``x`` as ``x N W`` (N: the gain of the block's norm, W: its queries, keys or values)
and writes ``z O G`` (O: its rows of the output matrix, G: the gain of the norm of what is written). With
``R_s`` the directions of a subspace, the shares of a side are those of the matrix that the side acts by:

    Q    ||R_s' N W_q (N W_k)'||^2 / ||N W_q (N W_k)'||^2       where it looks from
    K    ||R_s' N W_k (N W_q)'||^2 / ||N W_k (N W_q)'||^2       what it looks for
    V    ||R_s' N W_v O G||^2 / ||N W_v O G||^2                 what it takes along
    out  ||N W_v O G R_s||^2 / ||N W_v O G||^2                  what it writes

Frobenius norms; the shares of all subspaces sum to 1. They do not change when queries and keys, or values and
output, are turned against each other inside a head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ndm_fast.evaluate.connections.heads import SIDES, Heads
from ndm_fast.evaluate.connections.matrices import gain_of, matrix
from ndm_fast.evaluate.connections.mlps import Mlp
from ndm_fast.partition import SubspacePartition


class Factors(NamedTuple):
    """Two matrices whose product acts on the stream: rows ``x`` become ``x left right``."""

    left: Tensor
    """[n, d, c]"""
    right: Tensor
    """[n, c, d]"""


@dataclass(frozen=True)
class HeadWeights:
    """The weights of the H heads of a block, norms folded in."""

    block: int
    reads: Mapping[str, Tensor]
    """Side -> [H, d, c]: what the side makes of a row of the stream."""
    writes: Tensor
    """[H, c, d]: what a head's result adds to the stream."""

    def acts(self, side: str) -> Factors:
        """The matrices that a side acts by, what reads first."""
        if side == "V":
            return Factors(self.reads["V"], self.writes)
        other = "K" if side == "Q" else "Q"
        return Factors(self.reads[side], self.reads[other].mT)


@torch.no_grad()
def head_weights(heads: Heads) -> HeadWeights:
    """The weights of a block's heads, with the gains of all norms folded in.

    Left out is what is no matrix on the stream: biases, rotary positions (queries meet keys as at equal
    positions), the scales that norms divide by, and any cap on the scores.

    Raises:
        InputError: a norm or a projection is of an unknown kind.
    """
    out = matrix(heads.out).cpu()
    width = out.shape[1]
    before, after = gain_of(heads.norm, width), gain_of(heads.out_norm, width)
    reads = {}
    for side in SIDES:
        module, columns = heads.sides[side].module, heads.sides[side].columns
        folded = before.into(matrix(module).cpu())[:, columns].permute(1, 0, 2)
        if side in heads.side_norms:
            folded = gain_of(heads.side_norms[side], columns.shape[1]).out_of(folded)
        reads[side] = folded
    return HeadWeights(heads.block, reads, after.out_of(out)[heads.slices])


def read_shares(acts: Factors, partition: SubspacePartition) -> Tensor:
    """[n, S] share of each subspace in what matrices read."""
    return subspace_sums(_row_energy(acts, partition.rotation), partition.widths)


def write_shares(acts: Factors, partition: SubspacePartition) -> Tensor:
    """[n, S] share of each subspace in what matrices write."""
    return read_shares(Factors(acts.right.mT, acts.left.mT), partition)


def _row_energy(acts: Factors, rotation: Tensor) -> Tensor:
    """[n, d] squared length of each rotated row of the products, over their sum."""
    left = rotation.T.to(acts.left) @ acts.left
    gram = acts.right @ acts.right.mT
    energy = ((left @ gram) * left).sum(2)
    return energy / energy.sum(1, keepdim=True)


def subspace_sums(rows: Tensor, widths: Sequence[int]) -> Tensor:
    """[..., S] sums of [..., d] over the coordinates of each subspace."""
    return torch.stack([part.sum(-1) for part in rows.split(list(widths), -1)], -1)


class MlpShares(NamedTuple):
    """What the MLP of a block reads of each subspace below, and writes into each above."""

    block: int
    read: list[float]
    write: list[float]


@torch.no_grad()
def mlp_shares(mlp: Mlp, below: SubspacePartition, above: SubspacePartition) -> MlpShares:
    """Shares of ``||R_s' N W_in||^2`` and ``||W_out G R_s||^2``; gates and inputs count alike."""
    output = gain_of(mlp.out_norm, above.width).out_of(matrix(mlp.out).cpu())
    read = read_shares(mlp_reads(mlp), below)[0]
    write = subspace_sums((output @ above.rotation).square().sum(0), above.widths)
    return MlpShares(mlp.block, read.tolist(), (write / write.sum()).tolist())


@torch.no_grad()
def mlp_reads(mlp: Mlp) -> Factors:
    """A matrix with the Gram matrix of all that an MLP reads by, ``N W_in``, and as few columns as rows."""
    weight = torch.cat([matrix(m).cpu() for m in mlp.inputs], 1)
    folded = gain_of(mlp.norm, len(weight)).into(weight)
    values, vectors = torch.linalg.eigh(folded @ folded.T)
    root = vectors * values.clamp_min(0).sqrt()
    return Factors(root[None], torch.eye(len(root))[None])
