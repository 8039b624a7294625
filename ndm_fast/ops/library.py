"""One declaration for each op gives the ``torch.library`` op, its fake kernel and the way to a backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial, wraps
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

from ndm_fast.errors import InputError
from ndm_fast.geometry.precision import without_autocast
from ndm_fast.ops.backends import load

Run = Callable[..., Any]
"""A backend's function, which takes the arguments of the op by name."""


class Gradient(NamedTuple):
    """How an op is differentiated, as ``torch.library.register_autograd`` takes it."""

    keep: Callable[..., None]
    backward: Callable[..., Any]


def op(
    modules: Mapping[str, str],
    *,
    function: str = "",
    mutates: tuple[str, ...] = (),
    around: Callable[[Run, dict[str, Any]], Any] | None = None,
    gradient: Gradient | None = None,
) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Declare ``torch.ops.ndm_fast.NAME`` by a function ``_NAME`` that makes its outputs, unfilled.

    That function gives the schema, and is the fake kernel by which torch traces the op. Its last parameter is
    ``backend``. The op itself calls the function NAME of the backend's module, all arguments by name. It
    checks no shapes: the public function does.

    Args:
        modules: backend -> the module of ``ndm_fast`` that has the function, imported at the first call.
        function: its name there, where it is not NAME.
        mutates: arguments that are changed in place.
        around: gets the backend's function and the arguments, and gives the outputs. It may look at values,
            which does not break a graph of ``torch.compile``.
        gradient: of outputs that carry one; others refuse to be differentiated.
    """

    def declare(outputs: Callable[..., Any]) -> CustomOpDef:
        name = outputs.__name__.removeprefix("_")
        parameters = list(signature(outputs).parameters)
        assert parameters[-1] == "backend", name

        @wraps(outputs)
        def run(*arguments: Any) -> Any:
            given = dict(zip(parameters, arguments, strict=True))
            implemented = implementation(modules, function or name, given.pop("backend"))
            compute = partial(implemented, **given) if around is None else partial(around, implemented, given)
            return without_autocast(compute)

        schema = torch.library.infer_schema(outputs, mutates_args=mutates)
        declared = torch.library.custom_op(f"ndm_fast::{name}", run, mutates_args=mutates, schema=schema)
        declared.register_fake(outputs)
        if gradient is not None:
            declared.register_autograd(gradient.backward, setup_context=gradient.keep)
        return declared

    return declare


class Direct:
    """A backend's function for a loop, called without the op around it.

    The op takes the host 30 us a call or more, this some 8. Results are the same; none carries a gradient.
    Arguments are checked, and the backend is chosen, at the first call of each form: which shapes, strides,
    types and devices tensors have, and what else is given, apart from the values of numbers.

    Args:
        modules: as for :func:`op`.
        name: of the function there.
        check: takes what it takes, all by name; gives the backend.
    """

    def __init__(self, modules: Mapping[str, str], name: str, check: Callable[..., str]) -> None:
        self._modules, self._name, self._check = modules, name, check
        self._runs: dict[tuple[object, ...], Run] = {}

    @torch.no_grad()
    def __call__(self, **given: Any) -> Any:
        form = tuple(zip(given, map(_form, given.values()), strict=True))
        run = self._runs.get(form)
        if run is None:
            run = implementation(self._modules, self._name, self._check(**given))
            self._runs[form] = run
        return without_autocast(partial(run, **given))


def _form(value: Any) -> object:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, float):
        return float
    return tuple(value) if isinstance(value, list) else value


def implementation(modules: Mapping[str, str], name: str, backend: str) -> Callable[..., Any]:
    """A backend's function of this name.

    Raises:
        InputError: it has none.
    """
    if backend not in modules:
        raise InputError(f"backend {backend!r} has no {name}: use one of {', '.join(modules)}")
    found: Callable[..., Any] = getattr(load(modules[backend]), name)
    return found
