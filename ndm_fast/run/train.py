"""The way from settings to a result in a run folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from ndm_fast.activations.cache import ActivationCache
from ndm_fast.activations.models import load_model, prepare_model
from ndm_fast.activations.rows import SiteStream
from ndm_fast.activations.stream import ActivationStream
from ndm_fast.config import RunConfig
from ndm_fast.errors import InputError
from ndm_fast.files import remove_folder, unwritable
from ndm_fast.ranks import Group, Launch, launched
from ndm_fast.run.folder import RunFolder
from ndm_fast.run.progress import Progress
from ndm_fast.run.reporters import Reporter, reporters
from ndm_fast.run.row_stream import RowStream, note_rows, row_stream
from ndm_fast.run.site import ACTIVATIONS, SiteRun, standing, train_one
from ndm_fast.run.source import documents, share_harvest, with_cache

_TEMPORARY = f".{ACTIVATIONS}.temporary"
"""Beside shared activations that nobody asked to keep."""


def train_run(
    config: RunConfig,
    out: str | Path,
    *,
    resume: bool = False,
    device: str = "cpu",
    show_progress: bool = True,
    keep_activations: bool = False,
    report_to: Sequence[str | Reporter] = (),
) -> list[RunFolder]:
    """Train every site of ``config`` and save the results; under torchrun, together with the other ranks.

    Several sites are harvested together, into ``out/activations``, and trained one after the other.

    Args:
        out: the run's folder; with several sites, the folder of one run folder per site.
        resume: go on with what is there; start where there is nothing.
        keep_activations: leave ``out/activations``, to train from it again.
        report_to: who is told of losses and settings: ``tensorboard``, ``trackio``, ``wandb``, or objects of
            the protocol ``Reporter``. With several sites each is a run of its own.

    Returns:
        The folders that this process wrote.

    Raises:
        InputError: something about the input is wrong; nothing was overwritten.
        StoppedError: Ctrl-C or SIGTERM; the state is saved.
        RanksError: another rank is gone.
    """
    launch, told = launched(), reporters(report_to)
    if config.run.rows:
        rows = row_stream(config, show_progress=show_progress and launch.rank == 0)
        return _train_streams(config, [rows], out, launch, resume, device, show_progress, told)
    if config.run.acts:
        cache = ActivationCache(config.run.acts, partial=config.run.partial)
        config = with_cache(config, cache)
        cached = [cache.stream(site, repeat=config.harvest.repeat_data) for site in config.harvest.site]
        return _train_streams(config, cached, out, launch, resume, device, show_progress, told)
    if not config.harvest.site:
        raise InputError("no site given: pass --site, for instance blocks.3.hook_resid_post")
    harvest, text = config.harvest, documents(config)
    model, tokenizer = load_model(harvest.model, harvest.dtype, device, **harvest.hub_options)
    prepare_model(model, harvest)
    streams: list[SiteStream] = [
        ActivationStream(model, tokenizer, site, text, harvest) for site in harvest.site
    ]
    if launch.size > 1:  # each rank runs the model: to run it once, harvest first, and train --acts
        return _train_streams(config, streams, out, launch, resume, device, show_progress, told)
    runs = site_runs(config, streams, out, resume=resume, report_to=told)
    try:
        return _train_together(
            config, runs, model, tokenizer, Path(out), device, show_progress, keep_activations
        )
    finally:
        end_runs(runs)


def _train_together(
    config: RunConfig,
    runs: list[SiteRun],
    model: Any,
    tokenizer: Any,
    out: Path,
    device: str,
    show_progress: bool,
    keep_activations: bool,
) -> list[RunFolder]:
    """Train several sites from one harvest, where there is room for it; a single one from the model."""
    folder, temporary = out / ACTIVATIONS, out / _TEMPORARY
    open_runs = sum(not run.folder.result_file.exists() for run in runs)
    shared = None
    if open_runs > 1 or (open_runs and len(runs) > 1 and folder.exists()):
        _mark(temporary, there=not keep_activations)
        shared = share_harvest(config, model, tokenizer, folder, show_progress=show_progress)
    if shared is None:
        folders = train_sites(runs, device=device, show_progress=show_progress)
        _end_sharing(folder, temporary)
        return folders
    runs = [dataclasses.replace(run, stream=shared.stream(run.stream.site)) for run in runs]
    folders = train_sites(runs, device=device, show_progress=show_progress)
    _end_sharing(folder, temporary)
    return folders


def _mark(temporary: Path, there: bool) -> None:
    """Say on disk whether shared activations go when the last site is done, as we may not live to see it."""
    try:
        if there:
            temporary.touch()
        else:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise unwritable(temporary, error) from None


def _end_sharing(folder: Path, temporary: Path) -> None:
    if temporary.exists():
        remove_folder(folder)
        temporary.unlink()


def _train_streams(
    config: RunConfig,
    streams: Sequence[SiteStream],
    out: str | Path,
    launch: Launch,
    resume: bool,
    device: str,
    show_progress: bool,
    report_to: Sequence[Reporter],
) -> list[RunFolder]:
    """Train this process's share of the sites, alone or with the other ranks."""
    shared = launch.shared(config.run.parallel, len(streams))
    share = slice(launch.rank, None, launch.size) if shared == "sites" else slice(None)
    with _group(shared, launch, device) as group:
        runs = site_runs(config, streams, out, resume=resume, share=share, group=group, report_to=report_to)
        try:
            shown = show_progress and launch.rank == 0
            return train_sites(runs, device=device, show_progress=shown, group=group)
        finally:
            end_runs(runs)


