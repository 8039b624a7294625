"""Between model, cache and training: harvest into a cache, and runs that train from one."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ndm_fast.activations.cache import ActivationCache, CachedActivations, held_rows
from ndm_fast.activations.cache_folder import cache_bytes, free_bytes
from ndm_fast.activations.cache_writer import SHARD_MIB, harvest_cache
from ndm_fast.activations.documents import Documents, harvest_documents
from ndm_fast.activations.models import load_model, prepare_model
from ndm_fast.activations.stream import ActivationStream, Harvester
from ndm_fast.config import HarvestConfig, RunConfig, TrainConfig
from ndm_fast.errors import InputError

_FREE = ("site", "repeat_data")
"""Settings of the harvest that a run from a cache may choose for itself."""


def documents(config: RunConfig) -> Documents:
    """The text of a run, always in the same order.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    return harvest_documents(config.harvest, config.documents_seed)


def harvest_run(
    config: HarvestConfig,
    out: str | Path,
    rows: int,
    *,
    store_dtype: str | None = None,
    shard_mib: float = SHARD_MIB,
    resume: bool = False,
    device: str = "cpu",
    show_progress: bool = True,
) -> ActivationCache:
    """What ``ndm-fast harvest`` does: load the model and harvest all sites in one pass.

    Args:
        rows, store_dtype, shard_mib, resume: see ``cache_writer.harvest_cache``.

    Raises:
        InputError, StoppedError: see there.
    """
    if not config.site:
        raise InputError("no site given: pass --site, for instance blocks.3.hook_resid_post")
    config = dataclasses.replace(config, text_seed=config.text_seed or 0)
    text = documents(RunConfig(harvest=config))
    model, tokenizer = load_model(config.model, config.dtype, device, **config.hub_options)
    prepare_model(model, config)
    return harvest_cache(
        Harvester(model, tokenizer, config.site, text, config),
        config,
        out,
        rows,
        store_dtype=store_dtype,
        shard_mib=shard_mib,
        resume=resume,
        show_progress=show_progress,
    )


def share_harvest(
    config: RunConfig, model: Any, tokenizer: Any, folder: Path, *, show_progress: bool = True
) -> ActivationCache | None:
    """One harvest for all sites of a run, as much as training may draw; goes on with one that is there.

    Returns:
        The cache, or None where the disk has no room for it, which is said on stderr.

    Raises:
        InputError, StoppedError: see ``cache_writer.harvest_cache``.
    """
    harvest = dataclasses.replace(config.harvest, text_seed=config.documents_seed)
    harvester = Harvester(model, tokenizer, harvest.site, documents(config), harvest)
    rows = rows_drawn(config.train, harvester.largest_batch)
    needed, free = cache_bytes(harvester.widths, rows, harvest.dtype), free_bytes(folder)
    if not folder.exists() and needed > free:
        tqdm.write(
            f"ndm-fast: activations of {len(harvester.widths)} sites would take {needed / 2**30:.2f} GiB in "
            f"{folder}, {free / 2**30:.2f} GiB are free: the model is run for every site instead",
            file=sys.stderr,
        )
        return None
    return harvest_cache(
        harvester,
        harvest,
        folder,
        rows,
        resume=True,
        show_progress=show_progress,
        go_on="the same command and --resume",
    )


def rows_drawn(train: TrainConfig, largest_batch: int) -> int:
    """Rows of a stream that training reads at most.

    The held-out rows and every generation of the pool end inside a batch, whose other rows are not used.
    """
    pools = generations(train)
    return train.heldout_queries + train.heldout_keys + pools * train.rows_held + (pools + 1) * largest_batch


def generations(train: TrainConfig) -> int:
    """How often the pool is filled in training, at most."""
    beside = train.rows_held - train.keys
    # A generation ends when a search's queries, at most search_every batches of them, find too few rows.
    batches = beside // train.queries - train.search_every + 1
    enough = beside >= train.max_steps * train.queries
    return 1 if enough else math.ceil(train.max_steps / max(batches, 1))


def with_cache(config: RunConfig, cache: ActivationCache) -> RunConfig:
    """Settings of a run from a cache: those of the harvest, where they are left at their defaults.

    Raises:
        InputError: one is neither at its default nor that of the harvest.
    """
    chosen: dict[str, Any] = {}
    for field in dataclasses.fields(HarvestConfig):
        asked, harvested = getattr(config.harvest, field.name), getattr(cache.config, field.name)
        if field.name in _FREE:
            chosen[field.name] = asked
        elif asked in (field.default, harvested):
            chosen[field.name] = harvested
        else:
            raise InputError(
                f"{cache.folder} was harvested with {field.name} {harvested!r}, not {asked!r}: leave "
                f"--{field.name.replace('_', '-')} away, or harvest anew"
            )
    chosen["site"] = config.harvest.site or tuple(cache.sites)
    return dataclasses.replace(config, harvest=HarvestConfig(**chosen))


def run_stream(config: RunConfig, rows: int, device: str = "cpu") -> ActivationStream | CachedActivations:
    """The activations that a run of one site was trained on, with their tokens: from its cache, or its model.

    Args:
        rows: how many are wanted.

    Raises:
        InputError: see :func:`run_cache` and :func:`model_stream`.
    """
    refuse_rows(config)
    cache = run_cache(config, rows)
    if cache is None:
        return model_stream(config, device)
    return cache.stream(config.harvest.site[0], repeat=config.harvest.repeat_data)


def refuse_rows(config: RunConfig) -> None:
    """Refuse what looks at tokens, for a run from a file of rows.

    Raises:
        InputError: it is one.
    """
    if config.run.rows:
        raise InputError(
            f"the run was trained on the rows of {config.run.rows}, which belong to no tokens: what compares "
            "tokens is for runs on text"
        )


def model_stream(config: RunConfig, device: str = "cpu") -> ActivationStream:
    """The activations of the first site of a run, from the model.

    Raises:
        InputError: the model cannot be loaded, or there is no text.
    """
    harvest, text = config.harvest, documents(config)
    model, tokenizer = load_model(harvest.model, harvest.dtype, device, **harvest.hub_options)
    return ActivationStream(model, tokenizer, harvest.site[0], text, harvest)


def run_cache(config: RunConfig, rows: int) -> ActivationCache | None:
    """The cache that a run was trained from, where it holds so many activations, or all of the text.

    Returns:
        None where there was no cache, or (which is said on stderr) it is gone, or too small.

    Raises:
        InputError: it is damaged, or holds another harvest than that of the run.
    """
    folder = config.run.acts
    if not folder:
        return None
    if not Path(folder).exists():
        tqdm.write(f"ndm-fast: {folder} is gone: the model is run instead", file=sys.stderr)
        return None
    cache = ActivationCache(folder, partial=config.run.partial)
    for field in dataclasses.fields(HarvestConfig):
        had, harvested = getattr(config.harvest, field.name), getattr(cache.config, field.name)
        if field.name not in _FREE and had != harvested:
            raise InputError(
                f"{folder} was harvested anew ({field.name} is {harvested!r}, for the run it was {had!r}): "
                "move it away, and the model is run instead"
            )
    held = held_rows(cache.manifest)
    if held < rows and held >= cache.manifest["rows"]:  # else the text ended
        tqdm.write(
            f"ndm-fast: {folder} holds {held:,} activations of {rows:,}: the model is run instead",
            file=sys.stderr,
        )
        return None
    return cache
