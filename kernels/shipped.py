"""What training and the tables of ``tuning.py`` launch, replayed without a card (``replay.py``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from . import gradient, ksg, lie_update, replay, search

MODELS = {"gpt2": (768, 32), "qwen2.5-1.5b": (1536, 64), "gemma-2-2b": (2304, 72)}
"""Width of the activations and of the first subspaces, of the published runs."""

KEYS = 409_600
"""Of a search, whose number of tiles decides how many minima are held."""

FEW, MANY = 128, 4096
"""Queries of a step, and of a search for 32 of them."""


class Shipped(NamedTuple):
    """A launch and what it is for."""

    label: str
    launch: replay.Launch


def launches(arch: int, *, every: bool = False) -> Iterator[Shipped]:
    """What training launches, each specialisation once; labels differ.

    Args:
        every: all that a caller may ask for, in all alignments. Otherwise one stands for what differs little.
    """
    seen: set[str] = set()
    labels: dict[str, int] = {}
    runs = {**_training(), **_merged(), **_gradients(), **(_others() if every else {})}
    for name, run in runs.items():
        with replay.recorded(arch) as made:
            run()
        for launch in made:
            key = launch.key if every else _kind(launch)
            if key in seen:
                continue
            seen.add(key)
            label = f"{name}: {launch.name.removesuffix('_kernel')}"
            labels[label] = labels.get(label, 0) + 1
            yield Shipped(label if labels[label] == 1 else f"{label} {labels[label]}", launch)


def _kind(launch: replay.Launch) -> str:
    choices = launch.choices
    if launch.name == "resolve_kernel":  # where it is a loop's length
        choices = {name: value for name, value in choices.items() if name != "SEGMENT"}
    return repr((launch.name, choices, launch.signature))


def rows(count: int, width: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """A tensor without numbers."""
    return torch.empty(count, width, dtype=dtype, device="meta")


def asked(
    widths: list[int], queries: int, dtype: torch.dtype = torch.float16
) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Arguments of a search."""
    d = sum(widths)
    return rows(queries, d, dtype), rows(KEYS, d, dtype), rows(d, d, torch.float32), widths


def _training() -> dict[str, Callable[[], object]]:
    """The fast presets, one as published, and an estimate of mutual information."""
    runs: dict[str, Callable[[], object]] = {}
    for model, (d, width) in MODELS.items():
        widths = [width] * (d // width)
        for queries in (FEW, MANY):
            runs[f"{model} Q{queries}"] = partial(search.nearest_index, *asked(widths, queries))
        runs[f"{model} step"] = partial(_step, widths)
    runs[f"{model} published"] = partial(search.nearest_index, *asked(widths, FEW), precision="fp32")
    runs["mutual information"] = _mutual_information
    return runs


def _step(widths: list[int], **options: object) -> None:
    d = sum(widths)
    index = torch.empty(len(widths), FEW, dtype=torch.int64, device="meta")
    queries, keys, rotation, _ = asked(widths, FEW)
    gradient.loss_and_gradient(queries, keys, index, rotation, widths, "euclidean", **options)  # type: ignore[arg-type]
    first, second = torch.empty(2, d, d, device="meta")
    scale, guard = torch.empty(2, 1, device="meta")
    lie_update.lie_update(rotation, first, second, scale, guard, (0.9, 0.999), half=d > 768)


def _mutual_information() -> None:
    queries, keys, rotation, widths = asked([32] * 24, 1, torch.float32)
    pairs = torch.empty(276, 2, dtype=torch.int64, device="meta")
    variances = torch.empty(len(widths), device="meta")
    ksg.ksg_radius_and_counts(queries, keys, rotation, widths, variances, pairs)


def _merged() -> dict[str, Callable[[], object]]:
    """Subspaces after merges."""
    return {
        "width 432 Q4096": partial(_search, 432, MANY),
        "width 128 Q256": partial(_search, 128, 256),
        "width 768 Q128": partial(_search, 768, FEW),
    }


def _search(width: int, queries: int) -> None:
    search.nearest_index(*asked([width] * max(1, 768 // width), queries))


def _gradients() -> dict[str, Callable[[], object]]:
    counted = torch.empty(4, FEW, dtype=torch.bool, device="meta")
    return {
        "step 432 counted": partial(_step, [432] * 4, counted=counted),
        "step 32 logarithms": partial(_step, [32] * 24, log_floor=torch.empty(24, device="meta")),
        "step 72 fp16x3": partial(_step, [72] * 32, products="fp16x3"),
    }


def _others() -> dict[str, Callable[[], object]]:
    runs: dict[str, Callable[[], object]] = {
        "step 7": partial(_step, [7] * 9),
        "step 32 tf32x3": partial(_step, [32] * 24, products="tf32x3"),
        "step 32 fp16x3": partial(_step, [32] * 24, products="fp16x3"),
        "distances": partial(search.nearest_neighbors, *asked([32] * 24, FEW), precision="bf16"),
    }
    for width in (128, 256):
        runs[f"width {width} Q4096"] = partial(_search, width, MANY)
    for width in (32, 64, 72):
        widths = [width] * 8
        half, brain, full = (
            asked(widths, 200, dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32)
        )
        runs[f"raw {width}"] = partial(search.nearest_index, *half, precision="fp32")
        runs[f"rotated {width} fp16"] = partial(search.nearest_neighbors, *half, keys_rotated=True)
        runs[f"rotated {width} fp32"] = partial(search.nearest_neighbors, *full, keys_rotated=True)
        runs[f"bf16 keys {width}"] = partial(search.nearest_index, *brain)
        runs[f"cosine {width}"] = partial(search.nearest_index, *half, metric="cosine")
        runs[f"cosine {width} raw"] = partial(search.nearest_index, *half, precision="fp32", metric="cosine")
    for precision in ("bf16", "fp32"):
        runs[f"fused 32 {precision}"] = partial(
            search.nearest_index, *asked([32] * 24, MANY), precision=precision, form="fused"
        )
    return runs
