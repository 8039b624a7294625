"""``ndm-fast report``, ``index``, ``explore`` and ``hub``: their arguments, and what they print."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ndm_fast.cli.options import check_device
from ndm_fast.errors import InputError


def add_report(commands: Any) -> None:
    """Add ``report``, ``index``, ``explore`` and ``hub`` to the command line."""
    for add in (_add_report, _add_index, _add_explore, _add_hub):
        add(commands)


def _add_report(commands: Any) -> None:
    report = commands.add_parser("report", help="write the report of a run: a static site, and its figures")
    report.add_argument("folder", metavar="RUN", help="folder of a run")
    report.add_argument("-o", "--out", default=None, help="for the site; default: RUN/report, RUN/report.zip")
    what = report.add_mutually_exclusive_group()
    what.add_argument(
        "--share", action="store_true", help="write one zip instead, to send: it opens anywhere, offline"
    )
    report.add_argument(
        "--rows", type=int, default=20_000, help="activations to index where there is no index"
    )
    what.add_argument(
        "--figures-only", action="store_true", help="draw the figures into RUN/figures, no site"
    )
    report.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ... for building the index")
    report.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> None:
    from ndm_fast.report.figures import draw_run
    from ndm_fast.report.share import write_share
    from ndm_fast.report.site import write_report
    from ndm_fast.run.folder import RunFolder

    folder = RunFolder(options.folder)
    if options.figures_only:
        for path in draw_run(folder, vector=True):
            print(path)
        return
    check_device(options.device)
    _check_rows(options.rows)
    write = write_share if options.share else write_report
    usual = folder.report_folder.with_suffix(".zip") if options.share else folder.report_folder
    out = Path(options.out) if options.out else usual
    print(f"report: {write(folder, out, rows=options.rows, device=options.device)}")
    if folder.config().run.rows:
        print("left out, as plain rows belong to no tokens: readings, galleries, positions")


def _add_index(commands: Any) -> None:
    index = commands.add_parser(
        "index", help="store many activations of a run's site, for report and explore"
    )
    index.add_argument("folder", metavar="RUN", help="folder of a finished run")
    index.add_argument("--rows", type=int, default=200_000, help="activations to store")
    index.add_argument("--dtype", default="float16", help="float16, or float32 for activations as they are")
    index.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ...")
    index.set_defaults(run=_index)


def _index(options: argparse.Namespace) -> None:
    from ndm_fast.report.index.writer import run_index
    from ndm_fast.run.folder import RunFolder

    check_device(options.device)
    _check_rows(options.rows)
    folder = RunFolder(options.folder)
    index = run_index(
        folder,
        rows=options.rows,
        dtype=options.dtype,
        rebuild=True,
        device=options.device,
    )
    print(f"{len(index)} activations in {index.folder}")


def _add_explore(commands: Any) -> None:
    explore = commands.add_parser(
        "explore", help="serve a live page: type a text, see each token's neighbors"
    )
    explore.add_argument("folder", metavar="RUN", help="folder of a finished run, or of one run per site")
    explore.add_argument("--host", default="127.0.0.1", help="address to listen on")
    explore.add_argument("--port", type=int, default=8747, help="port to listen on, 0 for a free one")
    explore.add_argument("--allow-remote", action="store_true", help="let other machines reach the page")
    explore.add_argument(
        "--rows", type=int, default=50_000, help="activations to index where there is no index"
    )
    explore.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ... for the model")
    explore.set_defaults(run=_explore)


def _explore(options: argparse.Namespace) -> None:
    from ndm_fast.report.server import serve

    check_device(options.device)
    _check_rows(options.rows)
    serve(
        Path(options.folder),
        host=options.host,
        port=options.port,
        allow_remote=options.allow_remote,
        rows=options.rows,
        device=options.device,
    )


def _add_hub(commands: Any) -> None:
    hub = commands.add_parser(
        "hub", help="write a folder for the Hugging Face Hub: the partitions of runs, and their card"
    )
    hub.add_argument("folders", nargs="+", metavar="RUN", help="folders of finished runs of one model")
    hub.add_argument("-o", "--out", required=True, help="folder to write, which must be new or empty")
    hub.add_argument("--name", default="USER/NAME", help="of the repository, for the card's snippet")
    hub.set_defaults(run=_hub)


def _hub(options: argparse.Namespace) -> None:
    from ndm_fast.report.hub import write_hub
    from ndm_fast.run.folder import RunFolder

    card = write_hub([RunFolder(folder) for folder in options.folders], Path(options.out), options.name)
    print(f"hub: {card}")
    print(f"read it, and upload with: hf upload {options.name} {options.out}")


def _check_rows(rows: int) -> None:
    if rows < 100:
        raise InputError(f"--rows {rows}: an index of less than 100 activations shows nothing, give more")
