"""Where the curves of a run are shown while it goes on, and what keeps the run from failures there."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, Protocol, runtime_checkable

from tqdm import tqdm

from ndm_fast.errors import InputError

TOOLS = ("tensorboard", "trackio", "wandb")
"""Names that ``--report-to`` knows."""


@runtime_checkable
class Reporter(Protocol):
    """Takes the curves of runs, one after the other: pass an object with these methods to ``train_run``.

    What a method raises ends the reporting with one line on stderr, never the run.
    """

    def begin(self, folder: str, hyperparameters: Mapping[str, Any], step: int) -> None:
        """A run begins, or goes on.

        Args:
            folder: of the run; the same one for a run that goes on.
            hyperparameters: all settings by name, plain JSON values.
            step: where it goes on; metrics after it that were told before are told again. 0: from the start.
        """

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Finite numbers by name, such as ``heldout/loss``; a step may come twice with other names."""

    def finish(self) -> None:
        """The run ended, or was stopped; after it the next may begin."""


def reporters(chosen: Sequence[str | Reporter]) -> tuple[Reporter, ...]:
    """Reporters by name, or as they are.

    Raises:
        InputError: a name is unknown, its package is missing, or something is no :class:`Reporter`.
    """
    return tuple(_named(one) if isinstance(one, str) else _checked(one) for one in chosen)


def _named(name: str) -> Reporter:
    if name not in TOOLS:
        raise InputError(f"unknown --report-to {name!r}: take one or more of {', '.join(TOOLS)}")
    try:
        import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
    except ImportError as error:
        raise InputError(
            f"--report-to {name} needs the package {name}, which cannot be imported "
            f"({str(error).splitlines()[0]}): pip install 'ndm-fast[{name}]'"
        ) from None
    from ndm_fast.run import report_tools

    tool: Reporter = getattr(report_tools, name.capitalize())()
    return tool


def _checked(one: Any) -> Reporter:
    if not isinstance(one, Reporter):
        raise InputError(f"{one!r} cannot be reported to: give it begin, metrics and finish, see Reporter")
    return one


class Reports:
    """Tells reporters of one run; one that fails is told no more."""

    def __init__(self, to: Sequence[Reporter]) -> None:
        self._to = list(to)

    def begin(self, folder: str, hyperparameters: Mapping[str, Any], step: int) -> None:
        """See :meth:`Reporter.begin`."""
        self._each("begin", folder, hyperparameters, step)

    def event(self, record: Mapping[str, Any]) -> None:
        """A line of the run's log."""
        if self._to and (values := metrics_of(record)):
            self._each("metrics", values, record["step"])

    def close(self) -> None:
        """Nothing more will come."""
        self._each("finish")
        self._to.clear()

    def _each(self, method: str, *arguments: Any) -> None:
        for one in list(self._to):
            try:
                getattr(one, method)(*arguments)
            except Exception as error:
                self._to.remove(one)
                said = (str(error) or type(error).__name__).splitlines()[0]
                tqdm.write(
                    f"ndm-fast: {type(one).__name__.lower()} takes no more of this run ({said}): it goes on "
                    "without; log.jsonl has everything",
                    file=sys.stderr,
                )


def metrics_of(record: Mapping[str, Any]) -> dict[str, float]:
    """What of a line of the log is a point of a curve: finite numbers alone."""
    kind = record["event"]
    if kind == "train":
        found = {"train/loss": record["loss"], "train/lr": record["lr"]}
    elif kind == "evaluate":
        found = {"heldout/loss": record["heldout_loss"], "subspaces": len(record["widths"])}
        if "stale_neighbor_gap" in record:
            found["train/stale_neighbor_gap"] = record["stale_neighbor_gap"]
    elif kind == "merge":
        found = {"merge/pairs": len(record["pairs"])}
    else:
        found = {}
    return {name: float(value) for name, value in found.items() if math.isfinite(value)}
