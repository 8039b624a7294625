"""Measure the tiles of the sweep on this card and keep the fastest for later runs.

    python -m ndm_fast.kernels.autotune 32 64 72 [--queries 4096] [--keys 65536]

A minute for a width at most: 24 choices, each compiled once and timed for half a second.
"""

from __future__ import annotations

import argparse

import torch
import triton.testing
from ndm_fast.kernels import tuning

from ndm_fast import triton_ops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("widths", type=int, nargs="+")
    parser.add_argument("--queries", type=int, default=4096)
    parser.add_argument("--keys", type=int, default=65536)
    arguments = parser.parse_args()
    major, minor = torch.cuda.get_device_capability()
    for width in arguments.widths:
        widths = [width] * max(1, 768 // width)
        d = sum(widths)
        queries, keys = (
            torch.randn(n, d, device="cuda", dtype=torch.float16) for n in (arguments.queries, arguments.keys)
        )
        rotation = torch.eye(d, device="cuda")

        def run(given=(queries, keys, rotation, widths)) -> None:  # type: ignore[no-untyped-def]
            triton_ops.nearest_neighbors(*given, keys_rotated=True, queries_rotated=True)

        def milliseconds(timed=run) -> float:  # type: ignore[no-untyped-def]
            return triton.testing.do_bench(timed, warmup=100, rep=400, return_mode="median")

        print(width, tuning.autotune(10 * major + minor, width, milliseconds), flush=True)


if __name__ == "__main__":
    main()
