"""Do several runs find the same subspaces? Matching by principal angles, and one score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ndm_fast.drawing import heat_map, new_figure, save_figure, style, write_cells
from ndm_fast.errors import InputError
from ndm_fast.partition import SubspacePartition


class Matching(NamedTuple):
    """Subspaces of one partition paired with those of another."""

    overlap: Tensor
    """[S, S'] fp64 ``sum_i cos^2 theta_i / max(p, p')`` over principal angles: 1 the same, 0 orthogonal."""
    pairs: list[tuple[int, int]]
    """Best one-to-one pairing; with unequal numbers the surplus stays alone."""
    score: float
    """Overlap of the pairs, weighted by width; what stays alone counts as 0. 1: the same partition."""
    chance: float
    """The score expected of these pairs if one partition were turned at random."""


def match_subspaces(first: SubspacePartition, second: SubspacePartition) -> Matching:
    """Pair the subspaces of two partitions of the same width so that they overlap most (Hungarian method).

    Raises:
        InputError: the widths differ, or scipy is not installed.
    """
    if first.width != second.width:
        raise InputError(f"partitions of width {first.width} and {second.width}: compare runs on one site")
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise InputError("matching subspaces needs scipy: pip install 'ndm-fast[evaluate]'") from None
    squared = (first.rotation.double().T @ second.rotation.double().to(first.rotation.device)).square().cpu()
    blocks = [part.split(list(second.widths), 1) for part in squared.split(list(first.widths), 0)]
    sizes = torch.tensor([[max(p, q) for q in second.widths] for p in first.widths])
    overlap = torch.stack([torch.stack([block.sum() for block in row]) for row in blocks]) / sizes
    # A pair counts by the wider of its two, so that the score of equal partitions is 1.
    weight = sizes / first.width
    rows, columns = linear_sum_assignment((overlap * weight).numpy(), maximize=True)
    pairs = [(int(a), int(b)) for a, b in zip(rows, columns, strict=True)]
    total = max(sum(float(weight[p]) for p in pairs), 1.0)
    smaller = [min(first.widths[a], second.widths[b]) / first.width for a, b in pairs]
    return Matching(
        overlap,
        pairs,
        sum(float(overlap[p] * weight[p]) for p in pairs) / total,
        sum(share * float(weight[p]) for share, p in zip(smaller, pairs, strict=True)) / total,
    )


def stability(partitions: Mapping[str, SubspacePartition]) -> dict[str, Any]:
    """Every pair of runs matched; ``score`` and ``chance`` are means over the pairs.

    Args:
        partitions: two or more, by name.
    """
    if len(partitions) < 2:
        raise InputError("one run has nothing to be compared with: give at least two")
    found = {(a, b): match_subspaces(partitions[a], partitions[b]) for a, b in combinations(partitions, 2)}
    return {
        "score": sum(m.score for m in found.values()) / len(found),
        "chance": sum(m.chance for m in found.values()) / len(found),
        "pairs": [
            {
                "first": a,
                "second": b,
                "score": m.score,
                "chance": m.chance,
                "matched": m.pairs,
                "overlap": m.overlap.tolist(),
            }
            for (a, b), m in found.items()
        ],
    }


def draw_stability(result: dict[str, Any], path: Path, most: int = 6) -> None:
    """Overlaps of the first few pairs of runs, columns in the order of their matches.

    Args:
        result: as from :func:`stability`. path: .png or .svg.
    """
    shown: Sequence[dict[str, Any]] = result["pairs"][:most]
    with style():
        tallest = max(len(pair["overlap"]) for pair in shown)
        figure = new_figure(3.6 * len(shown) + 1.2, 0.32 * tallest + 1.6)
        panels = figure.subplots(1, len(shown), squeeze=False)[0]
        for axes, pair in zip(panels, shown, strict=True):
            matched = [column for _, column in pair["matched"]]
            order = matched + [c for c in range(len(pair["overlap"][0])) if c not in matched]
            values = torch.tensor(pair["overlap"])[:, order].numpy()
            image = heat_map(axes, values, limits=(0.0, 1.0))
            write_cells(
                axes,
                image,
                [[f"{value:.2f}"[1:] if value < 1 else "1" for value in row] for row in values],
                7,
            )
            axes.set_xticks(range(len(order)), [str(column) for column in order])
            axes.set_yticks(range(len(values)))
            axes.set_xlabel(Path(pair["second"]).name)
            axes.set_ylabel(Path(pair["first"]).name)
            axes.set_title(f"score {pair['score']:.2f}, chance {pair['chance']:.2f}", loc="left")
        bar = figure.colorbar(image, ax=panels, fraction=0.03, pad=0.01)
        bar.set_label("overlap")
        bar.outline.set_visible(False)
        save_figure(figure, path)
