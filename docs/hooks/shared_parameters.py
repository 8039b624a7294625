"""For the API pages: a docstring's line for several parameters becomes a line for each."""

from __future__ import annotations

import re
from typing import Any

import griffe

_SHARED = re.compile(r"^ {4}(\w+(?:, \w+)+):(.*(?:\n {5,}\S.*)*)", re.M)


class SharedParameters(griffe.Extension):
    """Splits ``keys, queries: [N, d]`` under ``Args:``."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        if func.docstring:
            func.docstring.value = _SHARED.sub(_each, func.docstring.value)

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        if cls.docstring:
            cls.docstring.value = _SHARED.sub(_each, cls.docstring.value)


def _each(found: re.Match[str]) -> str:
    return "\n".join(f"    {name}:{found[2]}" for name in found[1].split(", "))
