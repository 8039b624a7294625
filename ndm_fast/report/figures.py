"""Figures of a run: loss, mutual information, tree of merges, purity."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ndm_fast.config import TrainConfig
from ndm_fast.drawing import (
    BLUE,
    GREY,
    VERMILION,
    count_steps,
    heat_map,
    new_figure,
    save_figure,
    style,
    thinned,
    write_cells,
)
from ndm_fast.errors import InputError
from ndm_fast.evaluate.purity.purity import SHARES
from ndm_fast.files import read_json
from ndm_fast.report.merge_figures import Event, information_figure, tree_figure
from ndm_fast.run.folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LOG_SCALE_FROM = 8.0  # largest over smallest loss


_LABEL_GAP = 0.025  # between labels on a step axis, as a share of its length


_CURVES: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("train", "loss", "training batches", {"color": BLUE, "linewidth": 1.0, "alpha": 0.75}),
    (
        "evaluate",
        "heldout_loss",
        "held out",
        {"color": VERMILION, "linewidth": 1.6, "marker": ".", "markersize": 6},
    ),
)


_WHY_IT_JUMPS = (
    "Wider subspaces have larger distances: at a merge the mean jumps up though nothing got worse,\n"
    "and per √width it hardly does."
)


def draw_run(folder: RunFolder, vector: bool = False, into: Path | None = None) -> list[Path]:
    """Draw what the files of a run allow.

    Args:
        vector: also write each figure as .svg.
        into: where to; default the run's ``figures`` folder.

    Returns:
        The files written, of ``loss.png``, ``mutual_information.png``, ``merge_tree.png``, ``purity.png``.

    Raises:
        InputError: matplotlib is missing, the folder has no log or nothing in it yet, or a file is damaged.
    """
    paths = []
    with style():
        for name, figure in _figures(folder):
            for suffix in ("png", "svg") if vector else ("png",):
                paths.append((into or folder.figures_folder) / f"{name}.{suffix}")
                save_figure(figure, paths[-1])
    if not paths:
        raise InputError(f"{folder.log_file} holds nothing to draw yet: let the run go on for some steps")
    return paths


def _figures(folder: RunFolder) -> Iterator[tuple[str, Figure]]:
    events = folder.events()
    settings = folder.config() if folder.config_file.exists() else None
    merges = [event for event in events if event["event"] == "merge"]
    if any(event["event"] in ("train", "evaluate") for event in events):
        yield "loss", loss_figure(events, settings.train if settings else TrainConfig())
    if any(len(event["widths_before"]) > 1 for event in merges):
        yield (
            "mutual_information",
            information_figure(merges, settings.merge.merge_threshold if settings else None),
        )
    if any(event["pairs"] for event in merges):
        yield "merge_tree", tree_figure(merges, max(event["step"] for event in events))
    if folder.purity_file.exists():
        yield "purity", purity_figure(purity_tables(folder.purity_file))


def purity_tables(file: Path) -> dict[str, list[dict[str, Any]]]:
    """``purity.json``: rows of ``neighbor_purity`` by method."""
    row = {"subspace": int, "width": int, "variance_share": object, **dict.fromkeys(SHARES, float)}
    return read_json(file, {str: [row]}, remedy=f"run `ndm-fast evaluate purity {file.parent}` again")


def loss_figure(events: Sequence[Event], train: TrainConfig) -> Figure:
    """Training loss and held-out loss against steps, with every merge as a vertical line.

    Where subspaces merged and the metric is euclidean, a second panel has the held-out distance per root of
    the width, which a merge alone leaves about where it is.

    Args:
        events: of kinds "train", "evaluate", "merge" and "escape", as the trainer logs them.
        train: of the run.
    """
    kinds = {
        kind: [e for e in events if e["event"] == kind] for kind in ("train", "evaluate", "merge", "escape")
    }
    merges = [event for event in kinds["merge"] if event["pairs"]]
    breaks = [event["step"] for event in merges]
    beside = bool(merges) and train.metric == "euclidean"
    figure = new_figure(9, 7.5 if beside else 5)
    panels = figure.subplots(1 + beside, sharex=True, squeeze=False)[:, 0]
    last = max(event["step"] for event in events)
    panels[0].set_xlim(-0.01 * last - 0.5, 1.01 * last + 0.5)
    for kind, field, label, look in _CURVES:
        _draw(panels[0], [(e["step"], e[field]) for e in kinds[kind]], breaks, label=label, **look)
    if beside:
        points = [(e["step"], per_root_width(e, train.objective)) for e in kinds["evaluate"]]
        _draw(panels[1], points, breaks, label="held out, per √width", **_CURVES[1][3])
        panels[1].set_ylabel("distance over the root of\nthe subspace's width, mean")
    _mark_escapes(panels[0], kinds["escape"])
    for axes in panels:
        _scale(axes)
        axes.legend(loc="best")
        for at in breaks:
            axes.axvline(at, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
    _count_subspaces(panels[0], merges, _first_count(kinds))
    count_steps(panels[-1])
    if beside:
        panels[-1].set_xlabel(f"training step\n\n{_WHY_IT_JUMPS}")
    unit = "−cosine, weighted by width" if train.metric == "cosine" else "units of the activations"
    panels[0].set_ylabel(f"mean distance to the nearest neighbor\n({unit})")
    figure.suptitle("Loss: how near the nearest neighbor is, averaged over subspaces")
    return figure


def per_root_width(event: Event, objective: str) -> float:
    """The held-out distance of an "evaluate" event over the root of each width, averaged as the loss is."""
    widths = np.array(event["widths"], dtype=float)
    distance = np.array(event["by_subspace"], dtype=float) / np.sqrt(widths)
    if objective == "log":
        with np.errstate(divide="ignore"):
            return float(np.exp(np.average(np.log(distance), weights=widths)))
    return float(distance.mean())


def _draw(axes: Axes, points: Sequence[tuple[int, float]], breaks: Sequence[int], **look: Any) -> None:
    steps, values = _broken_at(points, breaks)
    axes.plot(steps, values, **look)


def _scale(axes: Axes) -> None:
    """A logarithmic axis where the curves fall far."""
    values = [v for line in axes.lines for v in np.asarray(line.get_ydata(), dtype=float) if math.isfinite(v)]
    if values and min(values) > 0 and max(values) > _LOG_SCALE_FROM * min(values):
        _make_logarithmic(axes)


def _make_logarithmic(axes: Axes) -> None:
    """A logarithmic loss axis with plain numbers on it."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _broken_at(points: Sequence[tuple[int, float]], breaks: Sequence[int]) -> tuple[list[float], list[float]]:
    """Steps and values with a gap (NaN) after each break, where other subspaces are averaged than before."""
    steps: list[float] = []
    values: list[float] = []
    for index, (step, value) in enumerate(points):
        if index and any(points[index - 1][0] <= at < step for at in breaks):
            steps.append(step)
            values.append(math.nan)
        steps.append(step)
        values.append(value)
    return steps, values


