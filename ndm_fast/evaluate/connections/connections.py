"""Which subspace writes to which: all heads and MLPs between the sites of several partitions of one model."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ndm_fast.activations.site import parse
from ndm_fast.activations.sites import resolve_site
from ndm_fast.activations.wrappers import text_config
from ndm_fast.config import HubOptions
from ndm_fast.errors import InputError
from ndm_fast.evaluate.circuits.prompts import CircuitTest, chosen_tests
from ndm_fast.evaluate.connections.agreement import agreement
from ndm_fast.evaluate.connections.composition import (
    Scored,
    kept,
    scored_reads,
    scored_through,
    scored_writes,
)
from ndm_fast.evaluate.connections.finding import find_heads
from ndm_fast.evaluate.connections.heads import SIDES, Heads
from ndm_fast.evaluate.connections.mlps import find_mlps
from ndm_fast.evaluate.connections.path_patching import SMALL, EdgeEffects, PathPatcher
from ndm_fast.evaluate.connections.results import (
    Connections,
    Edge,
    HeadNode,
    Pair,
    SiteNodes,
    Tested,
)
from ndm_fast.evaluate.connections.weights import head_weights, mlp_shares
from ndm_fast.evaluate.patching.language_model import check_lengths, load_language_model
from ndm_fast.evaluate.patching.patching import patch_effects
from ndm_fast.evaluate.patching.prompts import pad_prompts
from ndm_fast.evaluate.revision import trained_on
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


class Weighed:
    """The scores of the heads between two sites, by their weights."""

    def __init__(self, heads: Sequence[Heads], below: SubspacePartition, above: SubspacePartition, seed: int):
        reads, writes, through = [], [], []
        for one in heads:
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


def run_connections(
    partitions: Mapping[str, SubspacePartition],
    model_name: str,
    *,
    tests: Sequence[str] | None = None,
    device: str = "cpu",
    hub: HubOptions | None = None,
    options: ConnectionOptions | None = None,
) -> Connections:
    """Connect the subspaces of each site with those of the next one above.

    Args:
        partitions: by name; each says in ``source`` which site it was trained on, one of the residual stream.
        tests: names of circuit tests, one for each pair of sites from below to above, or one for all; the
            edges are then measured by path patching too. Without any only weights are read.
        hub: see ``load_model``.

    Raises:
        InputError: fewer than two sites, the same site twice, sites that are not of the residual stream,
            tests that do not fit, heads that are not known, a tokenizer that splits the words.
    """
    options = options or ConnectionOptions()
    if options.prompts < 1:
        raise InputError(f"{options.prompts} prompts are too few: give at least 1")
    model, tokenizer = load_language_model(
        model_name, device, hub=trained_on(model_name, hub, *(p.source for p in partitions.values()))
    )
    ordered = _ordered(model, partitions)
    chosen = _tests(tests, len(ordered) - 1)
    pairs: list[Pair] = []
    left_out: set[str] = set()
    for number in tqdm(range(len(ordered) - 1), desc="pairs of sites", leave=False, disable=None):
        (site, _, below), (upper, _, above) = ordered[number], ordered[number + 1]
        blocks = range(_end(site) + 1, _end(upper) + 1)
        heads = find_heads(model, blocks)
        weighed = Weighed(heads, below, above, options.seed)
        effects, tested, into = None, None, None
        if chosen:
            pair = _Sites(site, upper, below.to(device), above.to(device), heads)
            effects, into, tested = _measured(model, tokenizer, pair, chosen[number], weighed, options)
        mlps = find_mlps(model, blocks)
        left_out |= _left_out(model, heads, [b for b, mlp in zip(blocks, mlps, strict=True) if mlp is None])
        pairs.append(
            Pair(
                number,
                number + 1,
                _head_nodes(heads, weighed, into),
                _edges(heads, weighed, effects),
                [mlp_shares(mlp, below.cpu(), above.cpu()) for mlp in mlps if mlp is not None],
                _over_chance(kept(below.cpu(), above.cpu()), above.widths),
                weighed.through.tolist(),
                tested,
            )
        )
    sites = [SiteNodes(site, name, list(partition.widths)) for site, name, partition in ordered]
    return Connections(model_name, sites, pairs, sorted(left_out))


def _ordered(
    model: Any, partitions: Mapping[str, SubspacePartition]
) -> list[tuple[str, str, SubspacePartition]]:
    """Site, name and partition, from below to above."""
    found: dict[str, tuple[str, SubspacePartition]] = {}
    for name, partition in partitions.items():
        where = partition.source.get("site")
        if not where:
            raise InputError(f"{name} does not say which site it is for: give a run of ndm-fast train")
        site = resolve_site(model, where).name
        point = parse(site)
        if point is None or not point[1].startswith("resid"):
            raise InputError(f"{site} of {name} is not in the residual stream: take resid_pre, mid or post")
        if site in found:
            raise InputError(f"{name} and {found[site][0]} are both of {site}: give one run a site")
        found[site] = name, partition
    if len(found) < 2:
        raise InputError("connections need subspaces at two sites or more: give as many runs of one model")
    order = sorted(found, key=lambda site: (_end(site), site.endswith("post")))
    return [(site, *found[site]) for site in order]


def _end(site: str) -> int:
    """The last block whose attention the site is after."""
    point = parse(site)
    assert point is not None
    return point[0] - (point[1] == "resid_pre")


def _tests(names: Sequence[str] | None, count: int) -> list[CircuitTest]:
    if not names:
        return []
    if len(names) not in (1, count):
        raise InputError(f"{len(names)} tests for {count} pairs of sites: give one each, or one for all")
    return chosen_tests(names if len(names) == count else [*names] * count)


@dataclass(frozen=True)
class _Sites:
    """Two sites and the heads between them."""

    below: str
    above: str
    lower: SubspacePartition
    upper: SubspacePartition
    heads: Sequence[Heads]


def _measured(
    model: Any,
    tokenizer: Any,
    pair: _Sites,
    test: CircuitTest,
    weighed: Weighed,
    options: ConnectionOptions,
) -> tuple[EdgeEffects, Tensor, Tested]:
    """Effects of all edges, of the whole activation into each side [B, H, 3], and what was tested."""
    began = time.process_time()
    made = test.build(tokenizer, options.prompts, options.seed, options.templates)
    check_lengths(model, made.prompts)
    device = next(model.parameters()).device
    here, there = (pad_prompts(p, device=device) for p in (made.prompts, made.counterfactuals))
    given = {"positions": made.positions}
    total = patch_effects(model, pair.below, pair.lower, here, there, made.metric, **given, rows=64)
    undivided = SubspacePartition(torch.eye(pair.lower.width), [pair.lower.width]).to(device)
    found = [
        PathPatcher(
            model,
            pair.below,
            pair.above,
            (one, pair.upper),
            pair.heads,
            rows=options.rows,
            small=0.0 if options.exact else SMALL,
        ).measure(here, there, made.metric, **given)
        for one in (pair.lower, undivided)
    ]
    effects, whole = found
    tested = Tested(
        test=test.name,
        what=f"{test.what}{f' ({made.form})' if made.form else ''}",
        texts=made.texts,
        clean=float(effects.clean.double().mean()),
        whole=float(total.whole.double().mean()),
        subspaces=total.means.tolist(),
        agreement=agreement(weighed.reads, effects),
        run=effects.run,
        cpu_seconds=time.process_time() - began,
    )
    return effects, whole.patched[0].double().mean(-1).cpu(), tested


def _head_nodes(heads: Sequence[Heads], weighed: Weighed, into: Tensor | None) -> list[HeadNode]:
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


def _edges(heads: Sequence[Heads], weighed: Weighed, effects: EdgeEffects | None) -> list[Edge]:
    measured = _numbers(effects) if effects else {}
    edges = []
    for s, block, head, side in torch.ones_like(weighed.reads.share).nonzero().tolist():
        share, times, deviations = (float(values[s, block, head, side]) for values in weighed.reads)
        edge = Edge(s, heads[block].block, head, SIDES[side], share, times, deviations)
        given: dict[str, Any] = {n: v[s, block, head, side].tolist() for n, v in measured.items()}
        edges.append(replace(edge, **given))
    if effects is None:
        return edges
    by_prompt = effects.patched.flatten(0, 3).cpu()
    largest = set(by_prompt.mean(1).abs().topk(min(_WITH_PROMPTS, len(edges))).indices.tolist())
    return [
        replace(e, by_prompt=by_prompt[n].tolist()) if n in largest else replace(e, arriving=None)
        for n, e in enumerate(edges)
    ]


def _numbers(effects: EdgeEffects) -> dict[str, Tensor]:
    patched = effects.patched.double().cpu()
    return {
        "effect": patched.mean(-1),
        "error": patched.std(-1, correction=0) / patched.shape[-1] ** 0.5,
        "attributed": effects.attributed.double().mean(-1).cpu(),
        "arriving": effects.arriving.double().cpu(),
    }


def _over_chance(shares: Tensor, widths: Sequence[int]) -> list[list[float]]:
    return (shares * sum(widths) / torch.tensor(widths)).tolist()


def _left_out(model: Any, heads: Sequence[Heads], without: Sequence[int]) -> set[str]:
    """What the weights do not tell in this model."""
    config = text_config(model)
    found = {"the scale that a norm divides by, which depends on the activation"}
    if any(getattr(p.module, "bias", None) is not None for h in heads for p in h.sides.values()):
        found.add("biases of queries, keys and values: they read no subspace")
    if getattr(config, "rope_parameters", None) or getattr(config, "rope_theta", None):
        found.add("rotary positions: queries and keys meet as at equal positions")
    if any(h.side_norms for h in heads):
        found.add("the scale of the norms of queries and keys; their gains count")
    if getattr(config, "attn_logit_softcapping", None):
        found.add("the cap on attention scores")
    if without:
        found.add(f"the MLPs of blocks {', '.join(map(str, without))}, which are not two plain matrices")
    return found
