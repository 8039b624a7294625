"""Does every variable of the planted model lead to itself? Edges between two sites, whose truth is known.

The variables are drawn independently, and a counterfactual changes one of them alone. So between the sites
after the first and after the second block, whatever a variable's value is carried by, an edge from the
subspace that holds variable k is right if it ends in the subspace that holds k, and wrong if it ends in
another. What the language leaves open is the way:

    skip   straight on, at the position that is read
    head   through the values of a head, from positions before
    MLP    through the second block's MLP

Which ways are taken is up to training, and is measured first (:func:`ways`).
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ndm_fast.evaluate.baselines import baseline_partition
from ndm_fast.evaluate.connections.agreement import area_under_curve, rank_of, strong
from ndm_fast.evaluate.connections.composition import kept, scored_through
from ndm_fast.evaluate.connections.finding import find_heads
from ndm_fast.evaluate.connections.heads import SIDES
from ndm_fast.evaluate.connections.mlp_patching import MlpPatcher
from ndm_fast.evaluate.connections.mlps import find_mlps
from ndm_fast.evaluate.connections.path_patching import PathPatcher
from ndm_fast.evaluate.connections.weights import head_weights, subspace_sums
from ndm_fast.evaluate.patching.patching import patch_effects
from ndm_fast.evaluate.truth import planted
from ndm_fast.evaluate.truth.one_thread import one_thread
from ndm_fast.evaluate.truth.planted_model import (
    PlantedLanguage,
    PlantedRows,
    planted_activations,
    train_planted_model,
)
from ndm_fast.evaluate.truth.planted_pairs import planted_pairs
from ndm_fast.partition import SubspacePartition
from ndm_fast.train.restarts import best, random_starts

BELOW, ABOVE = "blocks.0.hook_resid_post", planted.SITE

_ROWS = 256
"""Prompts in one forward pass, for each head."""


def variable_subspaces(rows: PlantedRows) -> SubspacePartition:
    """Subspaces made with the labels: the span of each variable's means, and what is left.

    The spans need not be orthogonal; taken is the nearest orthogonal matrix, so that no variable comes first.
    """
    bases = []
    for values in rows.values.T:
        means = _means(rows.activations, values)
        bases.append(torch.linalg.svd(means)[2][: len(means) - 1].T)
    known = torch.cat(bases, 1)
    left = torch.linalg.svd(known)[0][:, known.shape[1] :]
    u, _, v = torch.linalg.svd(torch.cat([known, left], 1))
    return SubspacePartition(u @ v, [*(basis.shape[1] for basis in bases), left.shape[1]])


def carriers(partition: SubspacePartition, rows: PlantedRows) -> list[int]:
    """Variable -> the subspace in which its means differ most."""
    found = []
    for values in rows.values.T:
        spread = (_means(rows.activations, values) @ partition.rotation).square().sum(0)
        found.append(int(subspace_sums(spread, partition.widths).argmax()))
    return found


def _means(activations: Tensor, values: Tensor) -> Tensor:
    """[values, d] means by value, less the mean of all."""
    sums = torch.zeros(int(values.max()) + 1, activations.shape[1]).index_add(0, values, activations)
    return sums / values.bincount()[:, None] - activations.mean(0)


class Ways(NamedTuple):
    """Mean effect over all variables of the whole activation, patched at all tokens, by the way it goes."""

    whole: float
    """All ways at once."""
    skip: float
    heads: dict[str, list[float]]
    """Side -> [H]."""
    mlp: float


def ways(model: Any, language: PlantedLanguage, prompts: int, seed: int) -> Ways:
    """Which ways the variables take from the site below to the one above."""
    width = model.config.n_embd
    undivided = SubspacePartition(torch.eye(width), [width])
    by_head, others = _patchers(model, (undivided, undivided))
    drops, heads = [], []
    for variable in range(language.variables):
        pairs = planted_pairs(language, variable, prompts, seed)
        given = pairs.prompts, pairs.counterfactuals, pairs.metric
        whole = patch_effects(model, BELOW, undivided, *given, read=pairs.position, rows=_ROWS).whole
        heads.append(by_head.measure(*given, read=pairs.position).patched[0, 0].mean(-1))
        rest = others.measure(*given, read=pairs.position)
        drops.append(torch.stack([whole.mean(), rest.straight.mean(), rest.patched.mean()]))
    whole, skip, mlp = torch.stack(drops).mean(0).tolist()
    sides = torch.stack(heads).mean(0).T.tolist()
    return Ways(whole, skip, dict(zip(SIDES, sides, strict=True)), mlp)


def _patchers(
    model: Any, partitions: tuple[SubspacePartition, SubspacePartition]
) -> tuple[PathPatcher, MlpPatcher]:
    sites = model, BELOW, ABOVE, partitions
    return (
        PathPatcher(*sites, find_heads(model, [1]), rows=_ROWS, small=0),
        MlpPatcher(*sites, [mlp for mlp in find_mlps(model, [1]) if mlp], rows=_ROWS),
    )


def edges_by_weights(
    model: Any, partitions: tuple[SubspacePartition, SubspacePartition]
) -> dict[str, Tensor]:
    """Way -> [S, S'] share of each pair of subspaces, over chance. MLPs join all pairs, so they have none."""
    below, above = partitions
    skip = kept(below, above) * above.width / torch.tensor(above.widths)
    through = scored_through(head_weights(find_heads(model, [1])[0]).acts("V"), below, above).times
    return {"skip": skip, **{f"head {h}": times for h, times in enumerate(through)}}


def edges_by_data(
    model: Any,
    language: PlantedLanguage,
    partitions: tuple[SubspacePartition, SubspacePartition],
    prompts: int,
    seed: int,
) -> dict[str, Tensor]:
    """Way -> [variables, S, S'] mean drop by path patching; from the site above on to first order.

    Above it are the last norm and the unembedding alone.
    """
    found: dict[str, list[Tensor]] = {}
    by_head, others = _patchers(model, partitions)
    for variable in range(language.variables):
        pairs = planted_pairs(language, variable, prompts, seed)
        given = pairs.prompts, pairs.counterfactuals, pairs.metric
        rest = others.measure(*given, read=pairs.position)
        heads = by_head.measure(*given, read=pairs.position).arriving[:, 0, :, SIDES.index("V")]
        found.setdefault("skip", []).append(rest.straight_into)
        for head in range(heads.shape[1]):
            found.setdefault(f"head {head}", []).append(heads[:, head])
        found.setdefault("MLP", []).append(rest.arriving[:, 0])
    return {way: torch.stack(drops) for way, drops in found.items()}


@dataclass(frozen=True)
class Routing:
    """How the right edges of one pair of partitions stand among all. Right: from variable to the same one."""

    carriers: tuple[list[int], list[int]]
    """Variable -> its subspace, at the site below and above."""
    distinct: int
    """Right edges that no other variable has too."""
    pairs: int
    """Of subspaces, for each way."""
    weights: dict[str, list[int]]
    """Way -> [variables] rank of the right edge by weights, among all pairs of subspaces."""
    weights_area: dict[str, float]
    """Way -> area under the curve: weights against which edge is right."""
    weights_first: dict[str, int]
    """Way -> variables whose right edge is the first of those that leave the same subspace."""
    data: dict[str, list[int]]
    """Way -> [variables] rank of the right edge by the effect on that variable."""
    data_any: list[int]
    """[variables] rank of the best right edge among all pairs and ways."""
    data_share: dict[str, float]
    """Way -> mean share of the right edge in the sizes of all edges' effects on a variable."""
    data_own: dict[str, float]
    """Way -> mean share of its own variable in the sizes of the right edge's effects on all variables."""
    drops: dict[str, float]
    """Way -> mean effect of the right edge."""
    weights_find_data: float
    """Area under the curve: weights against the edges through skip and heads that have a tenth of the largest
    effect on any variable."""


def routing(
    model: Any,
    language: PlantedLanguage,
    partitions: tuple[SubspacePartition, SubspacePartition],
    carried: tuple[list[int], list[int]],
    prompts: int,
    seed: int,
) -> Routing:
    """Rank the right edges by weights and by data.

    Args:
        carried: of the sites below and above, from :func:`carriers`.
    """
    weights = edges_by_weights(model, partitions)
    data = edges_by_data(model, language, partitions, prompts, seed)
    right = [*zip(*carried, strict=True)]
    true = torch.zeros_like(weights["skip"], dtype=torch.bool)
    true[tuple(torch.tensor(carried))] = True
    sizes = {way: drops.abs() for way, drops in data.items()}
    every = torch.stack([*sizes.values()], 1)  # [variables, W, S, S']
    there = strong(torch.stack([sizes[way].amax(0) for way in weights]))
    return Routing(
        carriers=carried,
        distinct=sum(right.count(pair) == 1 for pair in right),
        pairs=true.numel(),
        weights={way: [rank_of(times, pair) for pair in right] for way, times in weights.items()},
        weights_area={w: area_under_curve(times.flatten(), true.flatten()) for w, times in weights.items()},
        weights_first={w: sum(int(times[s].argmax()) == t for s, t in right) for w, times in weights.items()},
        data={way: [rank_of(one, pair) for one, pair in zip(size, right, strict=True)]
              for way, size in sizes.items()},
        data_any=[
            min(rank_of(one, (way, *pair)) for way in range(len(one)))
            for one, pair in zip(every, right, strict=True)
        ],
        data_share={way: _mean(one[pair] / one.sum() for one, pair in zip(size, right, strict=True))
                    for way, size in sizes.items()},
        data_own={
            way: _mean(size[k][pair] / size[:, pair[0], pair[1]].sum() for k, pair in enumerate(right))
            for way, size in sizes.items()
        },
        drops={way: _mean(one[pair] for one, pair in zip(drops, right, strict=True))
               for way, drops in data.items()},
        weights_find_data=area_under_curve(torch.stack([*weights.values()]).flatten(), there.flatten()),
    )  # fmt: skip


def _mean(values: Iterable[Tensor]) -> float:
    return float(torch.stack([*values]).mean())


def run_routing(
    variables: int = 6, values: int = 8, *, seed: int = 0, starts: int = 4, prompts: int = 256
) -> dict[str, Any]:
    """Train the planted model, find subspaces at both sites, and rank the right edges.

    Args:
        seed: of model, text, starts and prompts.
        starts: random starts of NDM at each site, of which the one of lowest held-out loss goes on.
    """
    began = time.process_time()
    language, settings = PlantedLanguage(variables, values), planted.settings()
    with one_thread():
        model, loss = train_planted_model(
            language, width=settings.width, steps=settings.model_steps, seed=seed
        )
        rows = [
            planted_activations(model, language, site, settings.rows, seed=seed) for site in (BELOW, ABOVE)
        ]
        ndm = [_found(one.activations, starts, seed) for one in rows]
        widths = list(ndm[0].widths)
        partitions = {
            "labels": [variable_subspaces(one) for one in rows],
            "ndm": ndm,
            "pca": [baseline_partition("pca", widths, one.activations) for one in rows],
        }
        found = {}
        for name, (below, above) in partitions.items():
            carried = carriers(below, rows[0]), carriers(above, rows[1])
            found[name] = asdict(routing(model, language, (below, above), carried, prompts, seed))
        taken = ways(model, language, prompts, seed)._asdict()
    return {
        "planted": {"variables": variables, "values": values, "seed": seed},
        "model_loss": loss,
        "floor": language.floor,
        "ways": taken,
        "partitions": found,
        "starts": starts,
        "cpu_seconds": time.process_time() - began,
    }


def _found(activations: Tensor, starts: int, seed: int) -> SubspacePartition:
    """NDM's subspaces, which saw no label."""
    tried = random_starts(activations, planted.first_settings(seed), starts, planted.RARELY)
    return planted.refine(best(tried), activations, seed).partition
