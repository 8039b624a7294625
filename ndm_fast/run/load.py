"""A partition from whatever folder holds one."""

from __future__ import annotations

from pathlib import Path

from ndm_fast.partition import SubspacePartition
from ndm_fast.run.folder import RunFolder
from ndm_fast.run.published import import_published


def load_partition(path: str | Path) -> SubspacePartition:
    """A partition from a run's folder, a saved partition, a hub repository, or one of the authors' files.

    ``USER/NAME/HOOK`` is a folder of a repository that holds several.
    """
    path = Path(path)
    if path.suffix == ".pt":
        return import_published(path)
    user_name, hook = Path(*path.parts[:2]), Path(*path.parts[2:])
    if not path.is_absolute() and not path.exists() and hook.parts:
        return SubspacePartition.from_pretrained(str(user_name), subfolder=str(hook))
    folder = RunFolder(path)
    return (
        folder.partition()
        if folder.config_file.exists() and folder.log_file.exists()
        else (SubspacePartition.from_pretrained(str(path)))
    )
