"""Times below which no Hopper card can be: by issue slots, by memory, by the tensor cores.

A prediction below its floor is wrong before anything has run, and so is a measurement. Only what has to be
done is counted: of a kernel its hot loop, of memory what the second-level cache cannot keep.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

LOOPS = Path(__file__).resolve().parents[2] / "tests" / "data" / "kernel-loops.json"
MULTIPROCESSORS = 132
CLOCK = 1.98e9
"""The highest of an H100 or H200 SXM; under load they run at less."""
SLOTS = 4 * MULTIPROCESSORS * CLOCK
"""Instructions of a warp a second: one from each of four schedulers."""
TENSOR = 4096 * MULTIPROCESSORS * CLOCK
"""FLOP a second in fp16 and bf16: NVIDIA's 989e12 are at 1.83 GHz."""
FP32 = 256 * MULTIPROCESSORS * CLOCK
MEMORY = 4.8e12
"""Bytes a second of an H200; an H100 has 3.35e12."""
CACHE = 50e6
"""Bytes of the second-level cache."""


class Shape(NamedTuple):
    """Of a search or a step."""

    model: str
    queries: int
    keys: int
    d: int
    width: int

    @property
    def padded(self) -> int:
        """Columns that are multiplied for a subspace."""
        from ndm_fast.kernels import tuning

        return sum(tuning.pieces(self.width))

    @property
    def subspaces(self) -> int:
        return self.d // self.width


class Floor(NamedTuple):
    """Milliseconds of one kernel; it takes at least the longest."""

    issue: float = 0.0
    memory: float = 0.0
    tensor: float = 0.0

    @property
    def ms(self) -> float:
        return max(self)


def _floor(slots: float = 0.0, moved: float = 0.0, flop: float = 0.0, rate: float = TENSOR) -> Floor:
    return Floor(1e3 * slots / SLOTS, 1e3 * max(0.0, moved - CACHE) / MEMORY, 1e3 * flop / rate)


@lru_cache(maxsize=1)
def _loops() -> dict[str, dict[str, int]]:
    """Of sm_90, the shorter one of all tritons."""
    found: dict[str, dict[str, int]] = {}
    for golden in json.loads(LOOPS.read_text()).values():
        for label, numbers in golden["sm_90"].items():
            known = found.get(label)
            if not known or numbers["instructions"] < known["instructions"]:
                found[label] = numbers
    return found


def instructions(label: str) -> int:
    """In one turn of the hot loop of a shipped launch, for each warp."""
    return _loops()[label]["instructions"]


def rotate(shape: Shape) -> Floor:
    """Keys times the rotation in half precision, to a copy."""
    return _floor(moved=4.0 * shape.keys * shape.d, flop=2.0 * shape.keys * shape.d**2)


def sweep(shape: Shape, tile: int | None = None) -> Floor:
    """As shipped, by its loop too; with another tile by memory and products alone."""
    from ndm_fast.kernels import tuning

    shipped = tuning.sweep(90, shape.width, shape.queries)
    tiles = shape.subspaces * -(-shape.keys // (tile or shipped.tile))
    turns = 0.0 if tile else float(tiles * shipped.warps)
    if turns and not shipped.streams:
        turns *= -(-shape.queries // shipped.query_block)
    label = f"{shape.model} Q{shape.queries}: {'stream' if shipped.streams else 'sweep'}"
    return _floor(
        turns * instructions(label) if turns else 0.0,
        2.0 * shape.keys * shape.d + 4.0 * tiles * shape.queries,
        2.0 * shape.queries * shape.keys * shape.subspaces * shape.padded,
    )


def look(shape: Shape) -> Floor:
    """Reads every minimum."""
    from ndm_fast.kernels import tuning

    tile = tuning.sweep(90, shape.width, shape.queries).tile
    return _floor(moved=4.0 * shape.subspaces * shape.queries * -(-shape.keys // tile))


def gradient(shape: Shape, products: str = "ieee") -> Floor:
    """All three kernels. Neighbors, rotation and result may lie in the cache."""
    from ndm_fast.kernels import gradient_tuning

    slots = 0.0
    if products == "ieee":
        widths = [shape.width] * shape.subspaces
        tiles = gradient_tuning.shape_of(90, products)
        pieces = shape.subspaces * -(-shape.width // sum(gradient_tuning.columns_of(widths, products)))
        project = -(-shape.queries // tiles.project_queries) * -(-shape.d // tiles.depth) * pieces
        total = -(-shape.d // tiles.rows) * -(-shape.queries // tiles.queries) * pieces
        slots = project * tiles.project_warps * instructions(f"{shape.model} step: project")
        slots += total * tiles.warps * instructions(f"{shape.model} step: gradient")
    moved = 2.0 * shape.queries * shape.subspaces * shape.d + 8.0 * shape.d**2
    flop = 4.0 * shape.queries * shape.d**2
    if products == "ieee":
        return _floor(slots, moved, flop, FP32)
    return _floor(slots, moved, 3 * flop)


def update(shape: Shape, half: bool = False) -> Floor:
    """Adam on the Lie algebra."""
    return _floor(moved=(18.0 if half else 20.0) * shape.d**2)


def search(shape: Shape, *, rotated: bool = False) -> float:
    """Milliseconds of a search of :func:`nearest_index`, without the search that decides."""
    return sweep(shape).ms + look(shape).ms + (0.0 if rotated else rotate(shape).ms)


def step(shape: Shape, together: int = 32) -> float:
    """Milliseconds of one of the steps that share a search, with its two products in bf16."""
    all_of_them = shape._replace(queries=shape.queries * together)
    products = _floor(flop=4.0 * shape.d**3).ms
    return search(all_of_them) / together + gradient(shape).ms + update(shape, half=True).ms + products


def of_row(row: dict) -> float | None:
    """Milliseconds below which a row of ``check.py`` cannot be; None where nothing is known."""
    name = str(row["name"])
    if name == "copy" or "ms" not in row or "on device" in name:
        return None
    if "tflops" in row and "model" not in row:
        return row["tflops"] * 1e12 * row["ms"] / (FP32 if name == "float32" else TENSOR)
    if not all(isinstance(row.get(key), int) for key in ("Q", "d", "width")):
        return None
    shape = Shape(row["model"], row["Q"], row.get("K") or 0, row["d"], row["width"])
    if name.startswith("sweep"):
        return sweep(shape, int(name.split()[2].split("x")[0])).ms
    if name.startswith("step with reuse"):
        return step(shape) if "triton" in name or "package" in name else step(shape) - gradient(shape).ms
    if name.startswith("step searching every time"):
        return step(shape, together=1)
    if name.startswith("gradient, triton, "):
        return gradient(shape, name.split(", ")[2]).ms
    if name.startswith("update, triton"):
        return update(shape, half="bf16" in name).ms
    if name.startswith("triton "):
        return search(shape, rotated="rotated" in name)
    if name.startswith("flash-kmeans"):
        turned = 0.0 if "rotated" in name else rotate(shape).ms
        unpadded = 2.0 * shape.queries * shape.keys * shape.d
        return turned + _floor(moved=2.0 * shape.keys * shape.d, flop=unpadded).ms
    if name == "cuBLAS products alone":
        unpadded = 2.0 * shape.queries * shape.keys * shape.d
        return rotate(shape).ms + _floor(moved=2.0 * shape.keys * shape.d, flop=unpadded).ms
    return None
