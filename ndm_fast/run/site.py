"""One site of a run: train, evaluate, save."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from ndm_fast.activations.cache import CachedActivations
from ndm_fast.activations.pool_storage import memory_line
from ndm_fast.activations.rows import SiteStream
from ndm_fast.config import RunConfig
from ndm_fast.errors import StoppedError
from ndm_fast.partition import SubspacePartition
from ndm_fast.ranks import Group, launched
from ndm_fast.run.checkpoint import Checkpoint
from ndm_fast.run.folder import RunFolder
from ndm_fast.run.progress import Counted, Progress
from ndm_fast.run.recorder import Recorder, Stoppable
from ndm_fast.run.reporters import Reporter, Reports
from ndm_fast.run.row_stream import RowStream
from ndm_fast.signals import stop_on_signal
from ndm_fast.train.trainer import Trainer

ACTIVATIONS = "activations"
"""Folder below that of several sites' runs in which they share what was harvested."""


@dataclass(frozen=True)
class SiteRun:
    """One site to train."""

    config: RunConfig
    """Settings of this site's run alone."""
    folder: RunFolder
    stream: SiteStream
    report_to: Sequence[Reporter] = ()


def standing(folder: RunFolder) -> tuple[bool, Checkpoint | None]:
    """Whether there is a result already, and if not, the checkpoint to go on from."""
    done = folder.result_file.exists()
    return done, None if done else folder.checkpoint()


def train_one(
    run: SiteRun,
    saved: Checkpoint | None,
    number: int,
    progress: Progress,
    device: str,
    group: Group,
    *,
    several: bool,
) -> None:
    """Train one site from a checkpoint, or from the start."""
    trainer = _ready(run, saved, progress, device, group)
    try:
        progress.begin(number, run.stream.site, trainer.step)
        partition = _recorded(trainer, run, saved.log_bytes if saved else 0, progress)
    finally:
        trainer.pool.close()
    if not trainer.finished:
        alone = launched().size == 1 and not several
        again = (
            f"`ndm-fast train --out {run.folder.path} --resume`" if alone else "the same command and --resume"
        )
        raise StoppedError(f"stopped at step {trainer.step}, state saved: go on with {again}")
    figures = _figures(trainer, partition, run.stream)
    if group.all.rank == 0:
        run.folder.save_result(partition, figures)


def _ready(run: SiteRun, saved: Checkpoint | None, progress: Progress, device: str, group: Group) -> Trainer:
    """A trainer with its pool filled, which is shown."""
    config, stream, train = run.config, run.stream, run.config.train
    if progress.show:
        held = -(-train.rows_held // group.keys.size)
        line = memory_line(held, stream.width, getattr(torch, train.pool_dtype), device)
        tqdm.write(line, file=sys.stderr)
    rows = train.heldout_queries + train.heldout_keys + train.rows_held
    doing = "read" if isinstance(stream, CachedActivations | RowStream) else "harvest"
    counted = Counted(stream, rows, doing, progress.show)
    source = _source(config, stream)
    begin = partial(Trainer.resumed, state=saved.state) if saved else Trainer
    try:
        trainer = begin(counted, train, config.merge, config.run, device=device, source=source, group=group)
        trainer.pool.fill()
    finally:
        counted.close()
    return trainer


def _source(config: RunConfig, stream: SiteStream) -> dict[str, Any]:
    """What is noted in the partition."""
    harvest = config.harvest
    if config.run.rows:
        return {"rows": config.run.rows}
    return {
        "model": harvest.model,
        "site": stream.site,
        "data": harvest.data,
        "harvest": harvest.how_read(),
    }


def _recorded(trainer: Trainer, run: SiteRun, log_bytes: int, progress: Progress) -> SubspacePartition:
    """Run a trainer, on rank 0 with log, reports and checkpoints, to its end or to a stop."""
    with stop_on_signal(alone=launched().size == 1) as stop:
        recorder = Stoppable(stop)
        if trainer.group.all.rank == 0:
            reports = Reports(run.report_to)
            recorder = Recorder(run.folder, log_bytes, progress, stop, reports)
            reports.begin(str(run.folder.path), run.config.flat(), trainer.step)
        try:
            return trainer.run(recorder)
        finally:
            recorder.close()


def _figures(trainer: Trainer, partition: SubspacePartition, stream: SiteStream) -> dict[str, Any]:
    """What ``result.json`` holds: per subspace width, share of variance and held-out distance."""
    variances = trainer.heldout.variances(trainer.rotation.matrix, trainer.widths)
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
