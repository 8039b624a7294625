"""All edges between two sites of a model, by weights and by data, in the form in which they are saved."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ndm_fast.evaluate.circuits.prompts import CircuitTest
from ndm_fast.evaluate.connections.agreement import agreement
from ndm_fast.evaluate.connections.composition import Scored, scored_reads, scored_through, scored_writes
from ndm_fast.evaluate.connections.heads import SIDES, Heads
from ndm_fast.evaluate.connections.mlp_patching import MlpEffects, MlpPatcher
from ndm_fast.evaluate.connections.mlps import Mlp
from ndm_fast.evaluate.connections.path_patching import SMALL, EdgeEffects, PathPatcher
from ndm_fast.evaluate.connections.results import Edge, HeadNode, MlpNode, Skip, Tested
from ndm_fast.evaluate.connections.weights import head_weights, mlp_reads, mlp_shares
from ndm_fast.evaluate.patching.language_model import check_lengths
from ndm_fast.evaluate.patching.patching import patch_effects
from ndm_fast.evaluate.patching.prompts import pad_prompts
from ndm_fast.partition import SubspacePartition

_WITH_PROMPTS = 60
"""Edges of a pair whose effects are kept prompt by prompt."""


@dataclass(frozen=True)
class ConnectionOptions:
    """How edges are measured."""

    prompts: int = 8
    """Of each test."""
    seed: int = 0
    """Of the prompts and of the null's rotations."""
    templates: str = "all"
    """One of ``TEMPLATE_SETS``."""
    rows: int = 8
    """Prompts in one forward pass, for each head of a block."""
    exact: bool = False
    """Run every edge through all layers above, those of small change too; see ``SMALL``."""


@dataclass(frozen=True)
class Between:
    """Two sites and all that lies between them."""

    below: str
    above: str
    lower: SubspacePartition
    upper: SubspacePartition
    heads: Sequence[Heads]
    mlps: Sequence[Mlp]


class Weighed:
    """The scores of heads and MLPs between two sites, by their weights."""

    def __init__(self, pair: Between, seed: int) -> None:
        below, above = pair.lower.cpu(), pair.upper.cpu()
        reads, writes, through = [], [], []
        for one in pair.heads:
            own = head_weights(one)
            sides = [scored_reads(own.acts(side), below, seed=seed) for side in SIDES]
            reads.append([torch.stack(parts, -1).movedim(1, 0) for parts in zip(*sides, strict=True)])
            writes.append(scored_writes(own.acts("V"), above, seed=seed).times)
            through.append(scored_through(own.acts("V"), below, above, seed=seed).times.amax(0))
        self.reads = Scored(*(torch.stack(parts, 1) for parts in zip(*reads, strict=True)))
        """[S, B, H, 3]"""
        self.writes = torch.stack(writes)
        """[B, H, S']"""
        self.through = torch.stack(through).amax(0)
        """[S, S']"""
        read = [scored_reads(mlp_reads(mlp), below, seed=seed) for mlp in pair.mlps]
        self.mlps = Scored(*(torch.cat(parts).T for parts in zip(*read, strict=True))) if read else None
        """[S, B]"""


class Effects(NamedTuple):
    """What was measured on one test, for each subspace and for the whole activation."""

    heads: EdgeEffects
    into_heads: Tensor
    """[B, H, 3] mean drop where the whole activation is patched on its way into each side."""
    mlps: MlpEffects
    into_mlps: Tensor
    """[B] the same, into each MLP."""


