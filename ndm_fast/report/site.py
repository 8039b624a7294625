"""The report of a run: a static site that needs no network, no script and no server."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ndm_fast.evaluate.connections.results import NAME, read_connections
from ndm_fast.files import unwritable, write_atomic
from ndm_fast.report.circuit_results import CircuitColumn, circuit_columns
from ndm_fast.report.connections import picture_of
from ndm_fast.report.figures import draw_run, purity_tables
from ndm_fast.report.index.format import PreimageIndex
from ndm_fast.report.index.tokens import shown
from ndm_fast.report.index.writer import run_index
from ndm_fast.report.survey import SAMPLE, SubspaceSurvey, survey
from ndm_fast.run.folder import RunFolder
from ndm_fast.version import __version__

_GALLERY_QUERIES, _GALLERY_NEIGHBORS = 12, 12

_SHARES = (
    ("same_token", "token"),
    ("same_previous_token", "previous"),
    ("same_next_token", "next"),
    ("same_position", "position"),
    ("position_within_3", "position ± 3"),
    ("same_document", "document"),
)


_FIGURES = {
    "loss": ("Loss", "Mean distance to the nearest neighbor during training; dashed lines are merges."),
    "merge_tree": ("Merge tree", "Which of the first subspaces joined, and when."),
    "mutual_information": (
        "Mutual information",
        "Between all pairs of subspaces at every round of merging, over the sum of both widths.",
    ),
    "purity": ("Neighbor purity", "The shares of the table, beside those of other rotations."),
    "circuits": ("Circuits", "What replacing one subspace by that of a counterfactual prompt changes."),
}


_MEDIA = {".svg": "image/svg+xml", ".png": "image/png"}


def write_report(folder: RunFolder, out: Path, *, rows: int, device: str = "cpu") -> Path:
    """Write the site into ``out``, and the figures into the run folder as .png and .svg.

    Args:
        rows: activations in the index that is built where there is none.

    Returns:
        ``out/index.html``.

    Raises:
        InputError: the run is not finished, its index is damaged, or ``out`` cannot be written to.
    """
    return _write(report_pages(folder, rows=rows, device=device), out)


def report_pages(folder: RunFolder, *, rows: int, device: str = "cpu") -> dict[str, str]:
    """The pages of the site by file name, ``index.html`` first; the figures go into the run folder.

    Args:
        rows: see :func:`write_report`.

    Raises:
        InputError: the run is not finished, or its index is damaged.
    """
    if folder.config().run.rows:
        return {"index.html": _rows_page(folder)}
    metric = folder.config().train.metric
    index = run_index(folder, rows=rows, dtype="float32", device=device)
    figures = draw_run(folder, vector=True)
    surveys = survey(
        index,
        metric=metric,
        queries=_GALLERY_QUERIES,
        neighbors=_GALLERY_NEIGHBORS,
        purity=_saved_purity(folder, index),
    )
    result = folder.result()
    circuits = circuit_columns(folder.circuits_file, index.rows.widths)
    return {
        "index.html": _page(
            "overview.html",
            facts=_facts(folder, index),
            surveys=surveys,
            distances=result.get("heldout_distance"),
            figures=_inlined(figures, folder.circuits_file.with_suffix(".png")),
            shares=_SHARES,
            circuits=circuits,
            connections=_connections(folder),
        ),
        **{_name(s): _subspace_page(s, folder, index, metric, circuits) for s in surveys},
    }


def _write(pages: dict[str, str], out: Path) -> Path:
    """Write pages into a folder, without those of an earlier report; returns the first."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for stale in set(out.glob("subspace-*.html")) - {out / name for name in pages}:
            stale.unlink()
    except OSError as error:
        raise unwritable(out, error) from None
    for name, page in pages.items():
        write_atomic(out / name, page.encode())
    return out / "index.html"


def _connections(folder: RunFolder) -> Markup | None:
    """The picture of ``connections.json``, in the run's folder or in that of all sites."""
    for place in (folder.path, folder.path.parent):
        if (place / f"{NAME}.json").exists():
            return Markup(picture_of(read_connections(place / f"{NAME}.json")))
    return None


