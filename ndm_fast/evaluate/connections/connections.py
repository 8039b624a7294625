"""Which subspace writes to which: all heads and MLPs between the sites of several partitions of one model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from ndm_fast.evaluate.connections.composition import kept
from ndm_fast.evaluate.connections.finding import find_heads
from ndm_fast.evaluate.connections.heads import Heads
from ndm_fast.evaluate.connections.measured import (
    Between,
    ConnectionOptions,
    Weighed,
    head_edges,
    head_nodes,
    measured,
    mlp_nodes,
)
from ndm_fast.evaluate.connections.mlp_patching import between
from ndm_fast.evaluate.connections.mlps import find_mlps
from ndm_fast.evaluate.connections.results import Connections, Pair, SiteNodes
from ndm_fast.evaluate.patching.language_model import load_language_model
from ndm_fast.evaluate.revision import trained_on
from ndm_fast.partition import SubspacePartition


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
        pair, left = _between(model, (site, below.to(device)), (upper, above.to(device)))
        left_out |= left
        weighed = Weighed(pair, options.seed)
        effects, tested = None, None
        if chosen:
            effects, tested = measured(model, tokenizer, pair, chosen[number], weighed, options)
        pairs.append(
            Pair(
                number,
                number + 1,
                head_nodes(pair.heads, weighed, effects),
                head_edges(pair.heads, weighed, effects.heads if effects else None),
                mlp_nodes(pair, weighed, effects),
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


def _between(
    model: Any, below: tuple[str, SubspacePartition], above: tuple[str, SubspacePartition]
) -> tuple[Between, set[str]]:
    """All that lies between two sites, and what their weights do not tell."""
    blocks = range(_end(below[0]) + 1, _end(above[0]) + 1)
    if not blocks:
        raise InputError(f"no attention lies between {below[0]} and {above[0]}: take sites further apart")
    heads, others = find_heads(model, blocks), between(below[0], above[0])
    mlps = find_mlps(model, others)
    unknown = [block for block, mlp in zip(others, mlps, strict=True) if mlp is None]
    known = [mlp for mlp in mlps if mlp is not None]
    return Between(below[0], above[0], below[1], above[1], heads, known), _left_out(model, heads, unknown)


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
