"""What shadows save, foreseen and measured, also where rows come rotated, and what axes cost: CPU time.

    OMP_NUM_THREADS=1 python bench/runs/shadow_costs.py [--acts FOLDER SITE [PARTITION]] ... [--out FOLDER]

Sources as in shadow_counts.py. Saved: share of both passes' time that shadows save over rows in their axes,
as foreseen from the axes and as measured, and that bf16 saves instead. Rotated rows: the op as it is beside
the op without shadows; both have to find the same, to the bit. Axes: their share of a search.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from shadow_counts import partitions, sources
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))  # not the root: its `kernels` hides another

from measuring import RESULTS, result_file, write_results

from ndm_fast import ops
from ndm_fast.evaluate.baselines import baseline_partition
from ndm_fast.geometry import shadow
from ndm_fast.geometry.centring import rotate_centred, sample_mean
from ndm_fast.ops.cpu import search
from ndm_fast.partition import SubspacePartition
from ndm_fast.table import text_table

SHAPES = [(32, 4096), (96, 1024), (96, 4096), (192, 4096)]
"""Width of the subspaces and queries."""
WIDTHS, QUERIES = (32, 96, 192), 2048
"""Where what is saved is foreseen and measured."""
KEYS, SUBSPACES, REPEATS = 32768, 2, 5
TRAINING = [(384, 32, 16384, 128), (384, 32, 16384, 4096), (384, 96, 16384, 4096), (2304, 72, 65536, 128),
            (2304, 72, 65536, 1024), (2304, 288, 65536, 1024)]  # fmt: skip
"""Width, width of the subspaces, keys, queries of one search."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--acts", nargs="+", action="append", default=[], help="folder, site and partition")
    parser.add_argument("--width", type=int, default=576, help="of the noise")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the three records")
    arguments = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {"saved": [], "rotated": [], "axes": []}
    for name, data, trained in sources(arguments.acts, arguments.width):
        for kind, partition in partitions(name, data, trained, WIDTHS):
            for row in time_saved(data, partition):
                note(found["saved"], {"rows": name, "partition": kind, **row})
        for kind in ("identity",) if name == "noise" else ("identity", "pca"):
            for width, queries in SHAPES:
                row = time_rotated(data, kind, width, queries)
                note(found["rotated"], {"rows": name, "partition": kind, **row})
    for shape in TRAINING:
        note(found["axes"], time_axes(*shape))
    for what, rows in found.items():
        write_results(arguments.out / result_file(f"shadow-{what}").name, rows)


def note(rows: list[dict[str, Any]], row: dict[str, Any]) -> None:
    rows.append(row)
    print(text_table([row]), flush=True)


@torch.no_grad()
def time_saved(data: Tensor, partition: SubspacePartition) -> Iterator[dict[str, Any]]:
    """The first, a middle and the last subspace, over rows in their axes."""
    d, count = sum(partition.widths), len(partition.widths)
    rows = data[: QUERIES + KEYS, :d] @ partition.rotation
    for s in sorted({0, count // 2, count - 1}):
        width = partition.widths[s]
        part = rows[:, partition.offsets[s] : partition.offsets[s] + width]
        queries, keys = part[:QUERIES], part[QUERIES:].contiguous()
        origin = sample_mean(keys)
        axes = shadow.axes_of(torch.eye(width), keys, origin, [width])
        turned = [rotate_centred(each, axes.turned, origin) for each in (queries, keys)]
        call = search._Search(search.extension(), [0, width], False, False, shadows=False)
        given = turned[0].double(), turned[1], None
        times = {}
        for way, other in (("shadows", call._replace(shadows=True)), ("bf16", call._replace(bf16=True))):
            times[way] = statistics.median(
                cpu_ratios(
                    lambda call=call, given=given: search._search_rotated(call, *given),
                    lambda other=other, given=given: search._search_rotated(other, *given),
                )
            )
        saved = {
            "foreseen": shadow.saved(axes.rest, [width]),
            "measured": 1 - times["shadows"],
            "bf16": 1 - times["bf16"],
        }
        yield {"width": width, "subspace": s, "variance in the second half": axes.rest[0], **saved}


@torch.no_grad()
def time_rotated(data: Tensor, kind: str, width: int, queries: int) -> dict[str, Any]:
    """The first subspaces of a partition, over rows that are rotated already."""
    d = data.shape[1] // width * width
    widths = [width] * min(SUBSPACES, d // width)
    partition = baseline_partition(kind, [width] * (d // width), data[:, :d])
    rows = (data[: queries + KEYS, :d] @ partition.rotation)[:, : sum(widths)]
    given = rows[:queries].contiguous(), rows[queries:].contiguous(), None, widths
    decide, found = shadow.turning_pays, {}

    def searching(shadows: bool) -> Callable[[], object]:
        def run() -> None:
            shadow.turning_pays = decide if shadows else _never
            found[shadows] = ops.nearest_neighbors(
                *given, keys_rotated=True, queries_rotated=True, check_finite=False
            )
            shadow.turning_pays = decide

        return run

    ratios = cpu_ratios(searching(True), searching(False))
    assert all(torch.equal(*both) for both in zip(found[True], found[False], strict=True))
    axes = shadow.axes_of(torch.eye(sum(widths)), given[1], sample_mean(given[1]), widths)
    shares = [shadow.saved([rest], [width]) for rest in axes.rest]
    used = sum(decide(queries, KEYS, width, False, share) for share in shares)
    shape = {"width": width, "queries": queries, "keys": KEYS}
    spread = {"least": min(ratios), "greatest": max(ratios)}
    looked = used if decide(queries, KEYS, width, False) else 0
    turned = f"{looked} of {len(widths)}"
    return {**shape, "times without": statistics.median(ratios), **spread, "turned": turned}


def _never(*sizes: object) -> bool:
    return False


def time_axes(d: int, width: int, keys: int, queries: int) -> dict[str, Any]:
    """Finding the axes beside one search of training, over noise: the cost is not of the values."""
    torch.manual_seed(0)
    rows, rotation = torch.randn(keys + queries, d).half(), torch.linalg.qr(torch.randn(d, d))[0]
    pool, asked, widths = rows[:keys], rows[keys:], [width] * (d // width)
    origin = sample_mean(pool)
    decide = shadow.pays
    shadow.pays = _never
    ratios = cpu_ratios(
        lambda: ops.nearest_index(asked, pool, rotation, widths),
        lambda: shadow.axes_of(rotation, pool, origin, widths),
        repeats=2,
    )
    shadow.pays = decide
    return {"d": d, "width": width, "keys": keys, "queries": queries,
            "axes, % of a search without": 100 * statistics.median(ratios),
            "looked for": decide(queries, keys, widths, False)}  # fmt: skip


def cpu_ratios(
    first: Callable[[], object], second: Callable[[], object], repeats: int = REPEATS
) -> list[float]:
    """CPU seconds of the second over those of the first, round by round."""
    ratios = []
    for _ in range(repeats + 1):
        times = []
        for work in (first, second):
            start = time.process_time()
            work()
            times.append(time.process_time() - start)
        ratios.append(times[1] / times[0])
    return ratios[1:]


if __name__ == "__main__":
    main()
