"""Are the edges of a known circuit found? The induction model, from training to ranks of edges.

Three edges into every induction head are known, from the site between the blocks:

    the subspace with the previous token -> K      the head looks for its own token there
    the subspace with the current token  -> Q      the token it stands on
    the subspace with the current token  -> V      what it copies
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ndm_fast.config import RunSettings, TrainConfig
from ndm_fast.evaluate.baselines import baseline_partition
from ndm_fast.evaluate.circuits.ioi import logit_difference
from ndm_fast.evaluate.connections.agreement import area_under_curve, rank_correlation, rank_of, strong
from ndm_fast.evaluate.connections.composition import Scored, scored_reads
from ndm_fast.evaluate.connections.finding import find_heads
from ndm_fast.evaluate.connections.heads import SIDES
from ndm_fast.evaluate.connections.matrices import matrix
from ndm_fast.evaluate.connections.mlp_patching import MlpPatcher
from ndm_fast.evaluate.connections.mlps import Mlp, find_mlps
from ndm_fast.evaluate.connections.path_patching import PathPatcher
from ndm_fast.evaluate.connections.weights import head_weights, mlp_reads, subspace_sums
from ndm_fast.evaluate.truth.induction_model import (
    SITE,
    InductionLanguage,
    Labelled,
    head_roles,
    labelled_activations,
    train_induction_model,
)
from ndm_fast.evaluate.truth.induction_pairs import KINDS, KNOWN, induction_pairs
from ndm_fast.evaluate.truth.one_thread import one_thread
from ndm_fast.geometry.orthogonal import principal_components
from ndm_fast.partition import SubspacePartition
from ndm_fast.train.restarts import train_on

ABOVE = "blocks.1.hook_resid_post"

_WIDTH = 16
"""Of each subspace: a head of the model."""
_ROWS = 32768
INDUCTION = 0.5
"""Mean attention to what followed the same token before, from which on a head is an induction head."""


def labelled_partition(labelled: Labelled) -> SubspacePartition:
    """Subspaces made with the labels: the means by previous token, by current token, and what is left."""
    rest = labelled.activations.double() - labelled.activations.double().mean(0)
    width = rest.shape[1]
    basis = torch.zeros(width, 0, dtype=torch.float64)
    for name in ("previous", "current"):
        means = _class_means(rest, labelled.labels[name])
        free = means - means @ basis @ basis.T
        basis = torch.cat([basis, torch.linalg.svd(free, full_matrices=False).Vh[:_WIDTH].T], 1)
    left = rest - rest @ basis @ basis.T
    complement = principal_components(left.float())[:, : width - basis.shape[1]].double()
    rotation = torch.linalg.qr(torch.cat([basis, complement], 1)).Q
    return SubspacePartition(rotation.float(), [_WIDTH] * (width // _WIDTH))


def found_partition(activations: Tensor, seed: int) -> SubspacePartition:
    """NDM's subspaces, which saw no label."""
    start = SubspacePartition(principal_components(activations), [_WIDTH] * (activations.shape[1] // _WIDTH))
    settings = TrainConfig(
        unit_size=_WIDTH,
        objective="log",
        keys=2048,
        heldout_keys=2048,
        heldout_queries=1024,
        pool_rows=_ROWS // 2,
        search_every=4,
        lr=1e-2,
        max_steps=1500,
        seed=seed,
    )
    return train_on(start, activations, settings, settings=RunSettings(eval_every=1500)).partition


def _class_means(rows: Tensor, labels: Tensor) -> Tensor:
    sums = torch.zeros(int(labels.max()) + 1, rows.shape[1], dtype=rows.dtype).index_add(0, labels, rows)
    count = labels.bincount().clamp_min(1)[:, None]
    return (sums / count - rows.mean(0)) * (count > 0) * count.sqrt()


def carriers(partition: SubspacePartition, labelled: Labelled) -> dict[str, int]:
    """Label -> the subspace in which the means by label differ most."""
    rows = labelled.activations.double() - labelled.activations.double().mean(0)
    found = {}
    for name in ("previous", "current"):
        spread = (_class_means(rows, labelled.labels[name]) @ partition.rotation.double()).square().sum(0)
        found[name] = int(subspace_sums(spread, partition.widths).argmax())
    return found


@dataclass(frozen=True)
class EdgeRanks:
    """What came of one partition. Edges are (subspace, head, side), 1 the first among all."""

    carriers: dict[str, int]
    edges: int
    weights: dict[str, int]
    """Side -> rank by weights of the known edge into that side, the best over the induction heads."""
    data: dict[str, int]
    """Side -> the same by path patching, with the kind of counterfactual that drives it."""
    first_by_weights: tuple[int, int, str]
    first_by_data: dict[str, tuple[int, int, str]]
    area: float
    """Under the curve: weights against edges that path patching of any kind finds."""
    area_by_kind: dict[str, float]
    area_by_deviations: float
    """The same, weights by their deviations from chance."""
    key_by_deviations: int
    """Rank of the known edge into K by deviations from chance."""
    attribution: float
    """Rank correlation of gradient times difference with path patching, all kinds together."""
    largest: dict[str, float]
    """Kind -> largest effect."""
    times: list[list[list[float]]]
    """[S, H, 3] share that each side reads, over chance."""
    effects: dict[str, list[list[list[float]]]]
    """Kind -> [S, H, 3] mean drop."""
    mlp: MlpEdges | None = None
    """Of the second block, where it has one."""


@dataclass(frozen=True)
class MlpEdges:
    """The edges into one MLP."""

    times: list[float]
    """[S] share that it reads, over chance."""
    effects: dict[str, list[float]]
    """Kind -> [S] mean drop."""
    first_order: dict[str, list[float]]
    """Kind -> [S] the same to first order."""
    straight: dict[str, list[float]]
    """Kind -> [S] mean drop through the skip connection instead."""


def run_induction(*, seed: int = 0, mlp: bool = False, prompts: int = 64) -> dict[str, Any]:
    """Train the model, and rank the edges of the subspaces of labels, of NDM and of principal components."""
    began = time.process_time()
    language = InductionLanguage()
    with one_thread():
        model, loss = train_induction_model(language, seed=seed, mlp=mlp)
        trained = time.process_time() - began
        roles = head_roles(model, language, seed=seed)
        labelled = labelled_activations(model, language, _ROWS, seed=seed)
        partitions = {
            "labels": labelled_partition(labelled),
            "ndm": found_partition(labelled.activations, seed),
            "pca": baseline_partition("pca", [_WIDTH] * 4, labelled.activations),
        }
        heads = [h for h, share in enumerate(roles[1].induction) if share >= INDUCTION]
        found = {
            name: asdict(edge_ranks(model, language, one, carriers(one, labelled), heads, prompts, seed))
            for name, one in partitions.items()
        }
    return {
        "seed": seed,
        "mlp": mlp,
        "model_loss": loss,
        "previous_token_heads": roles[0].previous,
        "induction_heads": roles[1].induction,
        "heads": heads,
        "partitions": found,
        "training_cpu_seconds": trained,
        "cpu_seconds": time.process_time() - began,
    }


def edge_ranks(
    model: Any,
    language: InductionLanguage,
    partition: SubspacePartition,
    carried: dict[str, int],
    induction: Sequence[int],
    prompts: int,
    seed: int,
) -> EdgeRanks:
    """Rank all edges into the second block, by weights and by path patching.

    Args:
        carried: from :func:`carriers`. induction: the heads whose known edges are ranked.
    """
    heads = find_heads(model, [1])
    read = read_times(heads, partition)
    weights = read.times

    def rank(scores: Tensor, side: str) -> int:
        subspace = carried["previous" if side == "K" else "current"]
        return min(rank_of(scores, (subspace, head, SIDES.index(side))) for head in induction)

    patcher = PathPatcher(model, SITE, ABOVE, (partition, partition), heads, rows=prompts)
    effects, first_order = {}, []
    for kind in KINDS:
        pairs = induction_pairs(language, kind, prompts, seed)
        metric = logit_difference(pairs.right.tolist(), pairs.wrong.tolist())
        made = patcher.measure(pairs.prompts, pairs.counterfactuals, metric, positions=pairs.positions)
        effects[kind] = made.patched[:, 0].mean(-1)
        first_order.append(made.attributed[:, 0].mean(-1))
    sizes = {kind: effect.abs() for kind, effect in effects.items()}
    there = torch.stack([strong(size) for size in sizes.values()]).any(0)
    mlps = [mlp for mlp in find_mlps(model, [1]) if mlp and bool(matrix(mlp.out).any())]
    return EdgeRanks(
        carriers=carried,
        edges=weights.numel(),
        weights={side: rank(weights, side) for side in SIDES},
        data={side: rank(sizes[kind], side) for kind, side in KNOWN.items()},
        first_by_weights=_first(weights),
        first_by_data={kind: _first(size) for kind, size in sizes.items()},
        area=area_under_curve(weights.flatten(), there.flatten()),
        area_by_kind={k: area_under_curve(weights.flatten(), strong(s).flatten()) for k, s in sizes.items()},
        area_by_deviations=area_under_curve(read.deviations.flatten(), there.flatten()),
        key_by_deviations=rank(read.deviations, "K"),
        attribution=rank_correlation(
            torch.stack(first_order).flatten(), torch.stack(list(effects.values())).flatten()
        ),
        largest={kind: float(size.max()) for kind, size in sizes.items()},
        times=weights.tolist(),
        effects={kind: effect.tolist() for kind, effect in effects.items()},
        mlp=_mlp_edges(model, language, partition, mlps[0], prompts, seed) if mlps else None,
    )


def _mlp_edges(
    model: Any, language: InductionLanguage, partition: SubspacePartition, mlp: Mlp, prompts: int, seed: int
) -> MlpEdges:
    patcher = MlpPatcher(model, SITE, ABOVE, (partition, partition), [mlp], rows=prompts)
    effects, first_order, straight = {}, {}, {}
    for kind in KINDS:
        pairs = induction_pairs(language, kind, prompts, seed)
        metric = logit_difference(pairs.right.tolist(), pairs.wrong.tolist())
        made = patcher.measure(pairs.prompts, pairs.counterfactuals, metric, positions=pairs.positions)
        effects[kind] = made.patched[:, 0].mean(-1).tolist()
        first_order[kind] = made.attributed[:, 0].mean(-1).tolist()
        straight[kind] = made.straight.mean(-1).tolist()
    return MlpEdges(scored_reads(mlp_reads(mlp), partition).times[0].tolist(), effects, first_order, straight)


def read_times(heads: Sequence[Any], partition: SubspacePartition) -> Scored:
    """[S, H, 3] scores of what each side of the heads of one block reads of each subspace."""
    found = head_weights(heads[0])
    sides = [scored_reads(found.acts(side), partition) for side in SIDES]
    return Scored(*(torch.stack(parts, -1).permute(1, 0, 2) for parts in zip(*sides, strict=True)))


def _first(scores: Tensor) -> tuple[int, int, str]:
    s, h, side = (int(i) for i in torch.unravel_index(scores.argmax(), scores.shape))
    return s, h, SIDES[side]
