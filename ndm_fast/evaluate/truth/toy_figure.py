"""The figure of the toy model: its weights before and after the rotation that NDM found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ndm_fast.drawing import DIVERGING, heat_map, new_figure, save_figure, style, thinned
from ndm_fast.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_toy(
    weights_before: Any, weights_after: Any, groups: Sequence[int], widths: Sequence[int], path: str | Path
) -> None:
    """Draw the toy model's weights in the hidden layer's coordinates and in those of the subspaces.

    Args:
        weights_before, weights_after: [n, dim], W and W R; a row is the direction of one feature.
        groups: sizes of the feature groups, sum n. widths: of the subspaces, sum dim.
        path: .png or .svg, replaced whole.

    Raises:
        InputError: the sizes do not fit the matrices, or matplotlib is missing.
    """
    before, after = (
        torch.as_tensor(w).detach().cpu().double().numpy() for w in (weights_before, weights_after)
    )
    if before.shape != after.shape or before.shape != (sum(groups), sum(widths)):
        raise InputError(
            f"matrices of shapes {before.shape} and {after.shape} do not fit {sum(groups)} features "
            f"in {sum(widths)} dimensions: give two [n, dim] matrices, groups that sum to n, widths to dim"
        )
    with style():
        save_figure(toy_figure(before, after, groups, widths), Path(path))


def toy_figure(before: np.ndarray, after: np.ndarray, groups: Sequence[int], widths: Sequence[int]) -> Figure:
    """Both matrices side by side on one scale, with lines between groups and between subspaces."""
    top = max(float(np.abs(before).max()), float(np.abs(after).max()), 1e-12)
    height = min(9.0, max(4.0, 0.09 * len(before) + 1.6))
    figure = new_figure(9, height)
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, values in ((left, before), (right, after)):
        image = heat_map(axes, values, limits=(-top, top), colours=DIVERGING)
        for edge in np.cumsum(groups)[:-1]:
            axes.axhline(edge - 0.5, color="black", linewidth=1.2)
    for edge in np.cumsum(widths)[:-1]:
        right.axvline(edge - 0.5, color="black", linewidth=1.2)
    middles = _middles(groups)
    named = thinned(middles, 0.16 * len(before) / (height - 1.6))
    left.set_yticks([middles[g] for g in named], [f"group {g} · {groups[g]}" for g in named])
    left.set_ylabel("feature group · number of features")
    step = max(1, before.shape[1] // 12)
    left.set_xticks(range(0, before.shape[1], step))
    right.set_xticks(_middles(widths), _staggered(widths))
    left.set_title("before: W")
    right.set_title("after: W R")
    left.set_xlabel("coordinate of the hidden layer")
    right.set_xlabel("subspace · width")
    bar = figure.colorbar(image, ax=[left, right], fraction=0.04, pad=0.01)
    bar.set_label("weight")
    bar.outline.set_visible(False)
    figure.suptitle("Toy model: the features' directions before and after the rotation that NDM found")
    return figure


def _staggered(widths: Sequence[int]) -> list[str]:
    """Labels of subspaces along an axis; where they are narrow, each one lower than the one before."""
    gap = 0.135 * sum(widths)
    middles, labels, level = _middles(widths), [], 0
    for s, width in enumerate(widths):
        level = (level + 1) % 4 if s and middles[s] - middles[s - 1] < gap else 0
        labels.append("\n" * level + f"s{s} · {width}")
    return labels


def _middles(sizes: Sequence[int]) -> list[float]:
    return [sum(sizes[:i]) + size / 2 - 0.5 for i, size in enumerate(sizes)]
