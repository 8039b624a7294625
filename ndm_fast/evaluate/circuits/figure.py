"""Figures of the evaluation: effects by subspace and method, and curves against a setting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ndm_fast.drawing import BLUE, GREY, VERMILION, new_figure, save_figure, style
from ndm_fast.evaluate.circuits.results import CircuitResults, MethodResult
from ndm_fast.evaluate.circuits.trace import OWN, Trace, TraceCurve

METHOD_NAMES = {
    "ndm": "NDM",
    "identity": "identity",
    "random": "random",
    "pca": "PCA descending",
    "pca_ascending": "PCA ascending",
    "pca_descending": "PCA descending",
}


def draw_effects(results: CircuitResults, path: Path) -> None:
    """The paper's effect figure: a row per test, a column per method, a bar per subspace.

    Args:
        results: of ``run_circuits``.
        path: .png or .svg.
    """
    tests = [(name, test, found) for name, by_test in results.items() for test, found in by_test.items()]
    methods = list(tests[0][2].methods)
    with style():
        figure = new_figure(2.3 * len(methods) + 0.6, 1.9 * len(tests) + 0.7)
        grid = figure.subplots(len(tests), len(methods), squeeze=False, sharey="row")
        for row, (_, test, found) in zip(grid, tests, strict=True):
            for axes, kind in zip(row, methods, strict=True):
                _bars(axes, found.methods[kind], kind, first=axes is row[0])
            row[0].set_ylabel(f"test {test}\nmean drop")
            row[0].text(
                0, 1.16, found.what, transform=row[0].transAxes, ha="left", fontsize=9, fontweight="bold"
            )
        for axes in grid[-1]:
            axes.set_xlabel("subspace")
        save_figure(figure, path)


def draw_trace(trace: Trace, path: Path) -> None:
    """Effect of the whole activation against the block, a panel per test, its peak marked.

    Args:
        path: .png or .svg.
    """
    own = [curve for curve in trace.curves if curve.positions == OWN]
    columns = min(3, len(own))
    with style():
        figure = new_figure(3.9 * columns, 2.9 * -(-len(own) // columns))
        panels = figure.subplots(-(-len(own) // columns), columns, squeeze=False).flat
        for axes, curve in zip(panels, own, strict=False):
            _curve(axes, trace, curve)
        for axes in list(figure.axes)[len(own) :]:
            axes.remove()
        save_figure(figure, path)


def _curve(axes: Any, trace: Trace, curve: TraceCurve) -> None:
    for other in trace.curves:
        if other.test == curve.test and other.positions != OWN:
            axes.plot(trace.layers, other.effect, linewidth=1, label=other.positions)
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.errorbar(trace.layers, curve.effect, curve.error, fmt="o-", color=BLUE, markersize=3, linewidth=1.2)
    peak, effect = trace.layers[curve.peak], curve.effect[curve.peak]
    axes.plot([peak], [effect], "o", color=VERMILION, markersize=7)
    axes.set_title(
        f"test {curve.test}: {curve.what}\nblock {peak}: {effect:.2f}; clean {curve.clean:.2f}", loc="left"
    )
    axes.set_xlabel("patched after block")
    axes.set_ylabel("mean drop")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(ncols=2)


def _bars(axes: Any, method: MethodResult, kind: str, *, first: bool) -> None:
    effects = method.effect
    axes.bar(range(len(effects)), effects, color=VERMILION if kind == "ndm" else BLUE, width=0.75)
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set_title(f"{METHOD_NAMES[kind]}, Gini {method.mean_gini:.2f}", loc="left", pad=3, fontsize=9)
    axes.set_xticks(range(len(effects)) if len(effects) <= 12 else range(0, len(effects), 4))
