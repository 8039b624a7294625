"""The version of a model that a partition belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ndm_fast.config import HubOptions
from ndm_fast.errors import InputError


def trained_on(name: str, hub: HubOptions | None, *sources: Mapping[str, Any]) -> HubOptions:
    """Arguments of ``load_model`` beside the name; the revision is by default the partitions' own.

    Whether the model's code may run is never taken from a partition, which may be somebody else's.

    Args:
        hub: what was asked for.
        sources: of the partitions.

    Raises:
        InputError: partitions of several revisions, and none was asked for.
    """
    given: HubOptions = {"revision": None, "trust_remote_code": False, **(hub or {})}
    if given["revision"] is None:
        found = {s.get("harvest", {}).get("revision") for s in sources if s.get("model") == name}
        if len(found) > 1:
            names = ", ".join(sorted(revision or "main" for revision in found))
            raise InputError(
                f"the partitions were trained on several revisions of {name} ({names}): pass --revision"
            )
        given["revision"] = next(iter(found), None)
    return given