def templates() -> jinja2.Environment:
    """The pages' templates; everything that enters them is escaped, and shown where it would not be seen."""
    return jinja2.Environment(
        finalize=lambda value: shown(value) if isinstance(value, str) else value,
        loader=jinja2.PackageLoader("ndm_fast.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _rows_page(folder: RunFolder) -> str:
    """The one page of a run on plain rows, which have no tokens to show."""
    figures, result, config = draw_run(folder, vector=True), folder.result(), folder.config()
    columns = zip(result["widths"], result["variance_share"], result["heldout_distance"], strict=True)
    subspaces = [
        {"subspace": s, "width": width, "variance_share": share, "distance": distance}
        for s, (width, share, distance) in enumerate(columns)
    ]
    facts = {
        "model": "",
        "site": Path(config.run.rows).name,
        "width": sum(result["widths"]),
        "shown": [
            ("steps", f"{result['steps']:,}"),
            ("held-out distance", f"{result['heldout_loss']:.4f}"),
            ("metric", config.train.metric),
        ],
    }
    shown = _inlined(figures, folder.circuits_file.with_suffix(".png"))
    return _page("rows.html", facts=facts, subspaces=subspaces, figures=shown)


def _page(template: str, **content: Any) -> str:
    environment = templates()
    assert environment.loader is not None
    style = Markup(environment.loader.get_source(environment, "style.css")[0])
    return environment.get_template(template).render(style=style, version=__version__, **content)


def _subspace_page(
    s: SubspaceSurvey, folder: RunFolder, index: PreimageIndex, metric: str, circuits: list[CircuitColumn]
) -> str:
    cosine = metric == "cosine"
    spread = index.spread[s.subspace] or 1.0
    note = (
        "Distances are 1 − cosine."
        if cosine
        else f"Distances are over the subspace's spread, {spread:.3g}; a random pair is about 1.4 apart."
    )
    return _page(
        "subspace.html",
        facts=_facts(folder, index),
        s=s,
        count=len(index.rows.widths),
        shares=_SHARES,
        circuits=circuits,
        scale=1.0 if cosine else spread,
        cosine=cosine,
        distance_note=note,
    )


def _name(s: SubspaceSurvey) -> str:
    return f"subspace-{s.subspace:02}.html"


def _facts(folder: RunFolder, index: PreimageIndex) -> dict[str, Any]:
    source, result, config = index.partition.source, folder.result(), folder.config()
    shown = [
        ("text", _name_only(source.get("data", config.harvest.data))),
        ("steps", f"{result['steps']:,}"),
        ("held-out distance", f"{result['heldout_loss']:.4f}"),
        ("activations shown", f"{len(index):,}"),
        ("metric", config.train.metric),
    ]
    return {
        "model": _name_only(source.get("model", config.harvest.model)),
        "site": source.get("site", config.harvest.site[0]),
        "width": index.partition.width,
        "rows": f"{len(index):,}",
        "sample": f"{min(SAMPLE, len(index) // 2):,}",
        "shown": shown,
    }


def _name_only(place: str) -> str:
    """The last part of a path, as pages are sent to people whom the rest does not concern."""
    return Path(place).name if Path(place).is_absolute() else place


def _saved_purity(folder: RunFolder, index: PreimageIndex) -> list[dict[str, Any]] | None:
    """Rows of ``purity.json`` where there is one of this partition, so that page and command line agree."""
    if not folder.purity_file.exists():
        return None
    rows = purity_tables(folder.purity_file).get("ndm", [])
    if any("reading" not in row for row in rows):  # saved before there were readings
        return None
    return rows if [row["width"] for row in rows] == list(index.rows.widths) else None


def _inlined(figures: list[Path], circuits: Path) -> list[dict[str, str]]:
    """The vector figures and that of circuit tests as data URIs, in the order of ``_FIGURES``."""
    drawn = {path.stem: path for path in figures if path.suffix == ".svg"}
    if circuits.is_file():  # of `ndm-fast evaluate circuits RUN --out RUN`
        drawn["circuits"] = circuits
    return [
        {
            "name": name,
            "title": title,
            "caption": caption,
            "source": f"data:{_MEDIA[drawn[name].suffix]};base64,"
            + base64.b64encode(drawn[name].read_bytes()).decode(),
        }
        for name, (title, caption) in _FIGURES.items()
        if name in drawn
    ]
