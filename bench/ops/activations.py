"""Real activations for the benchmarks: harvested once, on Python's docstrings, and kept in ``build``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from registry import Shape
from safetensors.torch import load_file, save_file
from torch import Tensor

from ndm_fast.activations.documents import open_documents
from ndm_fast.activations.models import load_model
from ndm_fast.activations.rows import take_rows
from ndm_fast.activations.stream import ActivationStream
from ndm_fast.config import HarvestConfig
from ndm_fast.evaluate.baselines import baseline_partition

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "bench-activations"
TRAINED = ROOT / "bench" / "gpu" / "activations.safetensors"
"""A rotation trained on SmolLM2's activations, for ``bench/gpu``."""


class Source(NamedTuple):
    """Whose activations, and where."""

    model: str
    site: str
    harvest: dict[str, Any]
    """What the demo with this model sets."""


SOURCES = {
    384: Source("minilm", "blocks.3.hook_resid_post", {"context_length": 40}),
    576: Source(
        "smollm2", "blocks.20.hook_resid_post", {"context_length": 256, "bos": True, "max_norm_ratio": 3.0}
    ),
}
"""By width of the activations."""


def activations(d: int, count: int) -> Tensor:
    """[count, d] fp32 rows in random order."""
    source = SOURCES[d]
    kept = FOLDER / f"{source.model}-{count}.safetensors"
    if not kept.exists():
        model, tokenizer = load_model(source.model)
        harvest = HarvestConfig(model=source.model, data="docstrings", **source.harvest)
        documents = open_documents("docstrings", seed=0)
        stream = ActivationStream(model, tokenizer, source.site, documents, harvest)
        rows, _ = take_rows(stream.batches(), count)
        FOLDER.mkdir(parents=True, exist_ok=True)
        save_file({"rows": rows.half().contiguous()}, kept)
    rows = load_file(kept)["rows"].float()
    return rows[torch.randperm(count, generator=torch.Generator().manual_seed(0))]


def rotation_of(kind: str, rows: Tensor, shape: Shape) -> Tensor:
    """[d, d] of a partition; wider subspaces of a trained one are neighbors put together."""
    if kind == "trained":
        return load_file(TRAINED)["rotation"]
    return baseline_partition(kind, shape.widths, rows).rotation.detach()
