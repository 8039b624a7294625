"""Neighbor purity: what does a query share with its nearest neighbor, subspace by subspace?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ndm_fast.activations.models import load_tokenizer
from ndm_fast.activations.rows import TokenRows, too_short
from ndm_fast.evaluate.baselines import baseline_partition, check_baselines
from ndm_fast.evaluate.purity.labels import agreement, bootstrap_intervals, nearest_keys, read_labels
from ndm_fast.evaluate.purity.reading import READINGS, read_subspaces
from ndm_fast.files import write_json
from ndm_fast.partition import SubspacePartition
from ndm_fast.run.folder import RunFolder
from ndm_fast.run.source import run_stream
from ndm_fast.seeds import Draw, seeded
from ndm_fast.train.merge.mutual_information import subspace_variances

SHARES = (
    "same_token",
    "same_previous_token",
    "same_next_token",
    "same_position",
    "position_within_3",
    "same_document",
)


_NEAR = 3


def neighbor_purity(
    queries: TokenRows,
    keys: TokenRows,
    partition: SubspacePartition,
    *,
    metric: str = "euclidean",
    top: int = 1,
    labels: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """For each subspace, how often nearest keys share the query's token, position, ...

    Args:
        queries, keys: activations with the tokens they belong to, [Q, d] and [K, d].
        top: nearest keys that count; a query's share is that of its ``top`` keys that agree.
        labels: further labels by name, of the queries [Q] and of the keys [K], integers.
        seed: of the bootstrap.

    Returns:
        One row per subspace: ``subspace``, ``width``, ``variance_share`` (of the keys), ``SHARES`` in [0, 1]
        and ``same_<name>`` for every label, ``reading`` in words (see :func:`read_subspaces`), and
        ``intervals``, the bounds of a 95 % bootstrap interval over queries for each share. A token at the
        start of a row has no previous token; two such count as the same.
    """
    index = nearest_keys(queries.activations, keys.activations, partition, top, metric=metric).cpu()
    variances = subspace_variances(keys.activations, partition.rotation, partition.widths).tolist()
    return purity_rows(queries, keys, index, partition.widths, variances, labels=labels, seed=seed)


def purity_rows(
    queries: TokenRows,
    keys: TokenRows,
    index: Tensor,
    widths: Sequence[int],
    variances: Sequence[float],
    *,
    labels: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """:func:`neighbor_purity` for neighbors already found.

    Args:
        index: [S, Q, top] int64 numbers of keys. widths, variances: of the S subspaces.
    """
    by_name = _agreement(queries, keys, index)
    for name, (of_queries, of_keys) in (labels or {}).items():
        by_name[f"same_{name}"] = agreement(index, of_queries, of_keys)
    bounds = {name: bootstrap_intervals(s, seeded(seed, Draw.BOOTSTRAP)) for name, s in by_name.items()}
    rows = [
        {
            "subspace": s,
            "width": widths[s],
            "variance_share": round(variances[s] / sum(variances), 4),
            **{name: round(float(shares[s].mean()), 4) for name, shares in by_name.items()},
            "intervals": {name: [round(x, 4) for x in both[s].tolist()] for name, both in bounds.items()},
        }
        for s in range(len(widths))
    ]
    readings = read_subspaces(rows, READINGS | {f"same_{name}": name for name in labels or {}})
    return [{**row, "reading": reading} for row, reading in zip(rows, readings, strict=True)]


def _agreement(queries: TokenRows, keys: TokenRows, index: Tensor) -> dict[str, Tensor]:
    """[S, Q] share of each query's nearest keys that agree, for each of ``SHARES``."""
    apart = (queries.position[:, None] - keys.position[index]).abs()
    return dict(
        zip(
            SHARES,
            (
                agreement(index, queries.token, keys.token),
                agreement(index, queries.previous_token, keys.previous_token),
                agreement(index, queries.next_token, keys.next_token),
                (apart == 0).double().mean(2),
                (apart <= _NEAR).double().mean(2),
                agreement(index, queries.document, keys.document),
            ),
            strict=True,
        )
    )


def held_out_rows(folder: RunFolder, device: str = "cpu") -> tuple[TokenRows, TokenRows]:
    """The queries and keys that the training of a run held out, in fp32, with their tokens."""
    config = folder.config()
    wanted = config.train.heldout_queries + config.train.heldout_keys
    stream = run_stream(config, wanted, device)
    parts: list[TokenRows] = []
    held = 0
    for part in stream.token_rows():
        parts.append(part)
        held += len(part.token)
        if held >= wanted:
            break
    else:
        raise too_short(held, wanted)
    order = torch.randperm(wanted, generator=seeded(config.train.seed, Draw.HELD_OUT))
    shuffled = TokenRows(
        *(torch.cat(column)[:wanted][order.to(column[0].device)] for column in zip(*parts, strict=True))
    )
    shuffled = shuffled._replace(activations=shuffled.activations.to(device, torch.float32))
    cut = config.train.heldout_queries
    return TokenRows(*(c[:cut] for c in shuffled)), TokenRows(*(c[cut:] for c in shuffled))


def run_purity(
    path: str | Path,
    baselines: Sequence[str] = (),
    *,
    top: int = 1,
    labels: str | Path | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Purity of a finished run beside baselines with the same widths; also saved as ``RUN/purity.json``.

    Args:
        top: nearest keys that count.
        labels: JSON file ``{token: label}``, see :func:`read_labels`.

    Returns:
        Rows of :func:`neighbor_purity` by method: ``"ndm"`` and each baseline.
    """
    check_baselines(baselines)
    folder = RunFolder(path)
    partition = folder.partition().to(device)
    queries, keys = held_out_rows(folder, device)
    metric = folder.config().train.metric
    options: dict[str, Any] = {"metric": metric, "top": top}
    if labels is not None:
        harvest = folder.config().harvest
        of_token = read_labels(labels, load_tokenizer(harvest.model, **harvest.hub_options))
        options["labels"] = {"label": (of_token[queries.token], of_token[keys.token])}
    tables = {"ndm": neighbor_purity(queries, keys, partition, **options)}
    for kind in baselines:
        other = baseline_partition(kind, partition.widths, keys.activations).to(device)
        tables[kind] = neighbor_purity(queries, keys, other, **options)
    write_json(folder.purity_file, tables, seal=True)
    return tables
