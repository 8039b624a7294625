"""The way from settings to a result in a run folder."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ndm_fast.activation_cache import ActivationCache, CachedActivations
from ndm_fast.cached_runs import share_harvest, with_cache
from ndm_fast.checkpoint import save_checkpoint, unwritable
from ndm_fast.config import RunConfig
from ndm_fast.errors import InputError, StoppedError
from ndm_fast.harvest import ActivationStream, load_model, prepare_model
from ndm_fast.partition import SubspacePartition
from ndm_fast.pool import SiteStream, take_rows
from ndm_fast.pool_storage import memory_line
from ndm_fast.progress import Counted, Progress
from ndm_fast.run_folder import RunFolder
from ndm_fast.signals import stop_on_signal
from ndm_fast.split import split_space
from ndm_fast.text import open_documents
from ndm_fast.trainer import Observer, Trainer

ACTIVATIONS = "activations"
"""Folder below that of several sites' runs in which they share what was harvested."""


@dataclass(frozen=True)
class SiteRun:
    """One site to train."""

    config: RunConfig
    """Settings of this site's run alone."""
    folder: RunFolder
    stream: SiteStream


class _Recorder(Observer):
    """Writes log and checkpoints of a run."""

    def __init__(self, folder: RunFolder, log_bytes: int, progress: Progress, stop: threading.Event) -> None:
        self._folder, self._progress, self._stop = folder, progress, stop
        try:
            self._log = folder.log_file.open("ab")
            self._log.truncate(min(log_bytes, self._log.tell()))
            self._log.seek(0, os.SEEK_END)
        except OSError as error:
            raise unwritable(folder.log_file, error) from None

    def event(self, record: dict[str, Any]) -> None:
        try:
            self._log.write(json.dumps({**record, "time": round(time.time(), 3)}).encode() + b"\n")
        except OSError as error:
            raise unwritable(self._folder.log_file, error) from None

    def progress(self, trainer: Trainer) -> None:
        self._progress.update(trainer)

    def checkpoint(self, trainer: Trainer) -> None:
        try:
            self._log.flush()
        except OSError as error:
            raise unwritable(self._folder.log_file, error) from None
        tensors, values = trainer.state_dict()
        save_checkpoint(self._folder.checkpoint_file, tensors, {**values, "log_bytes": self._log.tell()})

    def stop_requested(self) -> bool:
        return self._stop.is_set()

    def close(self) -> None:
        try:
            self._log.close()
        except OSError as error:
            raise unwritable(self._folder.log_file, error) from None


def train_run(
    config: RunConfig,
    out: str | Path,
    *,
    resume: bool = False,
    device: str = "cpu",
    show_progress: bool = True,
    keep_activations: bool = False,
) -> list[RunFolder]:
    """Train every site of ``config`` and save the results.

    Several sites are harvested together, into ``out/activations``, and trained one after the other.

    Args:
        out: the run's folder; with several sites, the folder of one run folder per site.
        resume: go on with what is there; start where there is nothing.
        keep_activations: leave ``out/activations``, to train from it again.

    Raises:
        InputError: something about the input is wrong; nothing was overwritten.
        StoppedError: Ctrl-C or SIGTERM; the state is saved.
    """
    if config.train.acts:
        cache = ActivationCache(config.train.acts)
        config = with_cache(config, cache)
        cached = [cache.stream(site, repeat=config.harvest.repeat_data) for site in config.harvest.site]
        return train_sites(
            site_runs(config, cached, out, resume=resume), device=device, show_progress=show_progress
        )
    if not config.harvest.site:
        raise InputError("no site given: pass --site, for instance blocks.3.hook_resid_post")
    model, tokenizer = load_model(config.harvest.model, config.harvest.dtype, device)
    prepare_model(model, config.harvest)
    documents = open_documents(config.harvest.data, config.harvest.text_field, config.documents_seed)
    streams = [
        ActivationStream(model, tokenizer, site, documents, config.harvest) for site in config.harvest.site
    ]
    runs = site_runs(config, streams, out, resume=resume)
    folder = Path(out) / ACTIVATIONS
    open_runs = sum(not run.folder.result_file.exists() for run in runs)
    shared = None
    if open_runs > 1 or (open_runs and len(runs) > 1 and folder.exists()):
        shared = share_harvest(config, model, tokenizer, folder, show_progress=show_progress)
    if shared is not None:
        runs = [dataclasses.replace(run, stream=shared.stream(run.stream.site)) for run in runs]
    folders = train_sites(runs, device=device, show_progress=show_progress)
    if shared is not None and not keep_activations:
        shutil.rmtree(folder)
    return folders