def _first_count(kinds: Mapping[str, Sequence[Event]]) -> int | None:
    """Number of subspaces before any merge, where the log tells."""
    if kinds["merge"]:
        return len(kinds["merge"][0]["widths_before"])
    return len(kinds["evaluate"][0]["widths"]) if kinds["evaluate"] else None


def _count_subspaces(axes: Axes, merges: Sequence[Event], first: int | None) -> None:
    """Above the axes the number of subspaces from each merge on."""
    if not merges:
        if first is not None:
            axes.set_title(f"{first} subspaces, no merges")
        return
    marks = [(0, first), *((event["step"], len(event["widths"])) for event in merges)]
    left, right = axes.get_xlim()
    shown = [marks[i] for i in thinned([step for step, _ in marks], _LABEL_GAP * (right - left))]
    above = axes.secondary_xaxis("top")
    above.set_xticks([step for step, _ in shown], [str(count) for _, count in shown])
    above.spines[:].set_visible(False)
    above.tick_params(length=0)
    above.set_xlabel("number of subspaces; a dashed line is a merge")


def _mark_escapes(axes: Axes, escapes: Sequence[Event]) -> None:
    """Triangles on the step axis where a random re-initialisation was judged."""
    for kept, label, face in ((True, "escape kept", GREY), (False, "escape undone", "none")):
        steps = [event["step"] for event in escapes if event["kept"] == kept]
        if steps:
            axes.scatter(
                steps,
                [0.015] * len(steps),
                marker="^",
                s=26,
                facecolors=face,
                edgecolors=GREY,
                label=label,
                transform=axes.get_xaxis_transform(),
                clip_on=False,
                zorder=3,
            )


def purity_figure(tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """What nearest neighbors share with their queries, subspaces x shares; one panel per method.

    Args:
        tables: rows of ``neighbor_purity`` by method, as in ``purity.json``.
    """
    tallest = max(map(len, tables.values()))
    figure = new_figure(4.2 * len(tables) + 2.0, max(3.2, 0.27 * tallest + 1.8))
    panels = figure.subplots(1, len(tables), squeeze=False)[0]
    shown: list[str] = []
    for axes, (method, rows) in zip(panels, tables.items(), strict=True):
        values = np.array([[100 * row[share] for share in SHARES] for row in rows])
        image = heat_map(axes, values, limits=(0.0, 100.0))
        write_cells(axes, image, [[_percent(value) for value in line] for line in values], 8)
        labels = [f"s{row['subspace']} · width {row['width']}" for row in rows]
        axes.set_yticks(range(len(rows)), labels if labels != shown else [""] * len(rows))
        shown = labels
        axes.set_xticks(range(len(SHARES)), [_share_name(share) for share in SHARES])
        axes.set_title(method.upper() if method in ("ndm", "pca") else method)
    bar = figure.colorbar(image, ax=panels, fraction=0.03, pad=0.01)
    bar.set_label("share of queries, %")
    bar.outline.set_visible(False)
    end = "\n" if len(tables) == 1 else " "  # one panel is too narrow for the whole line
    figure.suptitle(f"Neighbor purity: how often the nearest neighbor{end}in a subspace has the same …")
    return figure


def _share_name(share: str) -> str:
    """Two lines for every share, so that the first lines stand level."""
    first, _, second = share.removeprefix("same_").replace("_within_", "_± ").partition("_")
    return f"{first}\n{second}"


def _percent(value: float) -> str:
    return f"{value:.1f}%" if 0 < value < 9.95 else f"{value:.0f}%"
