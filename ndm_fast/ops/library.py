"""One declaration for each op gives the ``torch.library`` op, its fake kernel and the way to a backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from inspect import signature
from typing import Any

import torch
from torch._library.custom_ops import CustomOpDef

from ndm_fast.errors import InputError
from ndm_fast.ops.backends import load


def op(
    modules: Mapping[str, str], *, mutates: tuple[str, ...] = ()
) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Declare ``torch.ops.ndm_fast.NAME`` by a function ``_NAME`` that makes its outputs, unfilled.

    That function gives the schema, and is the fake kernel by which torch traces the op. Its last parameter is
    ``backend``. The op itself calls the function NAME of the backend's module, all arguments by name. It
    checks nothing: the public function does.

    Args:
        modules: backend -> the module of ``ndm_fast`` that has the function, imported at the first call.
        mutates: arguments that are changed in place.
    """

    def declare(outputs: Callable[..., Any]) -> CustomOpDef:
        name = outputs.__name__.removeprefix("_")
        parameters = list(signature(outputs).parameters)
        assert parameters[-1] == "backend", name

        @wraps(outputs)
        def run(*arguments: Any) -> Any:
            given = dict(zip(parameters, arguments, strict=True))
            return implementation(modules, name, given.pop("backend"))(**given)

        schema = torch.library.infer_schema(outputs, mutates_args=mutates)
        declared = torch.library.custom_op(f"ndm_fast::{name}", run, mutates_args=mutates, schema=schema)
        declared.register_fake(outputs)
        return declared

    return declare


def implementation(modules: Mapping[str, str], name: str, backend: str) -> Callable[..., Any]:
    """A backend's function of this name.

    Raises:
        InputError: it has none.
    """
    if backend not in modules:
        raise InputError(f"backend {backend!r} has no {name}: use one of {', '.join(modules)}")
    found: Callable[..., Any] = getattr(load(modules[backend]), name)
    return found
