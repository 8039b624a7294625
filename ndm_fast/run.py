"""The way from settings to a result in a run folder."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ndm_fast.checkpoint import save_checkpoint, unwritable
from ndm_fast.config import RunConfig
from ndm_fast.errors import InputError, StoppedError
from ndm_fast.harvest import ActivationStream, load_model
from ndm_fast.partition import SubspacePartition
from ndm_fast.pool import take_rows
from ndm_fast.ranks import Group, launched
from ndm_fast.run_folder import RunFolder
from ndm_fast.sites import resolve_sites
from ndm_fast.split import split_space
from ndm_fast.text import open_documents
from ndm_fast.trainer import Observer, Trainer

State = tuple[dict[str, Tensor], dict[str, Any]]


class _Stoppable(Observer):
    """Stops a run when told to; on ranks other than the first it does nothing else."""

    stop = False

    def stop_requested(self) -> bool:
        return self.stop

    def close(self) -> None:
        """Nothing more will come."""


class _Recorder(_Stoppable):
    """Writes log, checkpoints and progress bar of a run."""

    def __init__(self, folder: RunFolder, log_bytes: int, steps_done: int, total: int, show: bool) -> None:
        self._folder = folder
        try:
            self._log = folder.log_file.open("ab")
            self._log.truncate(min(log_bytes, self._log.tell()))
            self._log.seek(0, os.SEEK_END)
        except OSError as error:
            raise unwritable(folder.log_file, error) from None
        self._bar = tqdm(total=total, initial=steps_done, desc="train", unit="step", disable=not show)
        self._started = time.monotonic()

    def event(self, record: dict[str, Any]) -> None:
        try:
            self._log.write(json.dumps({**record, "time": round(time.time(), 3)}).encode() + b"\n")
        except OSError as error:
            raise unwritable(self._folder.log_file, error) from None

    def progress(self, trainer: Trainer) -> None:
        self._bar.set_postfix(
            loss=f"{trainer.train_loss:.4f}",
            heldout=f"{trainer.heldout_loss:.4f}",
            subspaces=len(trainer.widths),
            refresh=False,
        )
        self._bar.update(trainer.step - self._bar.n)

    def checkpoint(self, trainer: Trainer) -> None:
        try:
            self._log.flush()
        except OSError as error:
            raise unwritable(self._folder.log_file, error) from None
        tensors, values = trainer.state_dict()
        save_checkpoint(self._folder.checkpoint_file, tensors, {**values, "log_bytes": self._log.tell()})

    def close(self) -> None:
        self._bar.close()
        try:
            self._log.close()
        except OSError as error:
            raise unwritable(self._folder.log_file, error) from None


class _Counted:
    """A stream that shows how many activations have come through it."""

    def __init__(self, stream: ActivationStream, total: int, show: bool) -> None:
        self._stream = stream
        self._bar = tqdm(total=total, desc="harvest", unit="activation", unit_scale=True, disable=not show)

    def batches(self, start: int = 0) -> Iterator[Tensor]:
        for rows in self._stream.batches(start):
            self._bar.update(len(rows))
            yield rows

    def close(self) -> None:
        self._bar.close()


def train_run(
    config: RunConfig,
    out: str | Path,
    *,
    resume: bool = False,
    device: str = "cpu",
    show_progress: bool = True,
) -> list[RunFolder]:
    """Train every site of ``config`` and save the results; under torchrun, together with the other ranks.

    Args:
        out: the run's folder; with several sites, the folder of one run folder per site.
        resume: go on with what is there; start where there is nothing.

    Returns:
        The folders that this process wrote.

    Raises:
        InputError: something about the input is wrong; nothing was overwritten.
        StoppedError: Ctrl-C or SIGTERM; the state is saved.
        RanksError: another rank is gone.
    """
    if not config.harvest.site:
        raise InputError("no site given: pass --site, for instance blocks.3.hook_resid_post")
    model, tokenizer = load_model(config.harvest.model, config.harvest.dtype, device)
    sites = resolve_sites(model, list(config.harvest.site))
    documents = open_documents(config.harvest.data, config.harvest.text_field, config.train.seed)
    launch = launched()
    shared = launch.shared(config.train.parallel, len(sites))
    several = len(sites) * launch.size > 1
    tasks = list(zip(config.harvest.site, sites, strict=True))
    if shared == "sites":
        tasks = tasks[launch.rank :: launch.size]
    folders = []
    with _group(shared, device) as group:
        for asked, site in tasks:
            one = dataclasses.replace(config, harvest=dataclasses.replace(config.harvest, site=(asked,)))
            folder = RunFolder(out if len(sites) == 1 else Path(out) / site.name)
            stream = ActivationStream(model, tokenizer, site.name, documents, one.harvest)
            one.train.widths(stream.width)
            done, state = group.all.first(partial(_take_up, folder, one, resume))
            if not done:
                show = show_progress and launch.rank == 0
                _train_one(one, folder, stream, device, show, state, group, several=several)
            if group.all.rank == 0:
                folders.append(folder)
    return folders


def _group(shared: str, device: str) -> AbstractContextManager[Group]:
    """The ranks that train each site together."""
    if shared == "sites" or launched().size == 1:
        return nullcontext(Group())
    from ndm_fast.distributed import together  # one process has no use for torch.distributed

    return together(shared, device)


def _take_up(folder: RunFolder, config: RunConfig, resume: bool) -> tuple[bool, State | None]:
    """Claim a run's folder; whether there is a result already, and if not, the state to go on from."""
    folder.begin(config, resume=resume)
    done = folder.result_file.exists()
    return done, None if done else folder.checkpoint()


