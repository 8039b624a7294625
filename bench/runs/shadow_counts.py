"""What shadows leave to be multiplied in full, against their columns: a lower bound of a search's products.

    OMP_NUM_THREADS=1 python bench/runs/shadow_counts.py [--acts FOLDER SITE [PARTITION]] ... [--figure FILE]

``--acts`` is a harvest, a site of it and a trained partition there, once for each model; noise is always
counted. Counts are machine-independent: no time is taken.
A key is left where its shadow is nearer than the query's nearest key is: no order of keys and no better start
rules it out. A group, of keys as they come, is left where one of its keys is. "In order" is what the search
has now: a group is left where its bound is below the best of the groups before it. "In stages" looks again
after each eighth of the columns. Sources that --out holds and that are not named again stay in it.

``--gpu`` counts what ``bench/gpu/shadow_sweep.py`` needs: tiles of 16, 32 and 64 columns, wide subspaces,
large groups. A trained partition is also taken with neighboring subspaces put together, as if merged.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))  # not the root: its `kernels` hides another

from measuring import RESULTS, write_results

from ndm_fast.activations.cache import ActivationCache
from ndm_fast.drawing import BLUE, GREY, VERMILION, new_figure, save_figure, style
from ndm_fast.evaluate.baselines import baseline_partition
from ndm_fast.geometry import shadow
from ndm_fast.geometry.centring import rotate_centred, sample_mean
from ndm_fast.partition import SubspacePartition
from ndm_fast.table import text_table

QUERIES = 128
SUBSPACES = 4
"""Subspaces of a partition that are counted, spread evenly over it."""
SHARES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
"""h over the width, as the C++ search has them."""
TILES = (16, 32, 64)
"""Columns of a tile of the GPU's sweep: h of them, and the length of the rest."""
TOLERANCE = 1e-13
"""Of the squared lengths: what fp64 may get wrong is counted as ruled out, so counts are never too high."""


class Plan(NamedTuple):
    """What is counted."""

    out: Path
    keys: tuple[int, ...]
    widths: tuple[int, ...]
    """Of the untrained partitions."""
    groups: tuple[int, ...]
    """Keys that a query takes or leaves as one."""
    columns: Callable[[int], list[int]]
    """Every h for a width, ascending."""
    merged: bool = False
    """Count trained partitions with neighbors put together too."""


CPU = Plan(
    RESULTS / "shadow-counts.json", (16384, 65536), (32, 64, 96, 192), (16, 32),
    lambda width: [max(1, int(width * share)) for share in SHARES],
)  # fmt: skip
"""Groups are a panel of AVX2 and of AVX-512."""

