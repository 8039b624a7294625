"""Files of a run: settings, log, checkpoint and result in one folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ndm_fast.config import RunConfig, from_flat
from ndm_fast.errors import InputError
from ndm_fast.files import digest, parse_json, read_json, sweep, unwritable, write_json
from ndm_fast.locks import Lock, is_trace, sweep_lock
from ndm_fast.partition import SubspacePartition
from ndm_fast.provenance import provenance
from ndm_fast.run.checkpoint import Checkpoint, load_checkpoint

_ANEW = "put back a copy, or start the run anew in another folder"

_RESULT = {
    "steps": int,
    "heldout_loss": float,
    "widths": [int],
    "variance_share": [object],  # NaN where nothing varies
    "heldout_distance": [float],
    "log_events": int,
}

_EVENTS: dict[str, dict[str, object]] = {
    "train": {"step": int, "loss": object},
    "evaluate": {"step": int, "heldout_loss": object, "by_subspace": [object], "widths": [int]},
    "merge": {"step": int, "mutual_information": [[object]], "pairs": [[int]], "widths_before": [int]},
    "escape": {"step": int, "kept": bool},
}
"""What readers of the log rely on."""


def log_line(record: Mapping[str, Any]) -> bytes:
    """A line of the log, with a checksum of all but its time."""
    timeless = {name: value for name, value in record.items() if name != "time"}
    return json.dumps({**record, "sum": _line_sum(timeless)}).encode() + b"\n"


def _line_sum(record: Mapping[str, Any]) -> str:
    return digest(json.dumps(record).encode())[:16]


def _parse_line(line: bytes) -> dict[str, Any]:
    record = parse_json(line, {"event": str}, seal=False)
    timeless = {name: value for name, value in record.items() if name not in ("time", "sum")}
    if record.pop("sum", None) != _line_sum(timeless):
        raise ValueError("its checksum does not match")
    parse_json(line, _EVENTS.get(record["event"], {}), seal=False)
    return record


class RunFolder:
    """Files of one run.

    ``config.json`` settings and versions, ``log.jsonl`` events, ``checkpoint.safetensors`` the last state,
    ``partition/`` the result for ``SubspacePartition.from_pretrained``, ``result.json`` its figures,
    ``rows.json`` what the file of a run with ``--rows`` held, ``preimages/`` activations with their tokens,
    ``report/`` the pages.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.json"
        self.log_file = self.path / "log.jsonl"
        self.checkpoint_file = self.path / "checkpoint.safetensors"
        self.result_file = self.path / "result.json"
        self.partition_folder = self.path / "partition"
        self.rows_file = self.path / "rows.json"
        self.purity_file = self.path / "purity.json"
        self.circuits_file = self.path / "circuits.json"
        self.figures_folder = self.path / "figures"
        self.index_folder = self.path / "preimages"
        self.report_folder = self.path / "report"
        self._lock: Lock | None = None

    def begin(self, config: RunConfig, *, resume: bool) -> None:
        """Claim the folder for a run with these settings, or take up the run that is in it.

        No other process can until :meth:`end`, or until this one dies; a finished run is not claimed.

        Raises:
            InputError: the folder holds something else, or another process has it; nothing is changed then.
        """
        if self.result_file.exists():
            self._refuse_other(config, resume)
            sweep(self.path)
            sweep_lock(self.path)
            return
        if not self.config_file.exists() and self.path.exists() and not self._is_free():
            raise InputError(f"{self.path} exists and is no run of ndm-fast: choose another --out")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(self.path, error) from None
        self._lock = Lock(self.path)
        try:
            self._begin_locked(config, resume)
        except InputError:
            self.end()
            raise

    def end(self) -> None:
        """Let other processes have the folder."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _begin_locked(self, config: RunConfig, resume: bool) -> None:
        begun = self.config_file.exists()
        if begun:
            self._refuse_other(config, resume)
        try:
            sweep(self.path)
        except OSError as error:
            raise unwritable(self.path, error) from None
        if not begun:
            about = {"settings": config.flat(), "made_with": provenance()}
            write_json(self.config_file, about, seal=True)

    def config(self) -> RunConfig:
        """The settings of the run in this folder."""
        return from_flat(self._read(self.config_file, {"settings": {str: object}})["settings"])

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
        return self._read(self.result_file, _RESULT)

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        """Lines of the log, all or those of one kind.

        Raises:
            InputError: there is none, or it is damaged.
        """
        if not self.log_file.exists():
            raise InputError(f"{self.log_file} is missing: {self.path} is no run, or has not started")
        records = []
        *lines, _ = self.log_file.read_bytes().split(b"\n")  # one that is being written, or was cut by a kill
        for number, line in enumerate(lines, 1):
            try:
                records.append(_parse_line(line))
            except ValueError as error:
                raise InputError(f"{self.log_file} is damaged at line {number} ({error}): {_ANEW}") from None
        if self.result_file.exists():
            written = self._read(self.result_file, _RESULT)["log_events"]
            if written != len(records):
                raise InputError(f"{self.log_file} is damaged ({len(records)} of {written} events): {_ANEW}")
        return [record for record in records if kind is None or record["event"] == kind]

    def checkpoint(self) -> Checkpoint | None:
        """The saved state, or None before the first checkpoint."""
        return load_checkpoint(self.checkpoint_file) if self.checkpoint_file.exists() else None

    def save_result(self, partition: SubspacePartition, figures: dict[str, Any]) -> None:
        """Write partition and figures; ``result.json`` comes last and marks the run as complete.

        Raises:
            InputError: nothing can be written, or someone took the folder away.
        """
        if not self.config_file.exists():
            raise InputError(f"{self.path} was removed while its run was going on: start the run anew")
        try:
            partition.save_pretrained(self.partition_folder)
        except OSError as error:
            raise unwritable(self.partition_folder, error) from None
        write_json(self.result_file, {**figures, "log_events": len(self.events())}, seal=True)

    def _is_free(self) -> bool:
        """Whether the folder holds nothing but what a process leaves that was killed at once."""
        return self.path.is_dir() and all(map(is_trace, self.path.iterdir()))

    def _refuse_other(self, config: RunConfig, resume: bool) -> None:
        """Refuse a run that is not to be resumed, or that has other settings."""
        if not resume:
            raise InputError(
                f"{self.path} holds a run already: pass --resume to go on with it, or another --out"
            )
        saved, asked = self.config().flat(), config.flat()
        differing = [name for name in asked if asked[name] != saved[name]]
        if differing:
            name = differing[0]
            raise InputError(
                f"{self.path} holds a run with other settings ({name} is {saved[name]!r}, asked for "
                f"{asked[name]!r}): choose another --out, or leave the settings away to go on with it"
            )

    def _read(self, file: Path, shape: Any) -> dict[str, Any]:
        try:
            return read_json(file, shape, remedy=_ANEW)
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"{file} is missing: {self.path} is no run of ndm-fast") from None
