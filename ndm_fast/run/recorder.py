"""What a run writes while it trains: log, checkpoints, progress; and how it is told to stop."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

from ndm_fast.files import unwritable
from ndm_fast.run.checkpoint import Checkpoint, save_checkpoint
from ndm_fast.run.folder import RunFolder, log_line
from ndm_fast.run.progress import Progress
from ndm_fast.run.reporters import Reports
from ndm_fast.train.trainer import Observer, Trainer


class Stoppable(Observer):
    """Stops a run when told to; on ranks other than the first it does nothing else."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop

    def stop_requested(self) -> bool:
        return self._stop.is_set()

    def close(self) -> None:
        """Nothing more will come."""


class Recorder(Stoppable):
    """Writes log and checkpoints of a run, and tells its reporters."""

    def __init__(
        self, folder: RunFolder, log_bytes: int, progress: Progress, stop: threading.Event, reports: Reports
    ) -> None:
        super().__init__(stop)
        self._folder, self._progress, self._reports = folder, progress, reports
        try:
            self._log = folder.log_file.open("ab")
            self._log.truncate(min(log_bytes, self._log.tell()))
            self._log.seek(0, os.SEEK_END)
        except OSError as error:
            raise unwritable(folder.log_file, error) from None

    def event(self, record: dict[str, Any]) -> None:
        try:
            self._log.write(log_line({**record, "time": round(time.time(), 3)}))
        except OSError as error:
            raise unwritable(self._folder.log_file, error) from None
        self._reports.event(record)

    def progress(self, trainer: Trainer) -> None:
        self._progress.update(trainer)

    def checkpoint(self, trainer: Trainer) -> None:
        try:
            self._log.flush()
            os.fsync(self._log.fileno())  # the checkpoint counts on it
        except OSError as error:
            raise unwritable(self._folder.log_file, error) from None
        saved = Checkpoint(*trainer.state_dict(), self._log.tell())
        save_checkpoint(self._folder.checkpoint_file, saved)

    def close(self) -> None:
        self._reports.close()
        try:
            self._log.close()
        except OSError as error:
            raise unwritable(self._folder.log_file, error) from None