def measured(
    model: Any, tokenizer: Any, pair: Between, test: CircuitTest, weighed: Weighed, options: ConnectionOptions
) -> tuple[Effects, Tested]:
    """Patch all edges between two sites on the prompts of a test."""
    began = time.process_time()
    made = test.build(tokenizer, options.prompts, options.seed, options.templates)
    check_lengths(model, made.prompts)
    device = next(model.parameters()).device
    here, there = (pad_prompts(p, device=device) for p in (made.prompts, made.counterfactuals))
    given = {"positions": made.positions}
    total = patch_effects(model, pair.below, pair.lower, here, there, made.metric, **given, rows=64)
    undivided = SubspacePartition(torch.eye(pair.lower.width), [pair.lower.width]).to(device)
    heads, mlps = [], []
    for one in (pair.lower, undivided):
        sites = model, pair.below, pair.above, (one, pair.upper)
        small = 0.0 if options.exact else SMALL
        by_head = PathPatcher(*sites, pair.heads, rows=options.rows, small=small)
        heads.append(by_head.measure(here, there, made.metric, **given))
        by_mlp = MlpPatcher(*sites, pair.mlps, rows=options.rows, together=pair.heads[0].count)
        mlps.append(by_mlp.measure(here, there, made.metric, **given))
    into_heads, into_mlps = (one[1].patched[0].double().mean(-1).cpu() for one in (heads, mlps))
    tested = Tested(
        test=test.name,
        what=f"{test.what}{f' ({made.form})' if made.form else ''}",
        texts=made.texts,
        clean=float(heads[0].clean.double().mean()),
        whole=float(total.whole.double().mean()),
        subspaces=total.means.tolist(),
        agreement=agreement(weighed.reads, heads[0].patched, heads[0].attributed),
        mlp_agreement=agreement(weighed.mlps, mlps[0].patched, mlps[0].attributed) if weighed.mlps else None,
        skip=Skip(
            whole=float(mlps[1].straight.double().mean()),
            effects=mlps[0].straight.double().mean(-1).tolist(),
            arriving=mlps[0].straight_into.tolist(),
        ),
        run=heads[0].run,
        cpu_seconds=time.process_time() - began,
    )
    return Effects(heads[0], into_heads, mlps[0], into_mlps), tested


def head_nodes(heads: Sequence[Heads], weighed: Weighed, effects: Effects | None) -> list[HeadNode]:
    """What every head writes, and the effect of the whole activation on its way into it."""
    into = effects.into_heads if effects else None
    return [
        HeadNode(
            one.block,
            head,
            weighed.writes[place, head].tolist(),
            None if into is None else into[place, head].tolist(),
        )
        for place, one in enumerate(heads)
        for head in range(one.count)
    ]


def head_edges(heads: Sequence[Heads], weighed: Weighed, effects: EdgeEffects | None) -> list[Edge]:
    """Every subspace on its way into every side of every head."""
    numbers = _numbers(effects) if effects else {}
    edges = []
    for s, block, head, side in torch.ones_like(weighed.reads.share).nonzero().tolist():
        share, times, deviations = (float(values[s, block, head, side]) for values in weighed.reads)
        edge = Edge(s, heads[block].block, head, SIDES[side], share, times, deviations)
        given: dict[str, Any] = {n: v[s, block, head, side].tolist() for n, v in numbers.items()}
        edges.append(replace(edge, **given))
    if effects is None:
        return edges
    by_prompt = effects.patched.flatten(0, 3).cpu()
    largest = set(by_prompt.mean(1).abs().topk(min(_WITH_PROMPTS, len(edges))).indices.tolist())
    return [
        replace(e, by_prompt=by_prompt[n].tolist()) if n in largest else replace(e, arriving=None)
        for n, e in enumerate(edges)
    ]


def mlp_nodes(pair: Between, weighed: Weighed, effects: Effects | None) -> list[MlpNode]:
    """Every MLP with its edges."""
    nodes = []
    for place, mlp in enumerate(pair.mlps):
        assert weighed.mlps is not None
        shares = mlp_shares(mlp, pair.lower.cpu(), pair.upper.cpu())
        times, deviations = (values[:, place].tolist() for values in weighed.mlps[1:])
        node = MlpNode(**shares._asdict(), times=times, deviations=deviations)
        if effects:
            numbers = {name: values[:, place].tolist() for name, values in _numbers(effects.mlps).items()}
            node = replace(
                node,
                whole=float(effects.into_mlps[place]),
                effects=numbers["effect"],
                errors=numbers["error"],
                attributed=numbers["attributed"],
                arriving=numbers["arriving"],
                by_prompt=effects.mlps.patched[:, place].tolist(),
            )
        nodes.append(node)
    return nodes


def _numbers(effects: EdgeEffects | MlpEffects) -> dict[str, Tensor]:
    patched = effects.patched.double().cpu()
    return {
        "effect": patched.mean(-1),
        "error": patched.std(-1, correction=0) / patched.shape[-1] ** 0.5,
        "attributed": effects.attributed.double().mean(-1).cpu(),
        "arriving": effects.arriving.double().cpu(),
    }
