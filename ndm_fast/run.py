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
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
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
from ndm_fast.ranks import Group, Launch, launched
from ndm_fast.run_folder import RunFolder
from ndm_fast.signals import stop_on_signal
from ndm_fast.split import split_space
from ndm_fast.text import open_documents
from ndm_fast.trainer import Observer, Trainer

ACTIVATIONS = "activations"
"""Folder below that of several sites' runs in which they share what was harvested."""

State = tuple[dict[str, Tensor], dict[str, Any]]


@dataclass(frozen=True)
class SiteRun:
    """One site to train."""

    config: RunConfig
    """Settings of this site's run alone."""
    folder: RunFolder
    stream: SiteStream


class _Stoppable(Observer):
    """Stops a run when told to; on ranks other than the first it does nothing else."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop

    def stop_requested(self) -> bool:
        return self._stop.is_set()

    def close(self) -> None:
        """Nothing more will come."""


class _Recorder(_Stoppable):
    """Writes log and checkpoints of a run."""

    def __init__(self, folder: RunFolder, log_bytes: int, progress: Progress, stop: threading.Event) -> None:
        super().__init__(stop)
        self._folder, self._progress = folder, progress
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
    """Train every site of ``config`` and save the results; under torchrun, together with the other ranks.

    Several sites are harvested together, into ``out/activations``, and trained one after the other.

    Args:
        out: the run's folder; with several sites, the folder of one run folder per site.
        resume: go on with what is there; start where there is nothing.
        keep_activations: leave ``out/activations``, to train from it again.

    Returns:
        The folders that this process wrote.

    Raises:
        InputError: something about the input is wrong; nothing was overwritten.
        StoppedError: Ctrl-C or SIGTERM; the state is saved.
        RanksError: another rank is gone.
    """
    launch = launched()
    if config.train.acts:
        cache = ActivationCache(config.train.acts)
        config = with_cache(config, cache)
        cached = [cache.stream(site, repeat=config.harvest.repeat_data) for site in config.harvest.site]
        return _train_streams(config, cached, out, launch, resume, device, show_progress)
    if not config.harvest.site:
        raise InputError("no site given: pass --site, for instance blocks.3.hook_resid_post")
    model, tokenizer = load_model(config.harvest.model, config.harvest.dtype, device)
    prepare_model(model, config.harvest)
    documents = open_documents(config.harvest.data, config.harvest.text_field, config.documents_seed)
    streams: list[SiteStream] = [
        ActivationStream(model, tokenizer, site, documents, config.harvest) for site in config.harvest.site
    ]
    if launch.size > 1:  # each rank runs the model: to run it once, harvest first, and train --acts
        return _train_streams(config, streams, out, launch, resume, device, show_progress)
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


def _train_streams(
    config: RunConfig,
    streams: Sequence[SiteStream],
    out: str | Path,
    launch: Launch,
    resume: bool,
    device: str,
    show_progress: bool,
) -> list[RunFolder]:
    """Train this process's share of the sites, alone or with the other ranks."""
    shared = launch.shared(config.train.parallel, len(streams))
    share = slice(launch.rank, None, launch.size) if shared == "sites" else slice(None)
    with _group(shared, launch, device) as group:
        runs = site_runs(config, streams, out, resume=resume, share=share, group=group)
        return train_sites(runs, device=device, show_progress=show_progress and launch.rank == 0, group=group)


def _group(shared: str, launch: Launch, device: str) -> AbstractContextManager[Group]:
    """The ranks that train each site together."""
    if shared == "sites" or launch.size == 1:
        return nullcontext(Group())
    from ndm_fast.distributed import together  # one process has no use for torch.distributed

    return together(shared, device)


