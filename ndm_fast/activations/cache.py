"""ActivationCache: harvested activations on disk, with their tokens, ready to be trained on.

A folder with ``manifest.json`` and a folder per site of ``rows-00000.safetensors`` ... Each of these shards
holds the same number of the harvest's batches (the last one fewer): ``rows`` [n, d] and, as int32 [n], the
columns of ``TokenRows``. Shards are mapped into memory, not read, and keep the boundaries of the batches, so
that training from a cache is training from the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ndm_fast.activations.rows import TokenRows
from ndm_fast.activations.sites import canonical_name
from ndm_fast.config import HarvestConfig, from_flat
from ndm_fast.errors import InputError
from ndm_fast.files import digest, read_json

FORMAT = 1
"""Of the files; a cache of another format is refused."""


MANIFEST = "manifest.json"


COLUMNS = TokenRows._fields[1:]
"""Names of the token columns beside ``rows`` in a shard."""


_MANIFEST = {
    "format": int,
    "complete": bool,
    "settings": {"site": [str]},
    "rows": int,
    "dtype": str,
    "sites": {str: {"width": int, "scale": object}},
    "shard_mib": float,
    "batches_per_shard": int,
    "text_skipped": {str: int},
    "shards": [{str: {"batches": [int], "outliers": [int], "bytes": int, "sha256": str}}],
}


class ActivationCache:
    """A finished harvest.

    Every shard's checksum is compared when it is first read, once for the life of this object.

    Args:
        folder: as given to ``ndm-fast harvest``.
        partial: take a harvest that is not finished as it is now.

    Raises:
        InputError: there is none, it is not finished, or a shard is missing or cut; the message names it.
    """

    def __init__(self, folder: str | Path, *, partial: bool = False) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        held = held_rows(self.manifest)
        if not self.manifest["complete"] and not (partial and held):
            raise InputError(
                f"the harvest in {self.folder} is not finished ({held} of {self.manifest['rows']} rows): "
                f"{remedy(self.folder)}" + (", --partial trains on the rows there are" if held else "")
            )
        for shard in self.manifest["shards"]:
            for name, about in shard.items():
                check_size(self.folder, name, about)
        self.config: HarvestConfig = from_flat(self.manifest["settings"]).harvest
        """What was harvested; ``site`` holds canonical names."""
        self._verified: set[str] = set()

    @property
    def sites(self) -> list[str]:
        """The sites in their canonical form."""
        return list(self.manifest["sites"])

    def stream(self, site: str, *, repeat: bool = False) -> CachedActivations:
        """The activations of a site, in the batches of the harvest.

        Args:
            site: its canonical or short name; a module path as the manifest has it.
            repeat: start over at the end.

        Raises:
            InputError: it was not harvested.
        """
        name = canonical_name(site)
        if name not in self.sites:
            raise InputError(
                f"{self.folder} holds no activations of {site!r}: take one of {', '.join(self.sites)}, or "
                "harvest that site into another folder"
            )
        return CachedActivations(self, name, repeat)

    def shard(self, number: int, site: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Mapped tensors of a shard, and what the manifest says about it.

        Raises:
            InputError: its checksum does not match.
        """
        name = shard_name(site, number)
        about = self.manifest["shards"][number][name]
        if name not in self._verified:
            check_size(self.folder, name, about)
            if digest(self.folder / name) != about["sha256"]:
                raise damaged(self.folder, name, "its checksum does not match")
            self._verified.add(name)
        try:
            with safe_open(self.folder / name, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, about  # noqa: SIM118 - no mapping
        except (OSError, SafetensorError) as error:
            raise damaged(self.folder, name, str(error)) from None


class CachedActivations:
    """Activations of one site in a cache: a ``pool.Stream``, as ``harvest.ActivationStream`` is one."""

    def __init__(self, cache: ActivationCache, site: str, repeat: bool = False) -> None:
        about = cache.manifest["sites"][site]
        self.site, self.width = site, int(about["width"])
        self.outliers_dropped = 0
        self.text_skipped: dict[str, int] = dict(cache.manifest["text_skipped"])
        self._cache, self._repeat, self._scale = cache, repeat, about["scale"]
        self._shards = len(cache.manifest["shards"])
        self._batches_per_shard = int(cache.manifest["batches_per_shard"])

    def batches(self, start: int = 0) -> Iterator[Tensor]:
        """[n, d] activations, from batch number ``start`` of the harvest on; views of mapped memory."""
        for rows in self.token_rows(start):
            yield rows.activations

    def token_rows(self, start: int = 0) -> Iterator[TokenRows]:
        """As :meth:`batches`, with the tokens that the activations belong to."""
        if self._repeat:
            last = self._cache.manifest["shards"][-1][shard_name(self.site, self._shards - 1)]
            start %= (self._shards - 1) * self._batches_per_shard + len(last["batches"])
        first, skipped = divmod(start, self._batches_per_shard)
        while True:
            for number in range(first, self._shards):
                yield from self._read(number, skipped)
                skipped = 0
            if not self._repeat:
                return
            first = 0

    def _read(self, number: int, skipped: int) -> Iterator[TokenRows]:
        tensors, about = self._cache.shard(number, self.site)
        sizes = about["batches"]
        columns = [tensors[name].split(sizes) for name in ("rows", *COLUMNS)]
        for batch in range(skipped, len(sizes)):
            self.outliers_dropped += about["outliers"][batch]
            rows, *labels = (column[batch] for column in columns)
            activations = rows if self._scale == 1 else rows.float() / self._scale
            yield TokenRows(activations, *(label.long() for label in labels))


def shard_name(site: str, number: int) -> str:
    """Path of a shard below the cache's folder."""
    return f"{site}/rows-{number:05}.safetensors"


def held_rows(manifest: dict[str, Any]) -> int:
    """Rows that every site has in the shards so far."""
    return min(
        sum(sum(shard[shard_name(site, n)]["batches"]) for n, shard in enumerate(manifest["shards"]))
        for site in manifest["sites"]
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a cache, finished or not.

    Raises:
        InputError: there is none, or it is damaged.
    """
    try:
        again = f"delete {folder} and harvest anew"
        manifest = read_json(folder / MANIFEST, {"format": int}, remedy=again)
        if manifest["format"] != FORMAT:
            raise InputError(
                f"the activations in {folder} have format {manifest['format']}, not {FORMAT}: harvest "
                "them anew"
            )
        return read_json(folder / MANIFEST, _MANIFEST, remedy=again)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{folder} holds no activations (it has no {MANIFEST}): make them with `ndm-fast harvest`"
        ) from None


def check_size(folder: Path, name: str, about: dict[str, Any]) -> None:
    """Refuse a shard that is missing or has another length than was written."""
    path = folder / name
    if not path.is_file():
        raise damaged(folder, name, "missing")
    if path.stat().st_size != about["bytes"]:
        raise damaged(folder, name, f"{path.stat().st_size} bytes instead of {about['bytes']}")


def damaged(folder: Path, name: str, why: str) -> InputError:
    """The error for a shard that is not as it was written."""
    return InputError(f"the shard {folder / name} is damaged ({why}): {remedy(folder)}")


def remedy(folder: Path) -> str:
    """What mends a cache."""
    return f"`ndm-fast harvest --out {folder} --resume` writes what is missing or damaged"
