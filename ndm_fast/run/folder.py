"""Files of a run: settings, log, checkpoint and result in one folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from ndm_fast.config import RunConfig, from_flat
from ndm_fast.errors import InputError
from ndm_fast.files import unwritable, write_json
from ndm_fast.partition import SubspacePartition
from ndm_fast.provenance import provenance
from ndm_fast.run.checkpoint import load_checkpoint


class RunFolder:
    """Files of one run.

    ``config.json`` settings and versions, ``log.jsonl`` events, ``checkpoint.safetensors`` the last state,
    ``partition/`` the result for ``SubspacePartition.from_pretrained``, ``result.json`` its figures,
    ``preimages/`` activations with their tokens, ``report/`` the pages.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.json"
        self.log_file = self.path / "log.jsonl"
        self.checkpoint_file = self.path / "checkpoint.safetensors"
        self.result_file = self.path / "result.json"
        self.partition_folder = self.path / "partition"
        self.purity_file = self.path / "purity.json"
        self.circuits_file = self.path / "circuits.json"
        self.figures_folder = self.path / "figures"
        self.index_folder = self.path / "preimages"
        self.report_folder = self.path / "report"

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
        write_json(self.config_file, about)

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
        write_json(self.result_file, figures)

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
