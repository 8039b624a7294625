"""How much the subspaces of a partition tell of each other, beside partitions that nothing was learnt for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ndm_fast.activations.models import load_model
from ndm_fast.activations.site_rows import site_activations
from ndm_fast.config import HubOptions
from ndm_fast.errors import InputError
from ndm_fast.evaluate.baselines import baseline_partition
from ndm_fast.evaluate.revision import trained_on
from ndm_fast.partition import SubspacePartition
from ndm_fast.seeds import Draw, seeded
from ndm_fast.train.merge.mutual_information import mutual_information
from ndm_fast.train.merge.pairs import merge_scores


def run_information(
    partition: SubspacePartition,
    *,
    model_name: str | None = None,
    data: str | None = None,
    queries: int = 512,
    keys: int = 16384,
    context_length: int | None = None,
    device: str = "cpu",
    hub: HubOptions | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Pairwise mutual information on ordinary text, of the partition, identity and random.

    Args:
        model_name, data: default what the partition's ``source`` names.
        hub: the model's revision, default the one that the partition was trained on, and whether its own code
            may run.

    Returns:
        A row per method: ``method``, mean over pairs of the information (``mean_mi``, nats), of information
        over the sum of widths (``mean_score``), the largest such score, and the ``matrix`` [S, S].

    Raises:
        InputError: one subspace only; model or text unknown; fewer than one query or key.
    """
    if len(partition) < 2:
        raise InputError("a partition of one subspace has no pairs: give one of at least two")
    if min(queries, keys) < 1:
        raise InputError(f"{queries} queries and {keys} keys: give at least one of each")
    name = model_name or partition.source.get("model", "")
    model, tokenizer = load_model(name, device=device, **trained_on(name, hub, partition.source))
    site = partition.source.get("site")
    if not site:
        raise InputError("the partition does not say which site it is for: train or import it with ndm-fast")
    rows = site_activations(
        model,
        tokenizer,
        site,
        partition.source,
        data=data,
        rows=queries + keys,
        context_length=context_length,
    )
    rows = rows[torch.randperm(len(rows), generator=seeded(seed, Draw.INFORMATION_ROWS)).to(rows.device)]
    methods = {"ndm": partition.to(device)} | {
        kind: baseline_partition(kind, partition.widths, rows) for kind in ("identity", "random")
    }
    return [
        {"method": kind, **_of_pairs(rows[:queries], rows[queries:], method)}
        for kind, method in methods.items()
    ]


def _of_pairs(queries: Tensor, keys: Tensor, partition: SubspacePartition) -> dict[str, Any]:
    upper = torch.ones(len(partition), len(partition), dtype=torch.bool).triu(1)
    matrix = mutual_information(queries, keys, partition.rotation, partition.widths)
    scores = merge_scores(matrix, partition.widths)[upper]
    return {
        "mean_mi": float(matrix[upper].mean()),
        "mean_score": float(scores.mean()),
        "largest_score": float(scores.max()),
        "matrix": matrix.tolist(),
    }
