"""Training from the rows of a file, which need not be a language model's activations.

They come in a random order that the seed decides. What the file held is noted in the run's folder, as a run
that is resumed must find the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ndm_fast.activations.row_files import RowFile
from ndm_fast.config import RunConfig, TrainConfig
from ndm_fast.errors import InputError
from ndm_fast.files import read_json, write_json
from ndm_fast.run.source import generations
from ndm_fast.seeds import Draw, seeded

BATCH_ROWS = 1024


class RowStream:
    """Held-out rows first, then all others; these again and again in the same order where they may repeat.

    The order never changes, so no generation of the pool holds a row twice: a query would find itself.

    Args:
        file: where the rows are.
        train: what is held out, and the seed. repeat: start over at the end.

    Raises:
        InputError: there are too few rows for these settings.
    """

    site = ""
    outliers_dropped = 0

    def __init__(self, file: RowFile, train: TrainConfig, *, repeat: bool = False) -> None:
        self.file, self.width, self.text_skipped = file, file.width, dict[str, int]()
        self._repeat = repeat
        held = train.heldout_queries + train.heldout_keys
        self._check(train, held)
        order = torch.randperm(len(file), generator=seeded(train.seed, Draw.ROWS))
        self._heldout, self._others = order[:held].split(BATCH_ROWS), order[held:].split(BATCH_ROWS)

    def batches(self, start: int = 0) -> Iterator[Tensor]:
        """[n, d] rows, from batch number ``start`` on."""
        number = start
        while True:
            later = number - len(self._heldout)
            if later >= len(self._others) and not self._repeat:
                return
            index = self._heldout[number] if later < 0 else self._others[later % len(self._others)]
            yield self.file.take(index.sort().values)  # as they lie on the disk; the pool shuffles them
            number += 1

    def _check(self, train: TrainConfig, held: int) -> None:
        rows, pool = len(self.file), train.rows_held
        least = train.keys + train.queries * train.search_every
        where = f"{self.file.path} has {rows:,} rows: "
        if rows - held < min(pool, least):
            raise InputError(
                f"{where}{held:,} are held out and {min(pool, least):,} needed beside them, lower "
                "--heldout-keys, --heldout-queries or --keys"
            )
        if rows - held < pool:
            raise InputError(
                f"{where}beside {held:,} held out, {rows - held:,} are left for a pool of {pool:,}, pass "
                f"--pool-rows {rows - held}" + ("" if self._repeat else " --repeat-data")
            )
        # Every pool but the last reads whole batches.
        drawn = held + (generations(train) - 1) * -(-pool // BATCH_ROWS) * BATCH_ROWS + pool
        if not self._repeat and rows < drawn:
            raise InputError(
                f"{where}training reads up to {drawn:,}, pass --repeat-data to use them again, or lower "
                "--max-steps"
            )


def row_stream(config: RunConfig, *, show_progress: bool = False) -> RowStream:
    """The stream of a run with ``rows``.

    Raises:
        InputError: the file cannot be used, or a model, a site or a text is named beside it.
    """
    harvest = config.harvest
    others = {"model": harvest.model, "site": harvest.site, "data": harvest.data, "acts": config.run.acts}
    given = next((name for name, value in others.items() if value), None)
    if given is not None:
        raise InputError(f"--rows trains from a file alone: leave --{given} away, or --rows")
    file = RowFile(config.run.rows, show_progress=show_progress)
    return RowStream(file, config.train, repeat=harvest.repeat_data)


def note_rows(noted: Path, file: RowFile) -> None:
    """Note what a run is trained on, or compare it with what was noted.

    Args:
        noted: ``rows.json`` of the run's folder.

    Raises:
        InputError: the file holds something else than when the run began.
    """
    try:
        known = read_json(noted, {"content": str}, remedy="start the run anew in another folder")
    except FileNotFoundError:
        shape = [len(file), file.width]
        write_json(noted, {"file": file.path.name, "shape": shape, "content": file.sha256}, seal=True)
        return
    if known["content"] != file.sha256:
        raise InputError(
            f"{file.path} has changed since the run in {noted.parent} began: bring the rows back, or start "
            "anew in another --out"
        )
