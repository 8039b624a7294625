"""The bar of a run."""

from __future__ import annotations

import re
from types import SimpleNamespace

from ndm_fast.run.progress import Progress


def test_no_loss_is_shown_before_there_is_one(capfd):
    """A run shorter than ``log_every`` ends without a training loss."""
    progress = Progress(1, 8, show=True)
    trainer = SimpleNamespace(train_loss=float("nan"), heldout_loss=0.25, widths=(4, 4), step=4)
    progress.begin(0, "x", 0)
    progress.update(trainer)
    trainer.train_loss, trainer.step = 0.5, 8
    progress.update(trainer)
    progress.close()
    shown = capfd.readouterr().err
    assert "nan" not in shown
    assert re.search(r"8/8 .*loss=0\.5000, heldout=0\.2500, subspaces=2", shown.replace("\r", "\n"))
