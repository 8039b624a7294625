"""Others at the task of a search, for ``check.py`` to time beside ours."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from contracts import case_item, check_cases, rotation_of, too_far
from jobs import Item

if TYPE_CHECKING:
    from timing import Data

Run = Callable[[], object]
BLOCK = 16384
"""Keys that the published scheme takes at once."""
FEW = 128
"""Queries above which what takes ten times as long is not timed."""


class Contender(NamedTuple):
    """A call, and what it does of the task."""

    run: Run
    subspaces: int
    """Whose neighbors it finds."""
    rotates: bool = True
    """The keys, in each call."""


def contenders(data: Data) -> dict[str, Contender]:
    """What is here. Whatever is installed only in some places is left out where it is not."""
    queries, keys, rotation = data.queries, data.keys, data.rotation
    half, count = rotation.to(keys.dtype), len(data.widths)

    def nearest_of(part: torch.Tensor) -> torch.Tensor:
        turned_queries, turned = (
            (rows.float() @ rotation).unflatten(1, (count, data.width)).transpose(0, 1)
            for rows in (queries, part)
        )
        return torch.cdist(turned_queries, turned).min(2).values

    compiled = torch.compile(nearest_of)

    def published(step: Callable) -> None:
        best = torch.full((count, len(queries)), torch.inf, device=keys.device)
        for part in keys.split(BLOCK):
            best = torch.minimum(best, step(part))

    def floor() -> None:
        turned_queries = (queries @ half).unflatten(1, (count, data.width)).transpose(0, 1)
        for part in keys.split(BLOCK):
            turned = (part @ half).unflatten(1, (count, data.width)).permute(1, 2, 0)
            torch.bmm(turned_queries, turned)

    found = {"cuBLAS products alone": Contender(floor, count)}
    if len(queries) <= FEW:
        found["published scheme, eager"] = Contender(lambda: published(nearest_of), count)
        if keys.is_cuda:
            found["published scheme, torch.compile"] = Contender(lambda: published(compiled), count)
    if keys.is_cuda and importlib.util.find_spec("flash_kmeans"):
        run = partial(flash_kmeans, queries, keys, rotation, data.width)
        found["flash-kmeans assign"] = Contender(run, count)
        turned = keys @ half
        run = partial(flash_kmeans, queries, turned, rotation, data.width, turned=True)
        found["flash-kmeans assign, rotated"] = Contender(run, count, rotates=False)
    if keys.is_cuda and len(queries) <= FEW:
        found |= _of_one_subspace(queries, keys, rotation, data.width)
    return found


def flash_kmeans(
    queries: torch.Tensor,
    keys: torch.Tensor,
    rotation: torch.Tensor,
    width: int,
    *,
    turned: bool = False,
    config: dict[str, int] | None = None,
) -> torch.Tensor:
    """[S, Q] int32 nearest keys by flash-kmeans' assignment: queries are its points, keys its centroids.

    Equal widths only. It does less than our search: products of fp16 copies decide, in fp32, with the norms
    of those copies. There is no bound, no look at raw rows, no distance. It forms as many products.

    Args:
        turned: the keys are rotated already.
        config: of its kernel; default as it chooses for the card.
    """
    from flash_kmeans.assign_euclid_triton import euclid_assign_triton

    half = rotation.to(keys.dtype)
    points, centroids = (
        rows.unflatten(1, (-1, width)).transpose(0, 1)
        for rows in (queries @ half, keys if turned else keys @ half)
    )
    return euclid_assign_triton(points, centroids, points.float().square().sum(2), config=config)


def check_flash_kmeans(device: str, small: bool, config: dict[str, int] | None = None) -> Iterator[Item]:
    """Whether it finds near keys: before its times, which mean nothing otherwise."""
    queries, keys, widths, _ = check_cases(small)["normal"]

    def find() -> str | None:
        from ndm_fast.geometry import reference

        rotation = rotation_of(sum(widths))
        given = (queries.half().to(device), keys.half().to(device), rotation.to(device))
        index = flash_kmeans(*given, widths[0], config=config).long()
        best = reference.nearest_neighbors(*given, widths).distance.cpu()
        true = reference.distance_to(*given, widths, index).cpu()
        return too_far(true, best, 1e-9 * float(best.max()), exact=False)

    yield case_item("flash-kmeans assign", find)


def _of_one_subspace(
    queries: torch.Tensor, keys: torch.Tensor, rotation: torch.Tensor, width: int
) -> dict[str, Contender]:
    """faiss-gpu, cuVS and KeOps where they are, over contiguous rotated rows of one subspace only.

    Each is imported by its own call: what cannot be imported costs its own row.
    """
    rows = [(x @ rotation[:, :width].to(x.dtype)).float().contiguous() for x in (queries, keys)]
    return {
        f"{name}, one subspace": Contender(partial(run, *rows), 1, rotates=False)
        for name, (package, run) in OTHERS.items()
        if importlib.util.find_spec(package)
    }


def _faiss(queries: torch.Tensor, keys: torch.Tensor) -> object:
    import faiss

    if not hasattr(faiss, "StandardGpuResources"):
        raise RuntimeError("not timed: this faiss is built without GPUs")
    import faiss.contrib.torch_utils

    return faiss.knn_gpu(faiss.StandardGpuResources(), queries, keys, 1)


def _cuvs(queries: torch.Tensor, keys: torch.Tensor) -> object:
    from cuvs.neighbors import brute_force

    return brute_force.search(brute_force.build(keys), queries, 1)


def _keops(queries: torch.Tensor, keys: torch.Tensor) -> object:
    from pykeops.torch import LazyTensor

    left, right = LazyTensor(queries[:, None]), LazyTensor(keys[None])
    return ((left - right) ** 2).sum(2).argmin(1)


OTHERS: dict[str, tuple[str, Callable]] = {
    "faiss-gpu": ("faiss", _faiss),
    "cuVS": ("cuvs", _cuvs),
    "KeOps": ("pykeops", _keops),
}
"""Name -> package, and nearest neighbors of fp32 rows by it."""
