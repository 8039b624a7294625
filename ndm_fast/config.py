"""What a run can be told: a field for every setting, with its meaning and unit below it.

Every field is a flag of ``ndm-fast train`` and a key of ``--config``; names are unique over the groups. The
text below a field is its help.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict, get_args

from ndm_fast.errors import InputError
from ndm_fast.fields import check_positive, check_words, fitted, kinds

Metric = Literal["euclidean", "cosine"]
Dtype = Literal["float32", "bfloat16", "float16"]
METRICS, DTYPES = get_args(Metric), get_args(Dtype)


class HubOptions(TypedDict, total=False):
    """Arguments of ``load_model``, ``load_tokenizer`` and ``load_config`` beside the name."""

    revision: str | None
    trust_remote_code: bool


@dataclass(frozen=True)
class HarvestConfig:
    """From text to activations."""

    model: str = ""
    """Hugging Face name, folder, .gguf file, or one of 'minilm', 'smollm2', 'gemma3-270m'."""
    revision: str | None = None
    """Branch, tag or commit of a hub model; none: its main branch."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the model."""
    site: tuple[str, ...] = ()
    """Sites to train, e.g. blocks.9.hook_resid_mid, x9.mid."""
    data: str = ""
    """File, folder or glob of text, HF dataset, or 'docstrings' for Python's own."""
    text_field: str = "text"
    """Field of a record that holds the text, data.text for a nested one."""
    encoding: str = "utf-8"
    """Of files without a byte-order mark: a name, or auto to detect it."""
    bad_text: Literal["error", "skip", "replace"] = "error"
    """What to do with text that cannot be read."""
    split_documents: Literal["auto", "blank-lines", "lines", "none"] = "auto"
    """Where .txt and .md files part; auto: only those over 1 MiB do."""
    chat_template: bool = False
    """The field holds messages, for the tokenizer's chat template."""
    text_seed: int | None = None
    """Order of 'docstrings'; none: the run's seed."""
    context_length: int | None = None
    """Tokens in a packed row; none: the model's own limit."""
    rows_per_batch: int = 16
    """Packed rows in one forward pass."""
    dtype: Dtype = "float32"
    """Dtype the model runs in."""
    autocast: Literal["bfloat16", "float16"] | None = None
    """Dtype of the model's products."""
    compile_model: bool = False
    """torch.compile the model's blocks, save those with a site inside."""
    bos: bool = False
    """Start every row with the tokenizer's BOS token."""
    repeat_data: bool = False
    """Start the text over when it ends, instead of an error."""
    max_norm_ratio: float | None = None
    """Drop rows whose norm exceeds this many median norms."""

    def how_read(self) -> dict[str, Any]:
        """Settings that decide which activations a site has, where they are no default, as JSON values."""
        given = dataclasses.asdict(self)
        told_elsewhere = ("model", "site", "data", "rows_per_batch", "repeat_data")
        defaults = {f.name: f.default for f in dataclasses.fields(self) if f.name not in told_elsewhere}
        return {name: given[name] for name, default in defaults.items() if given[name] != default}

    @property
    def hub_options(self) -> HubOptions:
        """Which version of the model to load, and whether its code may run."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}

    def __post_init__(self) -> None:
        check_words(self)
        check_positive(self, "rows_per_batch")
        if self.context_length is not None and self.context_length < 4:
            raise InputError(f"context_length is {self.context_length}: give at least 4 tokens")
        if self.max_norm_ratio is not None and self.max_norm_ratio <= 1:
            raise InputError(f"max_norm_ratio is {self.max_norm_ratio}: give a ratio above 1")


@dataclass(frozen=True)
class TrainConfig:
    """The loop: objective, rotation, schedule, data per step."""

    unit_size: int = 32
    """Width of each subspace at the start."""
    initial_widths: tuple[int, ...] | None = None
    """Widths at the start, instead of unit_size."""
    metric: Metric = "euclidean"
    """Distance inside a subspace."""
    objective: Literal["distance", "log"] = "distance"
    """What is averaged: the distance, equally over subspaces, as published; or its logarithm, by width, which
    weighs quiet subspaces as much as loud ones."""
    rotation: Literal["lie", "lazy", "exp"] = "lie"
    """Optimiser on SO(d)."""
    start: Literal["identity", "random", "pca"] = "identity"
    """First rotation."""
    queries: int = 128
    """Queries in one step."""
    keys: int = 16384
    """Keys that each query is compared with."""
    search_every: int = 16
    """Steps that share one search; 1 searches every step."""
    search_ahead: float = 1.0
    """Share of the steps of a search by which it looks ahead along the last update, at low rates."""
    max_steps: int = 2000
    """Steps at which training ends, merged or not."""
    lr: float = 3e-3
    """Peak learning rate, radians per step and coordinate pair."""
    pace: Literal["equal", "ratio"] = "equal"
    """Rate of a pair of directions: lr, or lr times the quieter one's deviation over the louder's."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of Adam's first and second moment."""
    grad_clip: float = 100.0
    """Largest norm of the gradient; longer ones are scaled down."""
    schedule: Literal["constant", "linear"] = "linear"
    """Learning rate after each merge; linear: it decays until the next check."""
    warmup_steps: int = 20
    """Steps over which lr rises from 0 after a start or a merge."""
    pool_rows: int = 131072
    """Activations held at once; queries leave, then the pool is refilled."""
    pool_dtype: Dtype = "float32"
    """Dtype of the stored activations."""
    heldout_queries: int = 2048
    """Held-out queries, never trained on."""
    heldout_keys: int = 16384
    """Held-out keys, never trained on."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Proposal pass of the search."""
    escape_tries: int = 0
    """Random re-initialisations of a pair before the first merge, kept where the held-out loss falls."""
    escape_steps: int = 200
    """Steps after which a re-initialisation is kept or undone."""
    seed: int = 0
    """Seed of data order, random starts and escapes."""

    def __post_init__(self) -> None:
        check_words(self)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"betas are {list(self.betas)}: give two numbers from 0 to below 1")
        check_positive(self, "unit_size", "queries", "keys", "search_every", "max_steps", "lr", "grad_clip")
        check_positive(self, "pool_rows", "heldout_queries", "heldout_keys", "escape_steps")
        if self.objective == "log" and self.metric != "euclidean":
            raise InputError(
                f"objective log goes with metric euclidean, not {self.metric}: change one of them"
            )
        if self.pace == "ratio" and self.rotation == "exp":
            raise InputError("pace ratio goes with rotation lie or lazy, not exp: change one of them")
        if not 0 <= self.search_ahead <= 1:
            raise InputError(f"search_ahead is {self.search_ahead}: give a share from 0 to 1")
        if self.warmup_steps < 0 or self.escape_tries < 0:
            raise InputError("warmup_steps and escape_tries count something: give 0 or more")
        if self.pool_rows < self.keys + self.queries * self.search_every:
            raise InputError(
                f"pool_rows is {self.pool_rows}, fewer than keys + queries * search_every = "
                f"{self.keys + self.queries * self.search_every}: raise pool_rows or lower keys"
            )

    @property
    def rows_held(self) -> int:
        """Rows of the pool: never more than the run can use."""
        return min(self.pool_rows, self.max_steps * self.queries + self.keys)

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


