"""How the result depends on keys, threshold and width of the units, for the same budget of steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ndm_fast.activations.rows import TensorStream, take_rows
from ndm_fast.config import RunConfig
from ndm_fast.drawing import draw_curves
from ndm_fast.errors import InputError
from ndm_fast.run.folder import RunFolder
from ndm_fast.run.source import run_stream
from ndm_fast.train.trainer import Trainer

_BATCH = 1024


SETTINGS = ("keys", "merge_threshold", "unit_size")


def run_sensitivity(
    path: str | Path,
    *,
    keys: Sequence[int] = (),
    thresholds: Sequence[float] = (),
    units: Sequence[int] = (),
    steps: int | None = None,
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """Train once per value on the text and with the other settings of a run.

    Activations are harvested once, or read from the run's cache. All trainings take as many steps, and all
    losses are against the same held-out keys, whatever the number of keys in training.

    Args:
        keys, thresholds, units: values to try, each alone.
        steps: of each training; default the run's.

    Returns:
        A row per training: ``setting``, ``value``, ``subspaces``, ``widths``, ``heldout_loss``.

    Raises:
        InputError: no value to try; values that the settings do not allow.
    """
    tried = [("keys", k) for k in keys] + [("merge_threshold", t) for t in thresholds]
    tried += [("unit_size", u) for u in units]
    if not tried:
        raise InputError("nothing to vary: give --keys, --thresholds or --units")
    config = RunFolder(path).config()
    plans = [_plan(config, name, value, steps or config.train.max_steps) for name, value in tried]
    stream = _harvest(config, plans, device)
    rows = []
    for (name, value), plan in zip(tried, plans, strict=True):
        trainer = Trainer(stream, plan.train, plan.merge, plan.run, device=device)
        trainer.run()
        rows.append(
            {
                "setting": name,
                "value": value,
                "subspaces": len(trainer.widths),
                "heldout_loss": trainer.heldout_loss,
                "widths": list(trainer.widths),
            }
        )
    return rows


def _plan(config: RunConfig, name: str, value: float, steps: int) -> RunConfig:
    """The run's settings with one changed; its schedule shortened to the steps."""
    share = steps / config.train.max_steps
    merge_start = config.merge.merge_start
    train = dataclasses.replace(config.train, max_steps=steps)
    run = dataclasses.replace(config.run, eval_every=steps, checkpoint_every=steps)
    merge = dataclasses.replace(
        config.merge,
        merge_start=None if merge_start is None else max(1, round(merge_start * share)),
        merge_interval=max(1, round(config.merge.merge_interval * share)),
    )
    if name == "merge_threshold":
        return RunConfig(config.harvest, train, dataclasses.replace(merge, merge_threshold=value), run)
    changed: dict[str, Any] = {name: int(value)}
    return RunConfig(config.harvest, dataclasses.replace(train, **changed), merge, run)


def _harvest(config: RunConfig, plans: Sequence[RunConfig], device: str) -> TensorStream:
    needed = max(
        p.train.heldout_queries
        + p.train.heldout_keys
        + p.train.rows_held
        + p.train.max_steps * p.train.queries
        for p in plans
    )
    needed += 2 * _BATCH
    stream = run_stream(config, needed, device)
    return TensorStream(take_rows(stream.batches(), needed)[0].split(_BATCH))


def draw_sensitivity(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Loss and number of subspaces against every setting that was varied.

    Args:
        rows: as from :func:`run_sensitivity`. path: .png or .svg.
    """
    panels = []
    for setting in SETTINGS:
        chosen = sorted((row for row in rows if row["setting"] == setting), key=lambda row: row["value"])
        for measure, label in (("heldout_loss", "held-out loss"), ("subspaces", "subspaces at the end")):
            if chosen:
                panels.append(
                    {
                        "title": setting.replace("_", " "),
                        "x": [row["value"] for row in chosen],
                        "y": [row[measure] for row in chosen],
                        "xlabel": setting.replace("_", " "),
                        "ylabel": label,
                    }
                )
    draw_curves(panels, path)
