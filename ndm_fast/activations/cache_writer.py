"""How an ``ActivationCache`` is made: one forward pass for all sites, shard after shard, resumable.

Shard ``k`` holds the harvest's batches from ``k * batches_per_shard`` on; the manifest names it once it is
whole. A harvest that was killed therefore goes on at the batch after the last whole shard, and ends with the
same bytes as one that was not.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm

from ndm_fast.activations.cache import (
    COLUMNS,
    MANIFEST,
    ActivationCache,
    check_size,
    damaged,
    held_rows,
    shard_name,
)
from ndm_fast.activations.cache_folder import alone_in, claim, new_manifest
from ndm_fast.activations.rows import HarvestedRows, fitting_scale
from ndm_fast.activations.stream import Harvester
from ndm_fast.config import HarvestConfig
from ndm_fast.errors import InputError, StoppedError
from ndm_fast.files import digest, write_atomic, write_json
from ndm_fast.signals import stop_on_signal

SHARD_MIB = 64.0
"""Size of a site's shard; a kill loses at most one of them."""


def harvest_cache(
    harvester: Harvester,
    config: HarvestConfig,
    folder: str | Path,
    rows: int,
    *,
    store_dtype: str | None = None,
    shard_mib: float = SHARD_MIB,
    resume: bool = False,
    show_progress: bool = True,
    go_on: str | None = None,
) -> ActivationCache:
    """Harvest all of a harvester's sites into a folder.

    Args:
        config: what the harvester was made with, for the manifest; ``text_seed`` resolved.
        rows: activations of each site; whole batches are stored, so there may be a few more, and fewer only
            where the text ends.
        store_dtype: of the stored rows; default: the dtype the model runs in, which stores them as they are.
        shard_mib: size of a shard, MiB.
        resume: go on with what is there and write damaged shards anew; start where there is nothing.
        go_on: what to advise when stopped; default: the command to resume with.

    Raises:
        InputError: the folder holds something else; not enough space; a value overflows; no activations.
        StoppedError: Ctrl-C or SIGTERM; whole shards are saved.
    """
    folder = Path(folder)
    manifest = new_manifest(harvester, config, rows, store_dtype or config.dtype, shard_mib)
    with alone_in(folder):
        manifest = claim(folder, manifest, resume=resume, quiet=not show_progress)
        writer = _Writer(harvester, folder, manifest)
        advice = go_on or f"`ndm-fast harvest --out {folder} --resume`"
        with stop_on_signal() as stop, _bar(rows, show_progress) as bar:
            try:
                writer.mend(stop)
                bar.update(held_rows(writer.manifest))
                writer.go_on(stop, bar)
            except _Stopped:
                raise StoppedError(
                    f"stopped with {held_rows(writer.manifest)} of {rows} rows saved: go on with {advice}"
                ) from None
    return ActivationCache(folder)


class _Stopped(Exception):  # noqa: N818 - not an error
    """A stop was asked for."""


def _bar(rows: int, show: bool) -> Any:
    return tqdm(total=rows, desc="harvest", unit="activation", unit_scale=True, disable=not show)