GPU = Plan(
    RESULTS / "shadow-counts-gpu.json", (65536, 196_608), (32, 64, 72, 96, 192, 432), (32, 64, 128),
    lambda width: [tile - 1 for tile in TILES if tile < width], merged=True,
)  # fmt: skip
"""128 keys are a tile of the sweep."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--acts", nargs="+", action="append", default=[], help="folder, site and partition")
    parser.add_argument("--width", type=int, default=576, help="of the noise")
    parser.add_argument("--gpu", action="store_true", help="tiles and groups of the GPU's sweep")
    parser.add_argument("--out", type=Path, help="default: under bench/results, by --gpu")
    parser.add_argument("--figure", type=Path, help="drawn from --out; alone, nothing is counted")
    arguments = parser.parse_args()
    plan = GPU if arguments.gpu else CPU
    out = arguments.out or plan.out
    old = json.loads(out.read_text())["rows"] if out.exists() else []
    if arguments.acts or not old:
        rows = []
        for source in sources(arguments.acts, arguments.width, max(plan.keys) + QUERIES):
            rows += count_source(*source, plan)
        counted = {row["rows"] for row in rows}
        write_results(out, [row for row in old if row["rows"] not in counted] + rows)
    if arguments.figure:
        draw(json.loads(out.read_text())["rows"], arguments.figure)


def sources(
    acts: list[list[str]], width: int, count: int = max(CPU.keys) + QUERIES
) -> Iterator[tuple[str, Tensor, SubspacePartition | None]]:
    """Names, at least [count, d] fp32 rows in random order, and a trained partition or None."""
    torch.manual_seed(0)
    for folder, site, *trained in acts:
        cache = ActivationCache(folder)
        found: list[Tensor] = []
        for batch in cache.stream(site).batches():
            found.append(batch.float())
            if sum(map(len, found)) >= 2 * count:
                break
        rows = torch.cat(found)
        if len(rows) < count:
            raise SystemExit(f"{folder} holds {len(rows)} rows of {site}: {count} are needed")
        partition = SubspacePartition.from_pretrained(trained[0]) if trained else None
        model = partition.source["model"] if partition else Path(folder).name
        yield f"{model} {site.removesuffix('.hook_resid_post')}", rows[torch.randperm(len(rows))], partition
    yield "noise", torch.randn(count, width), None


def partitions(
    name: str, data: Tensor, trained: SubspacePartition | None, widths: Sequence[int]
) -> Iterator[tuple[str, SubspacePartition]]:
    """Kinds of partition with one width each, and the trained one."""
    d = data.shape[1]
    kinds = ("identity",) if name == "noise" else ("identity", "pca")
    for kind, width in itertools.product(kinds, [width for width in widths if width <= d]):
        whole = d // width * width
        yield kind, baseline_partition(kind, [width] * (whole // width), data[:, :whole])
    if trained is not None:
        yield "trained", trained


def count_source(
    name: str, data: Tensor, trained: SubspacePartition | None, plan: Plan
) -> Iterator[dict[str, Any]]:
    """Rows of the record for one source of activations."""
    d = data.shape[1]
    cases = list(partitions(name, data, trained, plan.widths))
    if trained is not None:
        for width in plan.widths if plan.merged else ():
            if max(trained.widths) < width <= d:
                together = [width] * (d // width) + [d % width] * (d % width > 0)
                cases.append(("trained, merged", SubspacePartition(trained.rotation.detach(), together)))
    for kind, partition in cases:
        for keys in plan.keys:
            for row in count_partition(data, partition, keys, plan):
                if kind == "trained, merged" and row["width"] != partition.widths[0]:
                    continue  # what is left over beside them
                found = {"rows": name, "partition": kind, **row}
                print(text_table([{k: v for k, v in found.items() if not k.startswith("by_")}]), flush=True)
                yield found


@torch.no_grad()
def count_partition(
    data: Tensor, partition: SubspacePartition, keys: int, plan: Plan
) -> Iterator[dict[str, Any]]:
    """One row for each width wider than the least h: means over its subspaces and queries."""
    widths, d = list(partition.widths), sum(partition.widths)
    left, right = data[:QUERIES, :d].contiguous(), data[QUERIES : QUERIES + keys, :d].contiguous()
    origin = sample_mean(right)
    turn = shadow.axes_of(partition.rotation.detach(), right, origin, widths).turned
    turned = [rotate_centred(rows, turn, origin) for rows in (left, right)]
    for width in sorted(each for each in set(widths) if plan.columns(each)):
        same = [s for s, each in enumerate(widths) if each == width]
        taken = (
            [same[i * len(same) // SUBSPACES] for i in range(SUBSPACES)] if len(same) > SUBSPACES else same
        )
        counts = []
        for s in taken:
            columns = slice(partition.offsets[s], partition.offsets[s] + width)
            counts.append(count_subspace(*(rows[:, columns].double() for rows in turned), plan))
        by_columns = [{name: sum(each[i][name] for each in counts) / len(counts) for name in counts[0][i]}
                      for i in range(len(counts[0]))]  # fmt: skip
        yield {"width": width, "keys": keys, "subspaces": len(taken), **least_work(counts, width),
               "by_columns": by_columns}  # fmt: skip


def count_subspace(queries: Tensor, keys: Tensor, plan: Plan) -> list[dict[str, float]]:
    """Shares left for every h, of fp64 [Q, p] and [K, p] rows in principal axes."""
    slack = TOLERANCE * (queries.square().sum(1)[:, None] + keys.square().sum(1).mean())
    true = torch.cdist(queries, keys, compute_mode="use_mm_for_euclid_dist").square()
    best = true.amin(1, keepdim=True)
    before = {}
    for group in plan.groups:
        least = true.unflatten(1, (-1, group)).amin(2).cummin(1).values
        before[group] = torch.cat([torch.full_like(best, torch.inf), least[:, :-1]], 1)
    found = []
    for columns in plan.columns(queries.shape[1]):
        cast = [shadow.shadow(rows, columns) for rows in (queries, keys)]
        bound = torch.cdist(*cast, compute_mode="use_mm_for_euclid_dist").square() + slack
        row = {"columns": columns, "keys_left": _share(bound < best)}
        for group in plan.groups:
            least = bound.unflatten(1, (-1, group)).amin(2)
            row[f"groups_{group}_left"] = _share(least < best)
            row[f"groups_{group}_in_order"] = _share(least < before[group])
        if found:  # more columns rule out no less
            assert all(row[name] <= found[-1][name] for name in row if name != "columns")
        found.append(row)
    return found


def _share(mask: Tensor) -> float:
    return float(mask.float().mean())


def least_work(counts: Sequence[list[dict[str, float]]], width: int) -> dict[str, float]:
    """A full sweep's products over the fewest, with the best h of each subspace: one look, or in stages."""
    best = {}
    for name in [key for key in counts[0][0] if key != "columns"]:
        once, stages = 0.0, 0.0
        for rows in counts:
            ends = [row["columns"] for row in rows] + [width]
            after = [row[name] * (end - row["columns"]) for row, end in zip(rows, ends[1:], strict=True)]
            once += min(width, *(h + 1 + rows[i][name] * (width - h) for i, h in enumerate(ends[:-1])))
            stages += min(width, *(h + 1 + sum(after[i:]) for i, h in enumerate(ends[:-1])))
        best[f"most_times_{name}"] = len(counts) * width / once
        best[f"most_times_{name}_in_stages"] = len(counts) * width / stages
    return best


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Groups of 32 keys left against h over the width; a panel for each source."""
    kept = [row for row in rows if row["keys"] == max(CPU.keys)]
    names = list(dict.fromkeys(row["rows"] for row in kept))
    colours = {"identity": BLUE, "pca": GREY, "trained": VERMILION}
    dashes = {24: "-", 48: "--"} | dict(zip(CPU.widths, ["-", "--", "-.", ":"], strict=True))
    with style():
        figure = new_figure(3.4 * len(names), 3.6)
        for axes, name in zip(
            figure.subplots(1, len(names), squeeze=False, sharey=True)[0], names, strict=True
        ):
            for row in (each for each in kept if each["rows"] == name):
                if row["partition"] == "pca" and row["width"] not in (32, 192):
                    continue
                shares = [each["columns"] / row["width"] for each in row["by_columns"]]
                left = [max(each["groups_32_left"], 1e-5) for each in row["by_columns"]]
                label = f"{row['partition']}, {row['width']}"
                marker = "o" if row["partition"] == "trained" else ""
                axes.plot(shares, left, dashes.get(row["width"], "-"), marker=marker, markersize=3,
                          color=colours[row["partition"]], label=label)  # fmt: skip
            axes.set_title(name, loc="left")
            axes.set_yscale("log")
            axes.set_xlabel("h / width")
            axes.set_ylim(1e-5, 1.5)
            axes.legend(frameon=False, fontsize=7, ncol=2, loc="lower left")
        figure.axes[0].set_ylabel("share of groups of 32 keys left")
        save_figure(figure, path)


if __name__ == "__main__":
    main()
