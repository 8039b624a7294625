"""The search over shadows beside the full sweep, and a matrix product; real activations, and noise.

    OMP_NUM_THREADS=1 python bench/runs/shadows.py [--acts FOLDER ...] [--out FILE]

``--acts`` are harvests, of which the first site is taken. Rows are rotated before; what is timed are the two
passes of the search alone, which have to find the same neighbors. Then the whole op, with its rotation, and
with finding the axes, as it is by default once they are found.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))  # not the root: its `kernels` hides another

from measuring import result_file, rounds, spread, times_faster, write_results

from ndm_fast import ops
from ndm_fast.activations.cache import ActivationCache
from ndm_fast.geometry import shadow
from ndm_fast.geometry.centring import rotate_centred, sample_mean
from ndm_fast.ops.cpu import search
from ndm_fast.table import text_table

SHAPES = [(32, 1024, 32768), (64, 1024, 32768), (96, 1024, 32768), (160, 1024, 32768), (320, 1024, 32768),
          (160, 128, 16384)]  # fmt: skip
"""Width of the subspaces, queries, keys."""
REPEATS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--acts", nargs="*", default=[], help="folders of harvests")
    parser.add_argument("--width", type=int, default=640, help="of the noise")
    parser.add_argument("--out", type=Path, default=result_file("shadows"))
    arguments = parser.parse_args()
    rows = []
    for name, data in activations(arguments.acts, arguments.width):
        for width, queries, keys in SHAPES:
            rows.append({"rows": name, **time_shape(data, width, queries, keys)})
            print(text_table([rows[-1]]), flush=True)
    write_results(arguments.out, rows)


def activations(folders: list[str], width: int) -> Iterator[tuple[str, Tensor]]:
    """Names and [N, d] fp32 rows, in random order."""
    torch.manual_seed(0)
    count = max(queries + keys for _, queries, keys in SHAPES)
    for folder in folders:
        cache = ActivationCache(folder)
        site = cache.sites[0]
        found = torch.cat(list(_some(cache, site, 2 * count))).float()
        yield f"{Path(folder).name} {site}", found[torch.randperm(len(found))]
    yield "noise", torch.randn(count, width)


def _some(cache: ActivationCache, site: str, count: int) -> Iterator[Tensor]:
    for batch in cache.stream(site).batches():
        yield batch
        count -= len(batch)
        if count <= 0:
            return


def time_shape(data: Tensor, width: int, queries: int, keys: int) -> dict[str, Any]:
    """Ratios of one shape, each within a round."""
    d = data.shape[1] // width * width
    left, right = data[:queries, :d].contiguous(), data[queries : queries + keys, :d].contiguous()
    widths, rotation, origin = [width] * (d // width), torch.eye(d), sample_mean(right)
    turn, rest = shadow.axes_of(rotation, right, origin, widths)
    turned = [rotate_centred(rows, turn, origin) for rows in (left, right)]
    exact = turned[0].double()
    call = search._Search(search.extension(), search.offsets_of(widths), False, False, shadows=False)
    products = [each.unflatten(1, (-1, width)).transpose(0, 1) for each in turned]
    found = {}

    def passes(shadows: bool) -> Callable[[], object]:
        def run() -> None:
            asked = call._replace(shadows=shadows)
            found[shadows] = search._search_rotated(asked, exact, turned[1], None).index

        return run

    contenders = {
        "shadows": passes(True),
        "full": passes(False),
        "products": lambda: [q @ k.T for q, k in zip(*products, strict=True)],
    }
    times = rounds(contenders, REPEATS)
    assert torch.equal(found[True], found[False])
    pays = shadow.pays
    whole = {}
    for name, decide in (("shadows", lambda *sizes: True), ("full", lambda *sizes: False)):
        whole[name] = lambda decide=decide: _whole(left, right, rotation, widths, decide)
    ops_times = rounds(whole, 3)
    shadow.pays = pays
    row = {"width": width, "queries": queries, "keys": keys, "d": d}
    row["seconds"] = spread(times["shadows"])["median"]
    row["times the full sweep"] = times_faster(times, "shadows", "full")
    row["times torch's products"] = times_faster(times, "shadows", "products")
    row["whole op, times without"] = times_faster(ops_times, "shadows", "full")
    used = pays(queries, keys, widths) and shadow.saved(rest, widths) > 0
    return row | {"used by default": used}


def _whole(
    queries: Tensor, keys: Tensor, rotation: Tensor, widths: list[int], decide: Callable[..., bool]
) -> None:
    shadow.pays = decide
    ops.nearest_index(queries, keys, rotation, widths)


if __name__ == "__main__":
    main()
