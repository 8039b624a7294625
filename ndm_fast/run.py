"""A run on disk: settings, log, checkpoint and result in one folder, and the way from settings to result."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ndm_fast.checkpoint import load_checkpoint, save_checkpoint, unwritable, write_atomic
from ndm_fast.config import RunConfig, from_flat
from ndm_fast.errors import InputError, StoppedError
from ndm_fast.harvest import ActivationStream, load_model
from ndm_fast.partition import SubspacePartition
from ndm_fast.sites import resolve_sites
from ndm_fast.text import open_documents
from ndm_fast.trainer import Observer, Trainer

_PACKAGES = ("ndm-fast", "torch", "transformers", "tokenizers", "numpy", "safetensors", "triton")


class RunFolder:
    """Files of one run.

    ``config.json`` settings and versions, ``log.jsonl`` events, ``checkpoint.safetensors`` the last state,
    ``partition/`` the result for ``SubspacePartition.from_pretrained``, ``result.json`` its figures.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.json"
        self.log_file = self.path / "log.jsonl"
        self.checkpoint_file = self.path / "checkpoint.safetensors"
        self.result_file = self.path / "result.json"
        self.partition_folder = self.path / "partition"
        self.purity_file = self.path / "purity.json"
        self.figures_folder = self.path / "figures"

    def begin(self, config: RunConfig, *, resume: bool) -> None:
        """Claim the folder for a run with these settings, or take up the run that is in it.

        Raises:
            InputError: the folder holds something else; nothing is changed then.
        """
        if self.config_file.exists():
            if not resume:
                raise InputError(
                    f"{self.path} holds a run already: pass --resume to go on with it, or another --out"
                )
            self._check_same(config)
            for leftover in self.path.glob(".*.tmp"):  # of a write that was killed
                leftover.unlink(missing_ok=True)
            return
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise InputError(f"{self.path} exists and is no run of ndm-fast: choose another --out")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(self.path, error) from None
        about = {"settings": config.flat(), "made_with": provenance()}
        write_atomic(self.config_file, _json(about))

    def config(self) -> RunConfig:
        """The settings of the run in this folder."""
        settings = self._read(self.config_file).get("settings")
        if not isinstance(settings, dict):
            raise InputError(
                f"{self.config_file} is damaged (no settings): start the run anew in another folder"
            )
        return from_flat(settings)

    def partition(self) -> SubspacePartition:
        """The result of the run in this folder."""
        if not self.partition_folder.is_dir():
            self.config()  # says so if this is no run at all
            raise InputError(
                f"{self.path} has no result yet: finish it with `ndm-fast train --out {self.path} --resume`"
            )
        return SubspacePartition.from_pretrained(self.partition_folder)

    def result(self) -> dict[str, Any]:
        """``result.json`` of a finished run."""
        self.partition()
        return self._read(self.result_file)

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        """Lines of the log, all or those of one kind."""
        if not self.log_file.exists():
            raise InputError(f"{self.log_file} is missing: {self.path} is no run, or has not started")
        records = [json.loads(line) for line in self.log_file.read_text().splitlines() if line.endswith("}")]
        return [record for record in records if kind is None or record["event"] == kind]

    def checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The saved state, or None before the first checkpoint."""
        return load_checkpoint(self.checkpoint_file) if self.checkpoint_file.exists() else None

    def save_result(self, partition: SubspacePartition, figures: dict[str, Any]) -> None:
        """Write partition and figures; ``result.json`` comes last and marks the run as complete."""
        try:
            partition.save_pretrained(self.partition_folder)
        except OSError as error:
            raise unwritable(self.partition_folder, error) from None
        write_atomic(self.result_file, _json(figures))

    def _check_same(self, config: RunConfig) -> None:
        saved, asked = self.config().flat(), config.flat()
        differing = [name for name in asked if asked[name] != saved[name]]
        if differing:
            name = differing[0]
            raise InputError(
                f"{self.path} holds a run with other settings ({name} is {saved[name]!r}, asked for "
                f"{asked[name]!r}): choose another --out, or leave the settings away to go on with it"
            )

    def _read(self, file: Path) -> dict[str, Any]:
        try:
            content = json.loads(file.read_text())
        except FileNotFoundError:
            raise InputError(f"{file} is missing: {self.path} is no run of ndm-fast") from None
        except (OSError, ValueError) as error:
            raise InputError(f"{file} is damaged ({error}): start the run anew in another folder") from None
        if not isinstance(content, dict):
            raise InputError(f"{file} is damaged (no object): start the run anew in another folder")
        return content


class _Recorder(Observer):
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
        self.stop = False

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

    def stop_requested(self) -> bool:
        return self.stop

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
    """Train every site of ``config`` and save the results.

    Args:
        out: the run's folder; with several sites, the folder of one run folder per site.
        resume: go on with what is there; start where there is nothing.

    Raises:
        InputError: something about the input is wrong; nothing was overwritten.
        StoppedError: Ctrl-C or SIGTERM; the state is saved.
    """
    if not config.harvest.site:
        raise InputError("no site given: pass --site, for instance blocks.3.hook_resid_post")
    model, tokenizer = load_model(config.harvest.model, config.harvest.dtype, device)
    sites = resolve_sites(model, list(config.harvest.site))
    documents = open_documents(config.harvest.data, config.harvest.text_field, config.train.seed)
    folders = []
    for asked, site in zip(config.harvest.site, sites, strict=True):
        one = dataclasses.replace(config, harvest=dataclasses.replace(config.harvest, site=(asked,)))
        folder = RunFolder(out if len(sites) == 1 else Path(out) / site.name)
        stream = ActivationStream(model, tokenizer, site.name, documents, one.harvest)
        one.train.widths(stream.width)
        folder.begin(one, resume=resume)
        if not folder.result_file.exists():
            _train_one(one, folder, stream, device, show_progress)
        folders.append(folder)
    return folders


def _train_one(
    config: RunConfig, folder: RunFolder, stream: ActivationStream, device: str, show: bool
) -> None:
    state = folder.checkpoint()
    train = config.train
    rows = (
        train.heldout_queries
        + train.heldout_keys
        + min(train.pool_rows, train.max_steps * train.queries + train.keys)
    )
    counted = _Counted(stream, rows, show)
    source = {"model": config.harvest.model, "site": stream.site, "data": config.harvest.data}
    try:
        trainer = Trainer(counted, train, config.merge, device=device, source=source, state=state)
    finally:
        counted.close()
    recorder = _Recorder(folder, state[1]["log_bytes"] if state else 0, trainer.step, train.max_steps, show)
    try:
        with _stop_on_signal(recorder):
            partition = trainer.run(recorder)
    finally:
        recorder.close()
    if not trainer.finished:
        raise StoppedError(
            f"stopped at step {trainer.step}, state saved: go on with "
            f"`ndm-fast train --out {folder.path} --resume`"
        )
    folder.save_result(partition, _figures(trainer, partition, stream))


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
def _stop_on_signal(recorder: _Recorder) -> Iterator[None]:
    """Ctrl-C and SIGTERM ask for a stop at the next step; a second Ctrl-C interrupts at once."""

    def ask(number: int, frame: FrameType | None) -> None:
        recorder.stop = True
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


def provenance() -> dict[str, Any]:
    """Versions, commit, machine and threads that a result was made with."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "versions": {"python": platform.python_version(), **versions},
        "commit": _commit(),
        "machine": platform.platform(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _commit() -> str | None:
    """Commit of the source tree that the package runs from, with ``-dirty`` where it was changed."""
    folder = Path(__file__).resolve().parents[1]
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