@dataclass(frozen=True)
class MergeConfig:
    """When subspaces merge, and which."""

    merge_threshold: float | Literal["auto"] = 0.04
    """Merge pairs with MI / (p_a + p_b) above this, nats per width; 'auto': found at the first check from the
    widest gap in the tree of merges."""
    merge_start: int | None = None
    """Step of the first check; none: never."""
    merge_interval: int = 200
    """Steps between checks."""
    merge_lr: float | None = None
    """Peak learning rate after the first check; none: lr."""
    target_subspaces: int | None = None
    """Stop merging at this many subspaces."""
    mi_queries: int = 128
    """Queries of the mutual-information estimate."""
    mi_keys: int = 16384
    """Keys of the mutual-information estimate."""

    def __post_init__(self) -> None:
        check_words(self)
        given = [n for n in ("merge_start", "merge_lr", "target_subspaces") if getattr(self, n) is not None]
        check_positive(self, "merge_interval", "mi_queries", "mi_keys", *given)


@dataclass(frozen=True)
class RunSettings:
    """How a run is carried out, beside the mathematics: where its activations lie, what it writes when."""

    acts: str = ""
    """Folder of `ndm-fast harvest` to train from; the model is not run."""
    rows: str = ""
    """File of rows [N, d] to train from, .npy, .safetensors or .parquet; no model, no text."""
    partial: bool = False
    """Train from a harvest (acts) that is not finished, on what there is."""
    parallel: Literal["auto", "sites", "queries", "keys"] = "auto"
    """What torchrun's ranks share; auto: sites, or queries if these are too few."""
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    """Search and steps as CUDA graphs; auto: on a GPU, as the presets of the paper's models run."""
    log_every: int = 20
    """Steps between lines of training loss in the log."""
    eval_every: int = 100
    """Steps between held-out evaluations."""
    checkpoint_every: int = 200
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        check_words(self)
        check_positive(self, "log_every", "eval_every", "checkpoint_every")

    def check(self, train: TrainConfig) -> None:
        """Refuse what the training cannot be carried out with."""
        if self.cuda_graph == "on" and train.rotation == "exp":
            raise InputError("cuda_graph cannot capture the autograd of rotation exp: take lie or lazy")
        if self.partial and not self.acts:
            raise InputError("--partial takes an unfinished harvest: name its folder with --acts")


@dataclass(frozen=True)
class RunConfig:
    """Everything a run needs, in four groups."""

    harvest: HarvestConfig = field(default_factory=HarvestConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    merge: MergeConfig = field(default_factory=MergeConfig)
    run: RunSettings = field(default_factory=RunSettings)

    def __post_init__(self) -> None:
        self.run.check(self.train)

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


GROUPS: dict[str, type] = {
    "harvest": HarvestConfig,
    "train": TrainConfig,
    "merge": MergeConfig,
    "run": RunSettings,
}


def from_flat(values: Mapping[str, Any]) -> RunConfig:
    """A ``RunConfig`` from field values by name; fields left out keep their defaults.

    Raises:
        InputError: a name is no field, or a value is not allowed.
    """
    groups: dict[str, dict[str, Any]] = {name: {} for name in GROUPS}
    owners = {name: (group, kind) for group, cls in GROUPS.items() for name, kind in kinds(cls).items()}
    for name, value in values.items():
        if name not in owners:
            raise InputError(f"unknown setting {name!r}: the settings are {', '.join(sorted(owners))}")
        group, kind = owners[name]
        groups[group][name] = fitted(name, value, kind)
    return RunConfig(**{group: GROUPS[group](**chosen) for group, chosen in groups.items()})
