"""Neighbour purity: what does a query share with its nearest neighbour, subspace by subspace?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ndm_fast import ops
from ndm_fast.checkpoint import write_json
from ndm_fast.evaluate.baselines import baseline_partition, check_baselines
from ndm_fast.harvest import ActivationStream, TokenRows, load_model
from ndm_fast.mutual_information import subspace_variances
from ndm_fast.partition import SubspacePartition
from ndm_fast.pool import seeded, too_short
from ndm_fast.run_folder import RunFolder
from ndm_fast.text import open_documents

SHARES = (
    "same_token",
    "same_previous_token",
    "same_next_token",
    "same_position",
    "position_within_3",
    "same_document",
)
_NEAR = 3


def neighbour_purity(
    queries: TokenRows, keys: TokenRows, partition: SubspacePartition, *, metric: str = "euclidean"
) -> list[dict[str, Any]]:
    """For each subspace, the shares of queries whose nearest key has the same token, position, ...

    Args:
        queries, keys: activations with the tokens they belong to, [Q, d] and [K, d].

    Returns:
        One row per subspace: ``subspace``, ``width``, ``variance_share`` (of the keys), and ``SHARES`` in
        [0, 1]. A token at the start of a row has no previous token; two such count as the same.
    """
    found = ops.nearest_neighbors(
        queries.activations, keys.activations, partition.rotation, partition.widths, metric=metric
    )
    variances = subspace_variances(keys.activations, partition.rotation, partition.widths)
    return purity_rows(queries, keys, found.index.cpu(), partition.widths, variances.tolist())


def purity_rows(
    queries: TokenRows, keys: TokenRows, index: Tensor, widths: Sequence[int], variances: Sequence[float]
) -> list[dict[str, Any]]:
    """Rows of :func:`neighbour_purity` for neighbours already found: [S, Q] int64 numbers of keys."""
    rows = []
    for s, neighbours in enumerate(index):
        shares = {
            name: round(float(same.double().mean()), 4)
            for name, same in _agreement(queries, keys, neighbours)
        }
        rows.append(
            {
                "subspace": s,
                "width": widths[s],
                "variance_share": round(variances[s] / sum(variances), 4),
                **shares,
            }
        )
    return rows


def _agreement(queries: TokenRows, keys: TokenRows, index: Tensor) -> list[tuple[str, Tensor]]:
    apart = (queries.position - keys.position[index]).abs()
    return list(
        zip(
            SHARES,
            (
                queries.token == keys.token[index],
                queries.previous_token == keys.previous_token[index],
                queries.next_token == keys.next_token[index],
                apart == 0,
                apart <= _NEAR,
                queries.document == keys.document[index],
            ),
            strict=True,
        )
    )


def held_out_rows(folder: RunFolder, device: str = "cpu") -> tuple[TokenRows, TokenRows]:
    """The held-out queries and keys of a run, with their tokens: the same rows that training held out."""
    config = folder.config()
    model, tokenizer = load_model(config.harvest.model, config.harvest.dtype, device)
    documents = open_documents(config.harvest.data, config.harvest.text_field, config.train.seed)
    stream = ActivationStream(model, tokenizer, config.harvest.site[0], documents, config.harvest)
    wanted = config.train.heldout_queries + config.train.heldout_keys
    parts: list[TokenRows] = []
    held = 0
    for part in stream.token_rows():
        parts.append(part)
        held += len(part.token)
        if held >= wanted:
            break
    else:
        raise too_short(held, wanted)
    order = torch.randperm(wanted, generator=seeded(config.train.seed, 0))
    shuffled = TokenRows(
        *(torch.cat(column)[:wanted][order.to(column[0].device)] for column in zip(*parts, strict=True))
    )
    cut = config.train.heldout_queries
    return TokenRows(*(c[:cut] for c in shuffled)), TokenRows(*(c[cut:] for c in shuffled))


def run_purity(path: str | Path, baselines: Sequence[str] = (), *, device: str = "cpu") -> dict[str, Any]:
    """Purity of a finished run beside baselines with the same widths; also saved as ``RUN/purity.json``.

    Returns:
        Rows of :func:`neighbour_purity` by method: ``"ndm"`` and each baseline.
    """
    check_baselines(baselines)
    folder = RunFolder(path)
    partition = folder.partition().to(device)
    queries, keys = held_out_rows(folder, device)
    metric = folder.config().train.metric
    tables = {"ndm": neighbour_purity(queries, keys, partition, metric=metric)}
    for kind in baselines:
        other = baseline_partition(kind, partition.widths, keys.activations).to(device)
        tables[kind] = neighbour_purity(queries, keys, other, metric=metric)
    write_json(folder.purity_file, tables)
    return tables
