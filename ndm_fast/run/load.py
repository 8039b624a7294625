"""A partition from whatever folder holds one."""

from __future__ import annotations

from pathlib import Path

from ndm_fast.partition import SubspacePartition
from ndm_fast.run.folder import RunFolder
from ndm_fast.run.published import import_published


def load_partition(path: str | Path) -> SubspacePartition:
    """A partition from a run's folder, a saved partition, a hub repository, or one of the authors' files."""
    path = Path(path)
    if path.suffix == ".pt":
        return import_published(path)
    folder = RunFolder(path)
    return (
        folder.partition()
        if folder.config_file.exists() and folder.log_file.exists()
        else (SubspacePartition.from_pretrained(str(path)))
    )