def site_runs(
    config: RunConfig,
    streams: Sequence[SiteStream],
    out: str | Path,
    *,
    resume: bool = False,
    share: slice = slice(None),
    group: Group | None = None,
) -> list[SiteRun]:
    """A run per stream; their folders are claimed, or taken up.

    Args:
        config: ``harvest.site`` names the streams' sites in their order.
        out, resume: see :func:`train_run`.
        share: which of the streams are this process's.
        group: the ranks that train each of them together.

    Raises:
        InputError: the settings do not fit an activation's width, or a folder holds something else.
    """
    ranks = (group or Group()).all
    for stream in streams:
        config.train.widths(stream.width)
    runs = []
    for asked, stream in list(zip(config.harvest.site, streams, strict=True))[share]:
        one = dataclasses.replace(config, harvest=dataclasses.replace(config.harvest, site=(asked,)))
        folder = RunFolder(out if len(streams) == 1 else Path(out) / stream.site)
        ranks.first(partial(folder.begin, one, resume=resume))
        runs.append(SiteRun(one, folder, stream))
    return runs


def train_sites(
    runs: Sequence[SiteRun],
    *,
    device: str = "cpu",
    show_progress: bool = True,
    group: Group | None = None,
) -> list[RunFolder]:
    """Train what is not finished, one after the other, with one progress bar.

    Args:
        runs: of this process; may be none.
        group: the ranks that train each of them together.

    Returns:
        The folders that this process wrote.

    Raises:
        InputError, StoppedError, RanksError: see :func:`train_run`.
    """
    if not runs:
        return []
    group = group or Group()
    progress = Progress(len(runs), runs[0].config.train.max_steps, show_progress)
    try:
        for number, run in enumerate(runs):
            done, state = group.all.first(partial(_standing, run.folder))
            if not done:
                _train_one(run, state, number, progress, device, group, several=len(runs) > 1)
    finally:
        progress.close()
    return [run.folder for run in runs if group.all.rank == 0]


def _standing(folder: RunFolder) -> tuple[bool, State | None]:
    """Whether there is a result already, and if not, the state to go on from."""
    done = folder.result_file.exists()
    return done, None if done else folder.checkpoint()


def _train_one(
    run: SiteRun,
    state: State | None,
    number: int,
    progress: Progress,
    device: str,
    group: Group,
    *,
    several: bool,
) -> None:
    """Train one site from a state, or from the start."""
    config, folder, stream, train = run.config, run.folder, run.stream, run.config.train
    pool_rows = min(train.pool_rows, train.max_steps * train.queries + train.keys)
    rows = train.heldout_queries + train.heldout_keys + pool_rows
    if progress.show:
        dtype = getattr(torch, train.pool_dtype)
        held = -(-pool_rows // group.keys.size)
        tqdm.write(memory_line(held, stream.width, dtype, device), file=sys.stderr)
    doing = "read" if isinstance(stream, CachedActivations) else "harvest"
    counted = Counted(stream, rows, doing, progress.show)
    source = {"model": config.harvest.model, "site": stream.site, "data": config.harvest.data}
    splits = _Events()
    try:
        split = _split_first(config, counted, rows, device, splits) if train.mode == "split" else None
        first = group.all.first(lambda: split)
        if first:
            train = dataclasses.replace(train, start="identity", initial_widths=first.widths)
        rows_of = _Rotated(counted, first) if first else counted
        trainer = Trainer(
            rows_of, train, config.merge, device=device, source=source, state=state, group=group
        )
    finally:
        counted.close()
    try:
        progress.begin(number, stream.site, trainer.step)
        partition = _recorded(trainer, folder, state[1]["log_bytes"] if state else 0, splits, progress)
    finally:
        trainer.pool.close()
    if not trainer.finished:
        alone = launched().size == 1 and not several
        again = f"`ndm-fast train --out {folder.path} --resume`" if alone else "the same command and --resume"
        raise StoppedError(f"stopped at step {trainer.step}, state saved: go on with {again}")
    if first:
        partition = SubspacePartition(first.rotation @ partition.rotation, partition.widths, source)
    figures = _figures(trainer, partition, stream)
    if group.all.rank == 0:
        folder.save_result(partition, figures)


def _recorded(
    trainer: Trainer, folder: RunFolder, log_bytes: int, splits: _Events, progress: Progress
) -> SubspacePartition:
    """Run a trainer, on rank 0 with log and checkpoints, to its end or to a stop."""
    with stop_on_signal(alone=launched().size == 1) as stop:
        recorder = _Stoppable(stop)
        if trainer.group.all.rank == 0:
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
