"""Fields of a dataclass of settings: their types, the words they allow, and what is written below them."""

from __future__ import annotations

import ast
import inspect
import math
import textwrap
from contextlib import suppress
from functools import lru_cache
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ndm_fast.errors import InputError


@lru_cache
def kinds(cls: type) -> dict[str, Any]:
    """Field -> its type."""
    return get_type_hints(cls)


@lru_cache
def meanings(cls: type) -> dict[str, str]:
    """Field -> the text below it in the source of its class, on one line."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef)
    found: dict[str, str] = {}
    for one, below in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(one, ast.AnnAssign) and isinstance(below, ast.Expr):
            assert isinstance(one.target, ast.Name)
            found[one.target.id] = " ".join(str(ast.literal_eval(below.value)).split())
    return found


def alternatives(kind: Any) -> tuple[Any, ...]:
    """The types that a union is of; of any other type, itself."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def words(kind: Any) -> tuple[str, ...]:
    """The words that a type allows, where it is or holds a ``Literal``."""
    return tuple(word for one in alternatives(kind) if get_origin(one) is Literal for word in get_args(one))


def fitted(name: str, value: Any, kind: Any) -> Any:
    """A value of the type that a field is annotated with; a single item may stand for a tuple.

    Raises:
        InputError: it is of another type.
    """
    refused: InputError | None = None
    for one in alternatives(kind):
        if get_origin(one) is tuple:
            items = value if isinstance(value, list | tuple) else [value]
            try:
                return tuple(fitted(name, item, get_args(one)[0]) for item in items)
            except InputError as error:
                refused = refused or error
        elif one is float and isinstance(value, int | float | str) and not isinstance(value, bool):
            with suppress(ValueError):
                return float(value)  # YAML reads 3e-4 as a string
        elif type(value) is (str if get_origin(one) is Literal else one):
            return value
    names = [getattr(one, "__name__", str(one)) for one in alternatives(kind) if one is not type(None)]
    wanted = " or ".join(words(kind)) or f"a value of type {' or '.join(names)}"
    raise refused or InputError(f"{name} is {value!r}: give {wanted}, see `ndm-fast train --help`")


def check_words(group: Any) -> None:
    """Refuse words that a field's ``Literal`` does not have."""
    cls: Any = type(group)
    for name, kind in kinds(cls).items():
        value, allowed = getattr(group, name), words(kind)
        if allowed and isinstance(value, str) and value not in allowed:
            number = "a number or " if float in alternatives(kind) else "one of "
            raise InputError(f"{name} is {value!r}: take {number}{', '.join(allowed)}")


def check_positive(group: Any, *names: str) -> None:
    """Refuse fields that are not finite numbers above 0."""
    for name in names:
        value = getattr(group, name)
        if not 0 < value < math.inf:
            raise InputError(f"{name} is {value}: give a finite number above 0")
