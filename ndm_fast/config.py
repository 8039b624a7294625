"""What a run can be told: one field, one line of meaning and unit.

Every field is a flag of ``ndm-fast train`` and a key of ``--config``; names are unique over the groups.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ndm_fast.errors import InputError

METRICS = ("euclidean", "cosine")


ROTATIONS = ("lie", "lazy", "exp")


STARTS = ("identity", "random", "pca")


SCHEDULES = ("constant", "linear")


DTYPES = ("float32", "bfloat16", "float16")


AUTO = "auto"


MODES = ("grow", "split")


PARALLEL = ("auto", "sites", "queries", "keys")


BAD_TEXT = ("error", "skip", "replace")


SPLITS = ("auto", "blank-lines", "lines", "none")


def _described(default: Any, meaning: str) -> Any:
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class HarvestConfig:
    """From text to activations."""

    model: str = _described("", "Hugging Face model name, local folder, or 'minilm' for the embedded one")
    site: tuple[str, ...] = _described((), "sites to train, e.g. blocks.9.hook_resid_mid, x9.mid")
    data: str = _described("", "file, folder or glob of text, HF dataset, or 'docstrings' for Python's own")
    text_field: str = _described("text", "field of a record that holds the text, data.text for a nested one")
    encoding: str = _described("utf-8", "of files without a byte-order mark: a name, or auto to detect it")
    bad_text: str = _described("error", f"what to do with text that cannot be read: {', '.join(BAD_TEXT)}")
    split_documents: str = _described(
        "auto", f"where .txt and .md files part: {', '.join(SPLITS)}; auto: only those over 1 MiB do"
    )
    chat_template: bool = _described(False, "the field holds messages, for the tokenizer's chat template")
    text_seed: int | None = _described(None, "order of 'docstrings'; default: the run's seed")
    context_length: int | None = _described(None, "tokens in a packed row; default: the model's own limit")
    rows_per_batch: int = _described(16, "packed rows in one forward pass")
    dtype: str = _described("float32", f"dtype the model runs in: {', '.join(DTYPES)}")
    autocast: str | None = _described(None, f"dtype of the model's products: {', '.join(DTYPES[1:])}")
    compile_model: bool = _described(False, "torch.compile the model's blocks, save those with a site inside")
    bos: bool = _described(False, "start every row with the tokenizer's BOS token")
    repeat_data: bool = _described(False, "start the text over when it ends, instead of an error")
    max_norm_ratio: float | None = _described(None, "drop rows whose norm exceeds this many median norms")

    def __post_init__(self) -> None:
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("bad_text", self.bad_text, BAD_TEXT)
        _one_of("split_documents", self.split_documents, SPLITS)
        _positive("rows_per_batch", self.rows_per_batch)
        if self.autocast is not None:
            _one_of("autocast", self.autocast, DTYPES[1:])
        if self.context_length is not None and self.context_length < 4:
            raise InputError(f"context_length is {self.context_length}: give at least 4 tokens")
        if self.max_norm_ratio is not None and self.max_norm_ratio <= 1:
            raise InputError(f"max_norm_ratio is {self.max_norm_ratio}: give a ratio above 1")


@dataclass(frozen=True)
class TrainConfig:
    """The loop: objective, rotation, schedule, data per step."""

    unit_size: int = _described(32, "width of each subspace at the start")
    initial_widths: tuple[int, ...] | None = _described(None, "widths at the start, instead of unit_size")
    metric: str = _described("euclidean", f"distance inside a subspace: {', '.join(METRICS)}")
    rotation: str = _described("lie", f"optimiser on SO(d): {', '.join(ROTATIONS)}")
    start: str = _described("identity", f"first rotation: {', '.join(STARTS)}")
    queries: int = _described(128, "queries in one step")
    keys: int = _described(16384, "keys that each query is compared with")
    search_every: int = _described(16, "steps that share one search; 1 searches every step")
    search_ahead: float = _described(
        1.0, "share of the steps of a search by which it looks ahead along the last update, at low rates"
    )
    max_steps: int = _described(2000, "steps at which training ends, merged or not")
    lr: float = _described(3e-3, "peak learning rate, radians per step and coordinate pair")
    betas: tuple[float, float] = _described((0.9, 0.999), "decay of Adam's first and second moment")
    grad_clip: float = _described(100.0, "largest norm of the gradient; longer ones are scaled down")
    schedule: str = _described("linear", "lr after each merge: constant, or linear decay to the next check")
    warmup_steps: int = _described(20, "steps over which lr rises from 0 after a start or a merge")
    pool_rows: int = _described(131072, "activations held at once; queries leave, then the pool is refilled")
    pool_dtype: str = _described("float32", f"dtype of the stored activations: {', '.join(DTYPES)}")
    heldout_queries: int = _described(2048, "held-out queries, never trained on")
    heldout_keys: int = _described(16384, "held-out keys, never trained on")
    precision: str = _described("fp32", "proposal pass of the search: fp32 or bf16")
    escape_tries: int = _described(
        0, "random re-initialisations of a pair before the first merge, kept where the held-out loss falls"
    )
    escape_steps: int = _described(200, "steps after which a re-initialisation is kept or undone")
    mode: str = _described("grow", "grow: units merge; split: one space is split, then trained as a whole")
    split_steps: int = _described(300, "mode split: steps of every split that is tried")
    parallel: str = _described(
        "auto",
        "what torchrun's ranks share: sites, queries or keys; auto: sites, or queries if these are too few",
    )
    cuda_graph: bool = _described(False, "steps of a search as one CUDA graph; lie and lazy, one rank")
    log_every: int = _described(20, "steps between lines of training loss in the log")
    eval_every: int = _described(100, "steps between held-out evaluations")
    checkpoint_every: int = _described(200, "steps between checkpoints")
    seed: int = _described(0, "seed of data order, random starts and escapes")
    acts: str = _described("", "folder of `ndm-fast harvest` to train from; the model is not run")
    partial: bool = _described(False, "train from a harvest (acts) that is not finished, on what there is")

    def __post_init__(self) -> None:
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"betas are {list(self.betas)}: give two numbers from 0 to below 1")
        _one_of("metric", self.metric, METRICS)
        _one_of("mode", self.mode, MODES)
        _one_of("parallel", self.parallel, PARALLEL)
        _one_of("rotation", self.rotation, ROTATIONS)
        _one_of("start", self.start, STARTS)
        _one_of("schedule", self.schedule, SCHEDULES)
        _one_of("pool_dtype", self.pool_dtype, DTYPES)
        _one_of("precision", self.precision, ("fp32", "bf16"))
        for name in _POSITIVE:
            _positive(name, getattr(self, name))
        if self.cuda_graph and self.rotation == "exp":
            raise InputError("cuda_graph cannot capture the autograd of rotation exp: take lie or lazy")
        if not 0 <= self.search_ahead <= 1:
            raise InputError(f"search_ahead is {self.search_ahead}: give a share from 0 to 1")
        if self.warmup_steps < 0 or self.escape_tries < 0:
            raise InputError("warmup_steps and escape_tries count something: give 0 or more")
        if self.pool_rows < self.keys + self.queries * self.search_every:
            raise InputError(
                f"pool_rows is {self.pool_rows}, fewer than keys + queries * search_every = "
                f"{self.keys + self.queries * self.search_every}: raise pool_rows or lower keys"
            )

    def widths(self, width: int) -> tuple[int, ...]:
        """Widths of the subspaces at the start, for activations of this width."""
        if self.initial_widths is not None:
            if sum(self.initial_widths) != width or min(self.initial_widths) < 1:
                raise InputError(
                    f"initial_widths {list(self.initial_widths)} sum to {sum(self.initial_widths)}, but the "
                    f"activations are {width} wide: give positive widths that sum to {width}"
                )
            return tuple(sorted(self.initial_widths, reverse=True))
        if width % self.unit_size:
            divisors = [n for n in range(1, width + 1) if width % n == 0]
            near = sorted(divisors, key=lambda n: abs(n - self.unit_size))[:3]
            raise InputError(
                f"unit_size {self.unit_size} does not divide the width {width}: "
                f"take one of {', '.join(map(str, sorted(near)))}, or give initial_widths"
            )
        return (self.unit_size,) * (width // self.unit_size)


_POSITIVE = [
    "unit_size",
    "queries",
    "keys",
    "search_every",
    "max_steps",
    "lr",
    "grad_clip",
    "pool_rows",
    "heldout_queries",
    "heldout_keys",
    "escape_steps",
    "split_steps",
    "log_every",
    "eval_every",
    "checkpoint_every",
]


@dataclass(frozen=True)
class MergeConfig:
    """When subspaces merge, and which."""

    merge_threshold: float | str = _described(
        0.04,
        "merge pairs with MI / (p_a + p_b) above this, nats per width; 'auto': found at the first check from "
        "the widest gap in the tree of merges",
    )
    merge_start: int | None = _described(None, "step of the first check; default: never")
    merge_interval: int = _described(200, "steps between checks")
    merge_lr: float | None = _described(None, "peak learning rate after the first check; default: lr")
    target_subspaces: int | None = _described(None, "stop merging at this many subspaces")
    mi_queries: int = _described(128, "queries of the mutual-information estimate")
    mi_keys: int = _described(16384, "keys of the mutual-information estimate")

    def __post_init__(self) -> None:
        if isinstance(self.merge_threshold, str) and self.merge_threshold != AUTO:
            raise InputError(f"merge_threshold is {self.merge_threshold!r}: give a number or '{AUTO}'")
        for name in ("merge_interval", "mi_queries", "mi_keys"):
            _positive(name, getattr(self, name))
        for name in ("merge_start", "merge_lr", "target_subspaces"):
            if getattr(self, name) is not None:
                _positive(name, getattr(self, name))


@dataclass(frozen=True)
class RunConfig:
    """Everything a run needs, in three groups."""

    harvest: HarvestConfig = field(default_factory=HarvestConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    merge: MergeConfig = field(default_factory=MergeConfig)

    @property
    def documents_seed(self) -> int:
        """Order of the documents, for ``documents.open_documents``."""
        return self.train.seed if self.harvest.text_seed is None else self.harvest.text_seed

    def flat(self) -> dict[str, Any]:
        """All fields of all groups by name, as plain JSON values."""
        values: dict[str, Any] = {}
        for group in dataclasses.fields(self):
            values.update(dataclasses.asdict(getattr(self, group.name)))
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


GROUPS: dict[str, type] = {"harvest": HarvestConfig, "train": TrainConfig, "merge": MergeConfig}


def from_flat(values: Mapping[str, Any]) -> RunConfig:
    """A ``RunConfig`` from field values by name; fields left out keep their defaults.

    Raises:
        InputError: a name is no field, or a value is not allowed.
    """
    groups: dict[str, dict[str, Any]] = {name: {} for name in GROUPS}
    owners = {f.name: (group, str(f.type)) for group, cls in GROUPS.items() for f in dataclasses.fields(cls)}
    for name, value in values.items():
        if name not in owners:
            raise InputError(f"unknown setting {name!r}: the settings are {', '.join(sorted(owners))}")
        group, kind = owners[name]
        groups[group][name] = _typed(name, value, kind)
    return RunConfig(**{group: GROUPS[group](**chosen) for group, chosen in groups.items()})


def _typed(name: str, value: Any, kind: str) -> Any:
    """A value of the type that a field is annotated with; a single item may stand for a tuple.

    Raises:
        InputError: it is of another type.
    """
    optional = kind.endswith(" | None")
    item = kind.removesuffix(" | None")
    if value is None and optional:
        return None
    if item.startswith("tuple["):
        item = item.removeprefix("tuple[").split(",")[0]
        return tuple(_typed(name, v, item) for v in (value if isinstance(value, list | tuple) else [value]))
    if item == "float | str":
        item = "str"
        with suppress(ValueError, TypeError):
            float(value)
            item = "float"
    if item == "float" and isinstance(value, int | float | str) and not isinstance(value, bool):
        with suppress(ValueError):
            return float(value)  # YAML reads 3e-4 as a string
    if type(value).__name__ == item:
        return value
    raise InputError(f"{name} is {value!r}: give a value of type {kind}, see `ndm-fast train --help`")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{name} is {value!r}: take one of {', '.join(allowed)}")


def _positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise InputError(f"{name} is {value}: give a finite number above 0")
