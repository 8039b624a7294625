"""One site of a run: train, evaluate, save."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ndm_fast.activations.cache import CachedActivations
from ndm_fast.activations.pool_storage import memory_line
from ndm_fast.activations.rows import SiteStream, take_rows
from ndm_fast.config import RunConfig
from ndm_fast.errors import StoppedError
from ndm_fast.partition import SubspacePartition
from ndm_fast.ranks import Group, launched
from ndm_fast.run.folder import RunFolder
from ndm_fast.run.progress import Counted, Progress
from ndm_fast.run.recorder import Events, Recorder, Stoppable
from ndm_fast.signals import stop_on_signal
from ndm_fast.train.split import split_space
from ndm_fast.train.trainer import Observer, Trainer

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


def standing(folder: RunFolder) -> tuple[bool, State | None]:
    """Whether there is a result already, and if not, the state to go on from."""
    done = folder.result_file.exists()
    return done, None if done else folder.checkpoint()


def train_one(
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
    splits = Events()
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
    trainer: Trainer, folder: RunFolder, log_bytes: int, splits: Events, progress: Progress
) -> SubspacePartition:
    """Run a trainer, on rank 0 with log and checkpoints, to its end or to a stop."""
    with stop_on_signal(alone=launched().size == 1) as stop:
        recorder = Stoppable(stop)
        if trainer.group.all.rank == 0:
            recorder = Recorder(folder, log_bytes, progress, stop)
        try:
            for event in [] if log_bytes else splits.records:
                recorder.event(event)
            return trainer.run(recorder)
        finally:
            recorder.close()


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
        "text_skipped": stream.text_skipped,
    }
