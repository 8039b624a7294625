"""A folder for an ``ActivationCache``: what a harvest notes down, and where it may begin or go on."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ndm_fast.activations.cache import COLUMNS, FORMAT, MANIFEST, held_rows, read_manifest
from ndm_fast.activations.stream import Harvester
from ndm_fast.config import HarvestConfig, RunConfig
from ndm_fast.errors import InputError
from ndm_fast.files import sweep, unwritable, write_json
from ndm_fast.locks import is_trace, locked
from ndm_fast.provenance import provenance

_COLUMN_BYTES = 4 * len(COLUMNS)


def new_manifest(
    harvester: Harvester, config: HarvestConfig, rows: int, dtype: str, shard_mib: float
) -> dict[str, Any]:
    """The manifest of a harvest that has not begun.

    Raises:
        InputError: no rows, or no size of a shard.
    """
    if rows < 1:
        raise InputError(f"rows is {rows}: give at least 1")
    if not shard_mib > 0:
        raise InputError(f"shard_mib is {shard_mib}: give a number above 0")
    names = [field.name for field in dataclasses.fields(HarvestConfig)]
    flat = RunConfig(harvest=config).flat()
    about = provenance()
    batch_bytes = harvester.largest_batch * max(harvester.widths.values()) * getattr(torch, dtype).itemsize
    return {
        "format": FORMAT,
        "complete": False,
        "settings": {**{name: flat[name] for name in names}, "site": list(harvester.widths)},
        "rows": rows,
        "dtype": dtype,
        "sites": {site: {"width": width, "scale": None} for site, width in harvester.widths.items()},
        "shard_mib": shard_mib,
        "batches_per_shard": max(1, int(shard_mib * 2**20) // batch_bytes),
        "text_skipped": {},
        "made_with": {"versions": about["versions"], "commit": about["commit"]},
        "shards": [],
    }


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """No other process harvests into the folder meanwhile; one that stays empty is removed again.

    Raises:
        InputError: another process does, or the folder cannot be made.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} exists and holds no activations: choose another --out")
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from None
    try:
        with locked(folder):
            yield
    finally:
        if made:
            with suppress(OSError):  # not empty
                folder.rmdir()


def claim(folder: Path, new: dict[str, Any], *, resume: bool, quiet: bool = False) -> dict[str, Any]:
    """Begin a harvest in a folder, or go on with the one that is in it; says what will be written.

    Args:
        new: what is to be harvested, from :func:`new_manifest`.

    Returns:
        The manifest to go on with.

    Raises:
        InputError: the folder holds something else, or the disk has no room; nothing is changed then.
    """
    begun = read_manifest(folder) if (folder / MANIFEST).exists() else None
    if begun is not None and begun["shards"]:
        if not resume:
            raise InputError(
                f"{folder} holds activations already: pass --resume to go on with them, or another --out"
            )
        _check_same(folder, begun, new)
        begun["rows"] = min(begun["rows"], new["rows"])  # it may end earlier than was planned
    elif begun is None and not _is_free(folder, new):
        raise InputError(f"{folder} exists and holds no activations: choose another --out")
    manifest = begun if begun is not None and begun["shards"] else new
    _check_space(folder, manifest, quiet)
    try:
        if begun is not None and manifest is new:  # begun before, but nothing was saved
            for site in begun["sites"]:
                shutil.rmtree(folder / site, ignore_errors=True)
        for site in manifest["sites"]:
            (folder / site).mkdir(parents=True, exist_ok=True)
        sweep(folder)
    except OSError as error:
        raise unwritable(folder, error) from None
    if manifest is new:
        write_json(folder / MANIFEST, new, seal=True)
    return manifest


def _check_same(folder: Path, begun: dict[str, Any], new: dict[str, Any]) -> None:
    names = ("dtype", "batches_per_shard")
    before = {**begun["settings"], **{name: begun[name] for name in names}}
    asked = {**new["settings"], **{name: new[name] for name in names}}
    for name in asked:
        if asked[name] != before.get(name):
            raise InputError(
                f"{folder} holds another harvest ({name} is {before.get(name)!r}, asked for "
                f"{asked[name]!r}): choose another --out, or delete it"
            )

    if new["rows"] > begun["rows"]:
        raise InputError(
            f"{folder} holds a harvest of {begun['rows']} rows, asked for {new['rows']}: ask for as many or "
            "fewer, or choose another --out"
        )


def _is_free(folder: Path, new: dict[str, Any]) -> bool:
    """Whether there is nothing but what a harvest leaves that was killed before its first manifest."""

    def leftover(path: Path) -> bool:
        if path.is_dir():
            return path.name in new["sites"] and not any(path.iterdir())
        return is_trace(path)

    return not folder.exists() or (folder.is_dir() and all(map(leftover, folder.iterdir())))


def _check_space(folder: Path, manifest: dict[str, Any], quiet: bool) -> None:
    widths = {site: about["width"] for site, about in manifest["sites"].items()}
    missing = max(0, manifest["rows"] - held_rows(manifest))
    needed, free = cache_bytes(widths, missing, manifest["dtype"]), free_bytes(folder)
    if needed > free:
        raise InputError(
            f"{missing} rows of {len(widths)} site(s) take {needed / 2**30:.2f} GiB, and {free / 2**30:.2f} "
            f"GiB are free in {folder}: lower --rows, set --store-dtype bfloat16, or choose another disk"
        )
    if not quiet:
        tqdm.write(f"{needed / 2**30:.2f} GiB will be written to {folder}", file=sys.stderr)


def cache_bytes(widths: dict[str, int], rows: int, dtype: str) -> int:
    """Bytes on disk of ``rows`` activations of every site."""
    size = getattr(torch, dtype).itemsize
    return rows * sum(width * size + _COLUMN_BYTES for width in widths.values())


def free_bytes(folder: Path) -> int:
    """Bytes free on the disk that a folder is on, or will be."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free
