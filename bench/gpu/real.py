"""Searches among real activations, beside noise of the same size: whether right, how fast, how many tiles.

``activations.safetensors`` has 2,048 keys and 128 queries of SmolLM2-135M's residual stream, and the rotation
that was trained on it (``make_activations.py``). They are taken as they are: 2,048 keys fill no card, so the
times compare data, not cards; more keys made of these few would have neighbors that no activations have.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from contracts import case_item, check, check_index, rotation_of
from jobs import Item, Row
from safetensors.torch import load_file
from timing import Run, graphed, measure

if TYPE_CHECKING:
    from ndm_fast.kernels.launch import Part

FILE = Path(__file__).with_name("activations.safetensors")
SMALL = (3, 300, 2)
"""Queries, keys and subspaces in the interpreter."""


class Rows(NamedTuple):
    """What is searched."""

    queries: torch.Tensor
    keys: torch.Tensor
    rotation: torch.Tensor
    widths: list[int]

    def to(self, device: str) -> Rows:
        """On a device."""
        return Rows(*(each.to(device) for each in self[:3]), self.widths)


def real(small: bool) -> Rows:
    """Activations and the rotation that was trained on them."""
    found = load_file(FILE)
    widths = found["widths"].tolist()
    rows = Rows(found["queries"], found["keys"], found["rotation"], widths)
    if not small:
        return rows
    queries, keys, subspaces = SMALL
    d = sum(widths[:subspaces])
    # The first coordinates alone: the trained rotation mixes all, so this one is random.
    return Rows(rows.queries[:queries, :d], rows.keys[:keys, :d], rotation_of(d), widths[:subspaces])


def noise(like: Rows) -> Rows:
    """Independent normal numbers, as many."""
    queries, keys = (torch.randn(rows.shape).half() for rows in like[:2])
    return Rows(queries, keys, rotation_of(len(like.rotation)), like.widths)


def data(small: bool) -> dict[str, Rows]:
    """Name -> rows: real ones with the trained and a random rotation, and noise."""
    rows = real(small)
    random = rows._replace(rotation=rotation_of(len(rows.rotation)))
    return {"activations, trained": rows, "activations, random rotation": random, "noise": noise(rows)}


def checks(device: str, small: bool) -> Iterator[Item]:
    """Both searches against the oracle. The rotations are those that the checks draw."""
    from ndm_fast.kernels import search

    for name, rows in list(data(small).items())[1:]:
        case = (rows.queries, rows.keys, rows.widths, "euclidean")
        yield case_item(f"{name}: index", partial(check_index, case, torch.float16, device))
        exact = partial(search.nearest_neighbors, precision="fp32")
        yield case_item(f"{name}: fp32", partial(check, exact, "fp32", case, torch.float16, device))
    yield case_item("activations, trained: index", partial(_check_trained, real(small).to(device)))


def _check_trained(rows: Rows) -> str | None:
    from contracts import too_far

    from ndm_fast.geometry import reference
    from ndm_fast.kernels import search

    index = search.nearest_index(*rows)
    best = reference.nearest_neighbors(*rows).distance.cpu()
    true = reference.distance_to(*rows, index).cpu()
    return too_far(true, best, 1e-9 * float(best.max()), exact=False)


def times(device: str, small: bool) -> Iterator[Item]:
    """The index, for each of the data: its time, and the tiles that a query looks at."""
    from ndm_fast.kernels.search import nearest_index

    for name, rows in data(small).items():
        there = rows.to(device)
        call = partial(nearest_index, *there)
        run = graphed(call) if device == "cuda" else call
        (count, d), k = rows.queries.shape, len(rows.keys)
        shape: Row = {"model": "smollm2", "Q": count, "K": k, "d": d, "width": rows.widths[0]}
        yield f"index of {name}", partial(_time, f"index of {name}", run, shape, len(rows.widths), device)
        yield f"tiles of {name}", partial(_tiles, f"tiles of {name}", there, shape)


def _time(name: str, run: Run, shape: Row, subspaces: int, device: str) -> list[Row]:
    count, k, d = shape["Q"], shape["K"], shape["d"]
    scores = count * k * subspaces
    return [measure(name, run, 2.0 * k * d * (d + count), 2.0 * k * d, device, scores=scores, **shape)]


def _tiles(name: str, rows: Rows, shape: Row) -> list[Row]:
    looked = visited(rows).double()
    total = -(-len(rows.keys) // TILE)
    said = f"{float(looked.mean()):.2f} of {total} tiles a query, most {int(looked.max())}"
    more = float((looked > 1).double().mean())
    found = {"tiles": total, "visited": float(looked.mean()), "most": int(looked.max()), "beyond_first": more}
    return [{"name": name, **found, "said": f"{said}; {more:.1%} look beyond the first", **shape}]


TILE = 128
"""Keys of a tile, in all shapes that are shipped for these widths."""


def visited(rows: Rows) -> torch.Tensor:
    """[S, Q] tiles of 128 keys that each query's search that decides looks at, in half precision.

    From the kernels' own minima and bounds, worked out here: the kernel does not count. As there, tiles come
    in the order of their least value, and the first above the bound is the end.
    """
    from ndm_fast.kernels import autotune, search, tuning
    from ndm_fast.kernels.keys import rounding_of, underflow_of

    part = autotune.timed(*rows).part
    tiles = tuning.Sweep(TILE, 64, 4, 2, 1, 0)
    pack = search.packed(part, tiles)
    minima = search.sweep(part, tiles, pack)
    count, width = len(rows.queries), part.width
    lows, order = minima[..., :count].transpose(1, 2).float().sort(dim=2, stable=True)  # [S, Q, tiles]
    near = _nearest_of_tiles(part, minima.shape[1]).gather(2, order)
    reach = torch.cat([torch.full_like(near[..., :1], torch.inf), near.cummin(2).values[..., :-1]], dim=2)
    around = 2 * pack.sizes[..., None] + reach
    far = reach + rounding_of(torch.float16) * around + underflow_of(width)
    far = far + part.scaling()[2][:, None, None]
    accumulation = (width / 8 + 8) * 1.2e-7
    limit = 0.5 * far * far - pack.half_norms[..., None] + accumulation * around * around
    looks = ((lows <= limit) | limit.isinf()) & lows.isfinite()
    return looks.cumprod(2).sum(2)


def _nearest_of_tiles(part: Part, tiles: int) -> torch.Tensor:
    """[S, Q, tiles] least scaled distance of each query to the copies in each tile."""
    scales = part.scaling()[1].double()[:, None, None]
    queries, keys = (
        rows.double().unflatten(1, (-1, part.width)).transpose(0, 1) * scales
        for rows in (part.frame.rotated[part.group][:, part.columns], part.chunk.rows[:, part.columns])
    )
    distance = torch.cdist(queries, keys)
    missing = tiles * TILE - distance.shape[2]
    padded = torch.nn.functional.pad(distance, (0, missing), value=torch.inf)
    return padded.unflatten(2, (tiles, TILE)).amin(3).float()
