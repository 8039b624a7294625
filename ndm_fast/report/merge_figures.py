"""What merging saw and did: mutual information of every round, and the tree of merges."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ndm_fast.drawing import BLUE, GREY, VERMILION, count_steps, heat_map, new_figure, write_cells
from ndm_fast.partition import merged_order
from ndm_fast.train.merge.pairs import merge_scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Event = Mapping[str, Any]


def information_figure(merges: Sequence[Event], threshold: object = None) -> Figure:
    """Mutual information per dimension between all pairs of subspaces, one panel for every merge round.

    Args:
        merges: events of kind "merge"; rounds with a single subspace are left out.
        threshold: of merging, nats per dimension, marked on the colour scale where it is a number.
    """
    rounds = [event for event in merges if len(event["widths_before"]) > 1]
    scores = [_scores(event) for event in rounds]
    top = max(max(float(np.nanmax(values)) for values in scores), 1e-12)
    columns = len(rounds) if len(rounds) <= 3 else math.ceil(math.sqrt(len(rounds)))
    rows = math.ceil(len(rounds) / columns)
    most = max(map(len, scores))
    side = 5.4 if most > 24 else 4.4 if most > 12 else 3.7
    figure = new_figure(max(columns * side + 1.0, 5.6), rows * side + 0.6)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for number, (axes, event, values) in enumerate(zip(panels, rounds, scores, strict=False)):
        image = heat_map(axes, values, limits=(0.0, top))
        axes.set_aspect("equal")
        _label_subspaces(axes, event["widths_before"])
        if number % columns == 0:
            axes.set_ylabel("subspace · width")
        _outline_pairs(axes, event["pairs"])
        if len(values) <= 6:
            write_cells(axes, image, [[f"{v:.3f}" if v == v else "" for v in row] for row in values], 8)
        merging = {0: "no pair merges", 1: "1 pair merges"}.get(
            len(event["pairs"]), f"{len(event['pairs'])} pairs merge"
        )
        axes.set_title(f"step {event['step']:,} · {len(values)} subspaces · {merging}")
    for axes in panels[len(rounds) :]:
        axes.set_visible(False)
    bar = figure.colorbar(image, ax=panels, fraction=0.03, pad=0.01, shrink=1 / rows if rows > 1 else 0.9)
    label = "mutual information / sum of both widths\nnats per dimension"
    bar.outline.set_visible(False)
    if isinstance(threshold, int | float) and 0 < threshold <= top:
        bar.ax.axhline(threshold, color=VERMILION, linewidth=2)
        label += f"; line: merge threshold {threshold:g}"
    bar.set_label(label)
    figure.suptitle("Information shared between subspaces; outlined pairs merge")
    return figure


def _scores(event: Event) -> np.ndarray:
    """[S, S] what merging decides by; the diagonal, which means nothing, is NaN."""
    information = torch.tensor(event["mutual_information"], dtype=torch.float64)
    values = merge_scores(information, event["widths_before"]).numpy()
    np.fill_diagonal(values, np.nan)
    return values


def _label_subspaces(axes: Axes, widths: Sequence[int]) -> None:
    size = 9 if len(widths) <= 12 else 7.5 if len(widths) <= 24 else 6.5
    places = range(len(widths))
    axes.set_yticks(places, [f"s{s} · {width}" for s, width in enumerate(widths)], fontsize=size)
    axes.set_xticks(places, [str(w) for w in widths], fontsize=size, rotation=90 if len(widths) > 8 else 0)
    axes.set_xlabel("width")


def _outline_pairs(axes: Axes, pairs: Sequence[Sequence[int]]) -> None:
    from matplotlib.patches import Rectangle

    for a, b in pairs:
        for row, column in ((a, b), (b, a)):
            corner = (column - 0.5, row - 0.5)
            axes.add_patch(
                Rectangle(
                    corner, 1, 1, fill=False, edgecolor=VERMILION, linewidth=1.8, zorder=3, clip_on=False
                )
            )


@dataclass(frozen=True)
class TreeNode:
    """A subspace in the history of a run.

    Attributes:
        step: when two subspaces joined into it; 0 for the units the run began with.
        units: indices of the initial subspaces in it, ascending.
        children: the two that joined, or none.
    """

    width: int
    step: int
    units: tuple[int, ...]
    children: tuple[TreeNode, ...] = ()


def merge_tree(merges: Sequence[Event]) -> list[TreeNode]:
    """The final subspaces, in their order, each with the tree of merges that made it.

    Args:
        merges: events of kind "merge" in the order of the log, at least one.
    """
    nodes = [TreeNode(width, 0, (unit,)) for unit, width in enumerate(merges[0]["widths_before"])]
    for event in merges:
        order = merged_order([node.width for node in nodes], event["pairs"])
        nodes = [_joined([nodes[s] for s in group], event["step"]) for group in order]
    return nodes


def _joined(nodes: list[TreeNode], step: int) -> TreeNode:
    if len(nodes) == 1:
        return nodes[0]
    units = tuple(sorted(unit for node in nodes for unit in node.units))
    return TreeNode(sum(node.width for node in nodes), step, units, tuple(nodes))


def tree_figure(merges: Sequence[Event], last_step: int) -> Figure:
    """The tree of merges over steps: units on the left, the final subspaces on the right."""
    roots = merge_tree(merges)
    leaves = [unit for root in roots for unit in _leaves(root)]
    figure = new_figure(9, max(3.0, 0.27 * len(leaves) + 1.4))
    axes = figure.add_subplot()
    widest = max(root.width for root in roots)
    heights = []
    for root in roots:
        colour = BLUE if root.children else GREY
        heights.append(_draw_node(axes, root, last_step, leaves, colour, widest))
    axes.set_ylim(len(leaves) - 0.4, -0.6)
    axes.set_xlim(0, last_step)
    axes.set_yticks(range(len(leaves)), [f"unit {unit} · {_width_of(unit, merges)}" for unit in leaves])
    right = axes.secondary_yaxis("right")
    right.set_yticks(heights, [f"s{s} · {root.width}" for s, root in enumerate(roots)])
    for side in (axes, right):
        side.spines[:].set_visible(False)
        side.tick_params(axis="y", length=0)
    axes.spines["bottom"].set_visible(True)
    count_steps(axes)
    axes.set_ylabel("first subspaces · width", labelpad=8)
    right.set_ylabel("final subspaces · width", labelpad=8)
    figure.suptitle(
        f"Merges: from {len(leaves)} subspaces to {len(roots)}; the thicker a line, the wider the subspace"
    )
    return figure


def _leaves(node: TreeNode) -> list[int]:
    return [unit for child in node.children for unit in _leaves(child)] if node.children else list(node.units)


def _width_of(unit: int, merges: Sequence[Event]) -> int:
    return merges[0]["widths_before"][unit]


def _draw_node(axes: Axes, node: TreeNode, until: int, leaves: list[int], colour: str, widest: int) -> float:
    """Draw a node's life from its step ``until`` it ends, and all below it; returns its height."""
    if node.children:
        heights = [_draw_node(axes, child, node.step, leaves, colour, widest) for child in node.children]
        height = sum(heights) / len(heights)
        axes.plot([node.step] * 2, [min(heights), max(heights)], color=colour, linewidth=1.2)
        axes.plot(node.step, height, "o", color=colour, markersize=4)
    else:
        height = float(leaves.index(node.units[0]))
    line = 0.8 + 3.2 * node.width / widest
    axes.plot([node.step, until], [height, height], color=colour, linewidth=line, solid_capstyle="butt")
    return height
