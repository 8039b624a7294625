"""Import of a package that an adapter needs."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ndm_fast.errors import InputError


def needed(package: str, extra: str) -> Any:
    """The package, imported now.

    Args:
        extra: of ndm-fast that installs it.

    Raises:
        InputError: it is not installed, or cannot be imported.
    """
    try:
        return import_module(package)
    except ImportError as error:
        if getattr(error, "name", None) == package:
            raise InputError(
                f"this adapter needs {package}, which is not installed: pip install 'ndm-fast[{extra}]'"
            ) from None
        raise InputError(
            f"{package} is installed but cannot be imported ({error}): pip install 'ndm-fast[{extra}]' has "
            "the versions that go together"
        ) from None
