"""The preimage index at size: build it from a cache of activations on disk, then query it.

    python bench/runs/preimages.py RUN --folder /tmp/preimages --out bench/results/preimages.json

RUN is a finished run with an index; its rows are repeated with noise until there are enough, stored as a
cache (an index of the identity), and rotated by the run's partition into a new index. Queries are checked
against brute force in fp64 before they are timed.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ndm_fast import RunFolder, SubspacePartition, load_model
from ndm_fast.provenance import provenance
from ndm_fast.report.index.format import PreimageIndex, TextBatch
from ndm_fast.report.index.search import nearest_rows
from ndm_fast.report.index.writer import build_index
from ndm_fast.seeds import seeded

_NOISE = 0.05
"""Of the rows' standard deviation: as near as neighbors are in real text."""
_NEIGHBORS = 20


def repeated(source: PreimageIndex, rows: int) -> Iterator[TextBatch]:
    """The rows of an index over and over, each time with other noise, until there are ``rows``."""
    generator, held = seeded(0, 30), 0
    while held < rows:
        for batch in source.batches():
            noise = torch.randn(batch.activations.shape, generator=generator)
            noise *= _NOISE * batch.activations.std(0)
            cut = batch.place[: rows - held]
            yield batch._replace(activations=(batch.activations + noise)[: len(cut)], place=cut)
            held += len(cut)
            if held == rows:
                return


def peak_memory() -> float:
    """Largest resident memory of this process so far, GB; mapped files that were read count."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def check(index: PreimageIndex, query: torch.Tensor, metric: str) -> None:
    """Fail where a query's neighbors are not those of brute force in fp64."""
    found = nearest_rows(query, index.rows, _NEIGHBORS, metric=metric)
    for s, columns in enumerate(index.rows.columns):
        origin = index.rows.origin[columns].double()
        distances = []
        for shard in index.rows.shards:
            part, one = shard.rows[:, columns].double(), query[0, columns].double()
            if metric == "euclidean":
                distances.append((part - one).norm(dim=1))
            else:
                distances.append(1 - torch.cosine_similarity(part + origin, (one + origin)[None]))
        expected = torch.cat(distances).topk(_NEIGHBORS, largest=False).values
        torch.testing.assert_close(found.distance[s, 0], expected, rtol=1e-9, atol=1e-12)


def time_queries(index: PreimageIndex, metric: str, count: int) -> dict[str, float]:
    """Milliseconds of single queries, all subspaces: median and greatest, and median of the CPU's time."""
    rows = torch.randint(len(index), (count,), generator=seeded(0, 31))
    seconds, cpu_seconds = [], []
    for row in rows:
        query = index.stored(row[None])
        start, cpu_start = time.perf_counter(), time.process_time()
        nearest_rows(query, index.rows, _NEIGHBORS, metric=metric, exclude=row[None])
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    return {
        "median_ms": 1e3 * statistics.median(seconds),
        "max_ms": 1e3 * max(seconds),
        "cpu_ms": 1e3 * statistics.median(cpu_seconds),
    }


def main() -> None:
    """Build, check, time, print and write."""
    parser = argparse.ArgumentParser(description="Build and query an index of many activations.")
    parser.add_argument("run", help="finished run with an index")
    parser.add_argument("--folder", required=True, help="folder for cache and index, some 3 GB per million")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=20)
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--out", default=None, help="JSON file with the results")
    options = parser.parse_args()
    run, folder = RunFolder(options.run), Path(options.folder)
    source, partition = PreimageIndex(run.index_folder), run.partition()
    tokenizer = load_model(run.config().harvest.model)[1]
    cache = folder / "cache"
    if not cache.exists():
        identity = SubspacePartition(torch.eye(partition.width), [partition.width])
        build_index(repeated(source, options.rows), identity, cache, tokenizer, dtype=options.dtype)

    start = time.perf_counter()
    batches = PreimageIndex(cache).batches()
    build_index(batches, partition, folder / "index", tokenizer, dtype=options.dtype)
    result: dict[str, Any] = {
        "rows": options.rows,
        "width": partition.width,
        "widths": list(partition.widths),
        "dtype": options.dtype,
        "neighbors": _NEIGHBORS,
        "build_s": time.perf_counter() - start,
        "build_peak_gb": peak_memory(),
    }
    start = time.perf_counter()
    index = PreimageIndex(folder / "index")
    result["load_s"] = time.perf_counter() - start
    for metric in ("euclidean", "cosine"):
        check(index, index.stored(torch.tensor([12345 % len(index)])), metric)
        result[metric] = time_queries(index, metric, options.queries)
    result["made_with"] = provenance()
    print(json.dumps({key: value for key, value in result.items() if key != "made_with"}, indent=2))
    if options.out:
        Path(options.out).write_text(json.dumps(result, indent=2) + "\n")
    shutil.rmtree(folder / "index")


if __name__ == "__main__":
    main()
