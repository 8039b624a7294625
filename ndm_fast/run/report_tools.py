"""TensorBoard, trackio and W&B as reporters of a run; each package is imported when a run begins."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PROJECT = "ndm-fast"
"""Where runs are shown, unless TRACKIO_PROJECT or WANDB_PROJECT says otherwise."""


class Tensorboard:
    """Event files in ``RUN/tensorboard``.

    A run that goes on writes another file, which starts by taking back the steps after the checkpoint.
    """

    def begin(self, folder: str, hyperparameters: Mapping[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        back_to = step + 1 if step else 0
        self._writer: Any = SummaryWriter(str(Path(folder) / "tensorboard"), purge_step=back_to)
        if not step:
            lines = [f"| {name} | {value} |" for name, value in hyperparameters.items()]
            self._writer.add_text("settings", "\n".join(["| setting | value |", "|---|---|", *lines]), 0)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # a checkpoint may follow, and a kill

    def finish(self) -> None:
        self._writer.close()


class _Told:
    """How a run is called in a tool, and up to which step the tool knows it: ``RUN/TOOL.told``."""

    def __init__(self, folder: str, tool: str) -> None:
        path = Path(folder) / f"{tool}.told"
        known, _, step = path.read_text().partition(" ") if path.exists() else ("", "", "")
        self.run = known or uuid.uuid4().hex[:12]
        self.until = int(step) if step.strip() else -1
        self._file = path.open("r+" if path.exists() else "w")
        self.note(self.until)

    def note(self, step: int) -> None:
        """The tool has been told of a step."""
        self._file.seek(0)
        self._file.write(f"{self.run} {step:>12}")  # always as long, and written at once
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class Trackio:
    """A run in trackio's local data base, or where TRACKIO_SPACE_ID says; it goes on under its name."""

    def begin(self, folder: str, hyperparameters: Mapping[str, Any], step: int) -> None:
        import trackio

        self._told = _Told(folder, "trackio")
        self._run: Any = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=f"{Path(folder).name}-{self._told.run}",
            config=dict(hyperparameters),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        if step > self._told.until:
            self._run.log(dict(values), step=step)
            self._told.note(step)

    def finish(self) -> None:
        self._told.close()
        self._run.finish()


class Wandb:
    """A W&B run, kept in ``RUN/wandb`` with WANDB_MODE=offline; it goes on under its id."""

    def begin(self, folder: str, hyperparameters: Mapping[str, Any], step: int) -> None:
        import wandb

        self._told = _Told(folder, "wandb")
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=self._told.run,
            name=Path(folder).name,
            config=dict(hyperparameters),
            resume="allow",
            dir=folder,
        )

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        if step > self._told.until:
            self._run.log(dict(values), step=step)
            self._told.note(step)

    def finish(self) -> None:
        self._told.close()
        self._run.finish()