def _group(shared: str, launch: Launch, device: str) -> AbstractContextManager[Group]:
    """The ranks that train each site together."""
    if shared == "sites" or launch.size == 1:
        return nullcontext(Group())
    from ndm_fast.distributed import together  # one process has no use for torch.distributed

    return together(shared, device)


def site_runs(
    config: RunConfig,
    streams: Sequence[SiteStream],
    out: str | Path,
    *,
    resume: bool = False,
    share: slice = slice(None),
    group: Group | None = None,
    report_to: Sequence[Reporter] = (),
) -> list[SiteRun]:
    """A run per stream; their folders are claimed, or taken up, until :func:`end_runs`.

    Args:
        config: ``harvest.site`` names the streams' sites in their order.
        out, resume: see :func:`train_run`.
        share: which of the streams are this process's.
        group: the ranks that train each of them together.
        report_to: who is told of each run.

    Raises:
        InputError: the settings do not fit an activation's width, or a folder holds something else.
    """
    ranks = (group or Group()).all
    for stream in streams:
        config.train.widths(stream.width)
    runs = []
    sites: list[tuple[str, ...]] = [(site,) for site in config.harvest.site] or [()]  # none: rows of a file
    for asked, stream in list(zip(sites, streams, strict=True))[share]:
        one = dataclasses.replace(config, harvest=dataclasses.replace(config.harvest, site=asked))
        folder = RunFolder(out if len(streams) == 1 else Path(out) / stream.site)
        runs.append(SiteRun(one, folder, stream, report_to))
        try:
            ranks.first(partial(folder.begin, one, resume=resume))
            if isinstance(stream, RowStream):
                ranks.first(partial(note_rows, folder.rows_file, stream.file))
        except BaseException:
            end_runs(runs)
            raise
    return runs


def end_runs(runs: Sequence[SiteRun]) -> None:
    """Let other processes have the folders of runs."""
    for run in runs:
        run.folder.end()


def train_sites(
    runs: Sequence[SiteRun],
    *,
    device: str = "cpu",
    show_progress: bool = True,
    group: Group | None = None,
) -> list[RunFolder]:
    """Train what is not finished, one after the other, with one progress bar.

    Args:
        runs: of this process; may be none.
        group: the ranks that train each of them together.

    Returns:
        The folders that this process wrote.

    Raises:
        InputError, StoppedError, RanksError: see :func:`train_run`.
    """
    if not runs:
        return []
    group = group or Group()
    progress = Progress(len(runs), runs[0].config.train.max_steps, show_progress)
    try:
        for number, run in enumerate(runs):
            done, saved = group.all.first(partial(standing, run.folder))
            if not done:
                train_one(run, saved, number, progress, device, group, several=len(runs) > 1)
    finally:
        progress.close()
    return [run.folder for run in runs if group.all.rank == 0]
