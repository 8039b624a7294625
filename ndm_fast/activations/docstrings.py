"""The built-in text: the docstrings of the Python that is running."""

from __future__ import annotations

import ast
import functools
import random
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

_SHORTEST = 80
"""Characters of a docstring that counts as a document."""


def docstrings(seed: int) -> Iterator[str]:
    """Shuffled as a whole, so that any stretch of the text is a fair sample of it."""
    texts = list(all_docstrings())
    random.Random(seed).shuffle(texts)
    return iter(texts)


@functools.cache
def all_docstrings() -> tuple[str, ...]:
    """Help topics and docstrings of Python's standard library, each once, sorted."""
    from pydoc_data.topics import topics

    root = Path(sysconfig.get_paths()["stdlib"])
    modules = (
        p for p in root.rglob("*.py") if not {"site-packages", "test", "tests", "idlelib"} & set(p.parts)
    )
    return tuple(
        sorted({text for module in modules for text in _docstrings_of(module)} | set(topics.values()))
    )


def _docstrings_of(module: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(module.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return  # some standard modules keep deliberately odd encodings
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) >= _SHORTEST:
                yield text
