"""Measure the tiles of the sweep on this card and keep the fastest for later runs.

    python -m ndm_fast.kernels.autotune 32 64 72 [--queries 4096] [--keys 65536]

A minute for a width at most: 24 choices, each compiled once and timed for half a second.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import triton.testing
from torch import Tensor

from . import tuning
from .launch import capability
from .search import nearest_neighbors
from .tuning import Sweep


def _median_milliseconds(run: Callable[[], object]) -> float:
    return triton.testing.do_bench(run, warmup=100, rep=400, return_mode="median")


def tune(
    widths: list[int],
    queries: int,
    keys: int,
    device: str = "cuda",
    milliseconds_of: Callable[[Callable[[], object]], float] = _median_milliseconds,
) -> dict[Sweep, float]:
    """Times of a search over rotated fp16 keys by tiles, the fastest first; the cache keeps that one.

    Args:
        widths: of the subspaces, all the same.
        queries, keys: how many.
        milliseconds_of: how long a call takes.
    """
    left, right = (torch.randn(n, sum(widths), device=device).half() for n in (queries, keys))
    rotation = torch.eye(sum(widths), device=device)

    def search() -> Tensor:
        return nearest_neighbors(left, right, rotation, widths, keys_rotated=True, queries_rotated=True).index

    expected = search()

    def milliseconds() -> float:
        if not torch.equal(search(), expected):
            raise RuntimeError("these tiles find other neighbors")
        return milliseconds_of(search)

    return tuning.autotune(capability(left.device), widths[0], milliseconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("widths", type=int, nargs="+")
    parser.add_argument("--queries", type=int, default=4096)
    parser.add_argument("--keys", type=int, default=65536)
    arguments = parser.parse_args()
    for width in arguments.widths:
        times = tune([width] * max(1, 768 // width), arguments.queries, arguments.keys)
        for tiles, time in times.items():
            print(f"width {width:4} {time:8.3f} ms  {tiles}", flush=True)


if __name__ == "__main__":
    main()
