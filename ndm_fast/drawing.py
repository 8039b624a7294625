"""One look for every figure, and how a figure becomes a file; matplotlib is imported on first use."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ndm_fast.errors import InputError
from ndm_fast.files import unwritable, write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage


def draw_curves(panels: Sequence[dict[str, Any]], path: Path) -> None:
    """Panels of points joined by lines.

    Args:
        panels: ``title``, ``x``, ``y``, ``xlabel``, ``ylabel``; ``joined`` False for points alone.
        path: .png or .svg.
    """
    with style():
        figure = new_figure(4.2 * len(panels), 3.4)
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            axes.plot(panel["x"], panel["y"], "o-" if panel.get("joined", True) else "o", color=BLUE)
            axes.set_title(panel["title"], loc="left")
            axes.set_xlabel(panel["xlabel"])
            axes.set_ylabel(panel["ylabel"])
        save_figure(figure, path)


# Okabe & Ito's colours, which colour-blind readers can tell apart.
BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#6E6E6E"


SEQUENTIAL, DIVERGING = "YlGnBu", "RdBu_r"

_DOTS_PER_INCH = 120


_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "figure.titlesize": 12,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.framealpha": 1.0,
    "legend.edgecolor": "white",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": "black",
    "ytick.labelcolor": "black",
    "figure.facecolor": "white",
    "svg.hashsalt": "ndm-fast",  # the same data give the same file
}


@contextmanager
def style() -> Iterator[None]:
    """The look of our figures, inside the block only.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise InputError("drawing needs matplotlib: pip install 'ndm-fast[figures]'") from None
    with matplotlib.rc_context(_STYLE):
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches; drawn by Agg, so that no screen is needed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure whole or not at all, in the format that the path ends in (.png or .svg).

    Raises:
        InputError: the folder cannot be made or written to.
    """
    content = io.BytesIO()
    kind = path.suffix.removeprefix(".")
    figure.savefig(content, format=kind, metadata={"Date": None} if kind == "svg" else None)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(path.parent, error) from None
    write_atomic(path, content.getvalue())


def heat_map(axes: Axes, values: Any, *, limits: tuple[float, float], colours: str = SEQUENTIAL) -> AxesImage:
    """Draw a matrix as coloured cells, missing ones (NaN) grey; no frame and no tick marks."""
    from matplotlib import colormaps

    colour_map = colormaps[colours].with_extremes(bad="#E8E8E8")
    image = axes.imshow(values, cmap=colour_map, vmin=limits[0], vmax=limits[1], interpolation="nearest")
    axes.set_aspect("auto")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return image


def write_cells(axes: Axes, image: AxesImage, texts: Sequence[Sequence[str]], size: float) -> None:
    """Write a text into every cell of a heat map, white on dark cells and black on light ones."""
    values = image.get_array()
    assert values is not None
    colours: Any = image.cmap(image.norm(values))
    for row, line in enumerate(texts):
        for column, text in enumerate(line):
            red, green, blue, _ = colours[row][column]
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
            colour = "white" if dark else "black"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=size)


def count_steps(axes: Axes) -> None:
    """Make the horizontal axis one of training steps."""
    axes.set_xlabel("training step")
    axes.xaxis.set_major_formatter("{x:,.0f}")


def thinned(positions: Sequence[float], gap: float) -> list[int]:
    """Indices of ascending positions that are at least ``gap`` apart, the last always among them."""
    kept: list[int] = []
    for index in reversed(range(len(positions))):
        if not kept or positions[kept[-1]] - positions[index] >= gap:
            kept.append(index)
    return kept[::-1]