def site_runs(
    config: RunConfig, streams: Sequence[SiteStream], out: str | Path, *, resume: bool = False
) -> list[SiteRun]:
    """A run per stream; their folders are claimed, or taken up.

    Args:
        config: ``harvest.site`` names the streams' sites in their order.
        out, resume: see :func:`train_run`.

    Raises:
        InputError: the settings do not fit an activation's width, or a folder holds something else.
    """
    for stream in streams:
        config.train.widths(stream.width)
    runs = []
    for asked, stream in zip(config.harvest.site, streams, strict=True):
        one = dataclasses.replace(config, harvest=dataclasses.replace(config.harvest, site=(asked,)))
        folder = RunFolder(out if len(streams) == 1 else Path(out) / stream.site)
        folder.begin(one, resume=resume)
        runs.append(SiteRun(one, folder, stream))
    return runs


def train_sites(
    runs: Sequence[SiteRun], *, device: str = "cpu", show_progress: bool = True
) -> list[RunFolder]:
    """Train what is not finished, one after the other, with one progress bar.

    With several processes, one harvests a cache, and each then trains its share, ``runs[rank::world]``, which
    may be none.

    Raises:
        InputError, StoppedError: see :func:`train_run`.
    """
    if not runs:
        return []
    progress = Progress(len(runs), runs[0].config.train.max_steps, show_progress)
    try:
        for number, run in enumerate(runs):
            if not run.folder.result_file.exists():
                _train_one(run, number, progress, device, several=len(runs) > 1)
    finally:
        progress.close()
    return [run.folder for run in runs]


def _train_one(run: SiteRun, number: int, progress: Progress, device: str, *, several: bool) -> None:
    config, folder, stream = run.config, run.folder, run.stream
    state = folder.checkpoint()
    train = config.train
    pool_rows = min(train.pool_rows, train.max_steps * train.queries + train.keys)
    rows = train.heldout_queries + train.heldout_keys + pool_rows
    if progress.show:
        dtype = getattr(torch, train.pool_dtype)
        tqdm.write(memory_line(pool_rows, stream.width, dtype, device), file=sys.stderr)
    doing = "read" if isinstance(stream, CachedActivations) else "harvest"
    counted = Counted(stream, rows, doing, progress.show)
    source = {"model": config.harvest.model, "site": stream.site, "data": config.harvest.data}
    splits = _Events()
    try:
        first = _split_first(config, counted, rows, device, splits) if train.mode == "split" else None
        if first:
            train = dataclasses.replace(train, start="identity", initial_widths=first.widths)
        rows_of = _Rotated(counted, first) if first else counted
        trainer = Trainer(rows_of, train, config.merge, device=device, source=source, state=state)
    finally:
        counted.close()
    try:
        progress.begin(number, stream.site, trainer.step)
        partition = _recorded(trainer, folder, state[1]["log_bytes"] if state else 0, splits, progress)
    finally:
        trainer.pool.close()
    if not trainer.finished:
        again = (
            "the same command and --resume" if several else f"`ndm-fast train --out {folder.path} --resume`"
        )
        raise StoppedError(f"stopped at step {trainer.step}, state saved: go on with {again}")
    if first:
        partition = SubspacePartition(first.rotation @ partition.rotation, partition.widths, source)
    folder.save_result(partition, _figures(trainer, partition, stream))


def _recorded(
    trainer: Trainer, folder: RunFolder, log_bytes: int, splits: _Events, progress: Progress
) -> SubspacePartition:
    """Run a trainer, with log and checkpoints, to its end or to a stop."""
    with stop_on_signal() as stop:
        recorder = _Recorder(folder, log_bytes, progress, stop)
        try:
            for event in [] if log_bytes else splits.records:
                recorder.event(event)
            return trainer.run(recorder)
        finally:
            recorder.close()


class _Events(Observer):
    """Keeps what it is told until there is a log."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def event(self, record: dict[str, Any]) -> None:
        self.records.append(record)


@dataclass(frozen=True)
class _Rotated:
    """A stream in the coordinates of a partition."""

    stream: Counted
    partition: SubspacePartition

    def batches(self, start: int = 0) -> Iterator[Tensor]:
        rotation = self.partition.rotation
        for rows in self.stream.batches(start):
            yield self.partition.rotate(rows.to(rotation))


def _split_first(
    config: RunConfig, stream: Counted, rows: int, device: str, observer: Observer
) -> SubspacePartition:
    """Split the space of a run's first activations; a resumed run does so again, to the same result."""
    activations, _ = take_rows(stream.batches(), rows)
    return split_space(activations.to(device, torch.float32), config.train, config.merge, observer)


def _figures(trainer: Trainer, partition: SubspacePartition, stream: SiteStream) -> dict[str, Any]:
    """What ``result.json`` holds: per subspace width, share of variance and held-out distance."""
    variances = trainer.heldout_variances()
    return {
        "steps": trainer.step,
        "heldout_loss": trainer.heldout_loss,
        "widths": list(partition.widths),
        "variance_share": (variances / variances.sum()).tolist(),
        "heldout_distance": trainer.heldout_distance().tolist(),
        "orthogonality_error": partition.orthogonality_error(),
        "outliers_dropped": stream.outliers_dropped,
    }
