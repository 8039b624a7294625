"""What each merge makes triton compile anew, and how long that takes; no GPU is needed.

    python bench/gpu/widths.py [--arch 90] [--seconds] [--json PATH]

A run begins with equal subspaces. Then one of them grows, as merging makes it; all launchers of training run
on tensors without numbers (``kernels/replay.py``). Seconds are of one core, with the assembler's in them.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ndm_fast.kernels import ksg, replay, search, shipped

RUNS = {
    32: (768, [64, 96, 128, 160, 192, 224, 256, 320]),
    64: (1536, [128, 192, 256, 320, 384, 448, 512]),
    72: (2304, [144, 216, 288, 360, 432]),
}
"""By the first width: all columns, and widths that merging makes."""

MERGE_KEYS, MERGE_QUERIES = 16384, 128
"""Of an estimate of mutual information, by default."""


def ops(widths: list[int]) -> dict[str, Callable[[], object]]:
    """What training with this partition launches."""
    few, many = (shipped.asked(widths, count) for count in (shipped.FEW, shipped.MANY))
    d = sum(widths)
    rows = (shipped.rows(count, d, torch.float32) for count in (MERGE_QUERIES, MERGE_KEYS, d))
    subspaces = len(widths)
    pairs = torch.empty(subspaces * (subspaces - 1) // 2, 2, dtype=torch.int64, device="meta")
    variances = torch.empty(subspaces, device="meta")
    return {
        "search Q128": partial(search.nearest_index, *few),
        "search Q4096": partial(search.nearest_index, *many),
        "search Q128 fp32": partial(search.nearest_index, *few, precision="fp32"),
        "mutual information": partial(
            ksg.ksg_radius_and_counts, *rows, widths, variances, pairs, rotated=True
        ),
        "step": partial(shipped._step, widths),
    }


def compiled_anew(unit: int, arch: int) -> Iterator[tuple[int, dict[str, list[replay.Launch]]]]:
    """By width: launches that no narrower one had, by op."""
    d, merged = RUNS[unit]
    seen: dict[str, set[str]] = {}
    for width in [unit, *merged]:
        new: dict[str, list[replay.Launch]] = {}
        for name, run in ops([width] + [unit] * ((d - width) // unit)).items():
            known = seen.setdefault(name, set())
            with replay.recorded(arch) as made:
                run()
            new[name] = [launch for launch in made if launch.key not in known]
            known |= {launch.key for launch in made}
        yield width, new


def seconds_of(launch: replay.Launch) -> float:
    """CPU time of compiling, with that of the assembler."""
    before = os.times()
    launch.compiled()
    return sum(os.times()[:4]) - sum(before[:4])


def _line(named: dict[str, list[dict[str, Any]]]) -> str:
    sums = {name: sum(each["seconds"] for each in launches) for name, launches in named.items()}
    return "  ".join(f"{name} {len(named[name])} ({seconds:.1f} s)" for name, seconds in sums.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--seconds", action="store_true", help="compile, which takes minutes")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[dict[str, Any]]] = {}
    taken: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        for unit in RUNS:
            rows = found[str(unit)] = []
            for width, new in compiled_anew(unit, arguments.arch):
                for launch in (each for launches in new.values() for each in launches):
                    if launch.key not in taken:
                        taken[launch.key] = seconds_of(launch) if arguments.seconds else 0.0
                named = {
                    name: [{"kernel": each.name, "seconds": taken[each.key]} for each in launches]
                    for name, launches in new.items()
                }
                rows.append({"width": width, "new": named})
                print(f"{unit:3} {width:4}: {_line(named)}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