def _train_one(
    config: RunConfig,
    folder: RunFolder,
    stream: ActivationStream,
    device: str,
    show: bool,
    state: State | None,
    group: Group,
    *,
    several: bool,
) -> None:
    """Train one site from a state, or from the start.

    Args:
        several: whether the command is about more than this site or this process.
    """
    train = config.train
    rows = (
        train.heldout_queries
        + train.heldout_keys
        + min(train.pool_rows, train.max_steps * train.queries + train.keys)
    )
    counted = _Counted(stream, rows, show)
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
    recorder: _Stoppable = _Stoppable()
    if group.all.rank == 0:
        log_bytes = state[1]["log_bytes"] if state else 0
        recorder = _Recorder(folder, log_bytes, trainer.step, train.max_steps, show)
    try:
        for event in [] if state else splits.records:
            recorder.event(event)
        with _stop_on_signal(recorder, alone=launched().size == 1):
            partition = trainer.run(recorder)
    finally:
        recorder.close()
    if not trainer.finished:
        again = (
            "the same command and --resume" if several else f"`ndm-fast train --out {folder.path} --resume`"
        )
        raise StoppedError(f"stopped at step {trainer.step}, state saved: go on with {again}")
    if first:
        partition = SubspacePartition(first.rotation @ partition.rotation, partition.widths, source)
    figures = _figures(trainer, partition, stream)
    if group.all.rank == 0:
        folder.save_result(partition, figures)


class _Events(Observer):
    """Keeps what it is told until there is a log."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def event(self, record: dict[str, Any]) -> None:
        self.records.append(record)


@dataclass(frozen=True)
class _Rotated:
    """A stream in the coordinates of a partition."""

    stream: _Counted
    partition: SubspacePartition

    def batches(self, start: int = 0) -> Iterator[Tensor]:
        rotation = self.partition.rotation
        for rows in self.stream.batches(start):
            yield self.partition.rotate(rows.to(rotation))


def _split_first(
    config: RunConfig, stream: _Counted, rows: int, device: str, observer: Observer
) -> SubspacePartition:
    """Split the space of a run's first activations; a resumed run does so again, to the same result."""
    activations, _ = take_rows(stream.batches(), rows)
    return split_space(activations.to(device, torch.float32), config.train, config.merge, observer)


def _figures(trainer: Trainer, partition: SubspacePartition, stream: ActivationStream) -> dict[str, Any]:
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


@contextmanager
def _stop_on_signal(recorder: _Stoppable, *, alone: bool) -> Iterator[None]:
    """Ctrl-C and SIGTERM ask for a stop at the next step; a second Ctrl-C interrupts at once.

    Not where torchrun passes every Ctrl-C on to processes that the terminal has told already.
    """

    def ask(number: int, frame: FrameType | None) -> None:
        recorder.stop = True
        if alone:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread, where signals cannot be caught
        previous = {}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