class _Writer:
    """Writes shards and, after each, the manifest."""

    def __init__(self, harvester: Harvester, folder: Path, manifest: dict[str, Any]) -> None:
        self.manifest = manifest
        self._harvester, self._folder = harvester, folder
        self._dtype = getattr(torch, manifest["dtype"])
        self._size = int(manifest["batches_per_shard"])

    def mend(self, stop: threading.Event) -> None:
        """Write shards anew that are damaged or missing."""
        for number, shard in enumerate(self.manifest["shards"]):
            if all(self._whole(name, about) for name, about in shard.items()):
                continue
            found = []
            count = len(next(iter(shard.values()))["batches"])
            for batch in islice(self._harvester.batches(number * self._size), count):
                if stop.is_set():
                    raise _Stopped
                found.append(batch)
            for site in self.manifest["sites"]:
                if [len(one[site].rows.token) for one in found] != shard[shard_name(site, number)]["batches"]:
                    raise self._text_changed()
            self.manifest["shards"][number] = self._write(number, found)
            self._save()

    def go_on(self, stop: threading.Event, bar: Any) -> None:
        """Harvest what is missing and mark the cache as complete."""
        if self.manifest["complete"]:
            return
        shards = self.manifest["shards"]
        held = {
            site: sum(sum(shard[shard_name(site, n)]["batches"]) for n, shard in enumerate(shards))
            for site in self.manifest["sites"]
        }
        pending: list[dict[str, HarvestedRows]] = []
        if min(held.values()) < self.manifest["rows"]:
            for found in self._batches(len(shards)):
                if stop.is_set():
                    raise _Stopped
                pending.append(found)
                before = min(held.values())
                held = {site: held[site] + len(found[site].rows.token) for site in held}
                bar.update(min(held.values()) - before)
                if min(held.values()) >= self.manifest["rows"]:
                    break
                if len(pending) == self._size:
                    self._add(pending)
        if min(held.values()) == 0:
            raise InputError("the text gave no activations: give more text, or lower --context-length")
        # Together with the last shard, which may hold fewer batches: what is gone on with has whole ones.
        self.manifest["complete"] = True
        self.manifest["text_skipped"] = self._harvester.text_skipped
        self._add(pending)

    def _batches(self, shards: int) -> Iterator[dict[str, HarvestedRows]]:
        """The batches after those shards, where the last one's last batch still has the same tokens."""
        batches = self._harvester.batches(max(0, shards * self._size - 1))
        if shards:
            last = next(batches, None)
            for site in self.manifest["sites"]:
                tokens = load_file(self._folder / shard_name(site, shards - 1))["token"]
                count = self.manifest["shards"][-1][shard_name(site, shards - 1)]["batches"][-1]
                expected = tokens[len(tokens) - count :]
                if last is None or not torch.equal(last[site].rows.token.int(), expected):
                    raise self._text_changed()
        return batches

    def _text_changed(self) -> InputError:
        return InputError(
            f"the text {self.manifest['settings']['data']} has changed since {self._folder} was begun: "
            "harvest it anew into another folder"
        )

    def _add(self, pending: list[dict[str, HarvestedRows]]) -> None:
        shards = self.manifest["shards"]
        if pending:
            shards.append(self._write(len(shards), pending))
            pending.clear()
        self._save()

    def _save(self) -> None:
        write_json(self._folder / MANIFEST, self.manifest, seal=True)

    def _write(self, number: int, batches: list[dict[str, HarvestedRows]]) -> dict[str, dict[str, Any]]:
        """Write a shard of every site; what the manifest says about each file."""
        shard = {}
        for site in self.manifest["sites"]:
            found = [batch[site] for batch in batches]
            columns = {"rows": torch.cat([self._stored(site, one.rows.activations) for one in found])}
            columns |= {name: torch.cat([getattr(one.rows, name) for one in found]).int() for name in COLUMNS}
            content = save(columns)
            write_atomic(self._folder / shard_name(site, number), content)
            shard[shard_name(site, number)] = {
                "batches": [len(one.rows.token) for one in found],
                "outliers": [one.outliers for one in found],
                "bytes": len(content),
                "sha256": digest(content),
            }
        return shard

    def _stored(self, site: str, rows: Tensor) -> Tensor:
        """[n, d] rows as the shards hold them: in their dtype, where another one than the model's, scaled."""
        about = self.manifest["sites"][site]
        if len(rows) == 0:
            return rows.to("cpu", self._dtype)
        if about["scale"] is None:
            largest = float(rows.abs().max())
            about["scale"] = 1.0 if rows.dtype == self._dtype else fitting_scale(largest, self._dtype)
        stored = (rows * about["scale"]).to("cpu", self._dtype)
        if not stored.isfinite().all():
            raise InputError(
                f"an activation of {float(rows.abs().max()):.3g} at {site} overflows {self._dtype}: set "
                "--store-dtype bfloat16 or float32"
            )
        return stored

    def _whole(self, name: str, about: dict[str, Any]) -> bool:
        try:
            check_size(self._folder, name, about)
            if digest(self._folder / name) != about["sha256"]:
                raise damaged(self._folder, name, "its checksum does not match")
        except InputError as error:
            tqdm.write(f"ndm-fast: {error}", file=sys.stderr)
            return False
        return True
