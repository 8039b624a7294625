"""One hook at one site: where the tensor is among a module's arguments or results, and how to change it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ndm_fast.activations.site import Site
from ndm_fast.errors import InputError


def register(
    model: nn.Module, site: Site, use: Callable[[Tensor], Tensor | None], *, first: bool = False
) -> Handles:
    """Call `use` with the activation at `site`; where it returns a tensor, the model goes on with that.

    `first` puts the hook before those already there: replacements come before readers, including the hooks
    with which transformers records `output_hidden_states`.
    """
    module = model.get_submodule(site.module)

    rows: list[int] = []
    turn = _Turn(site)

    def scaled(tensor: Tensor) -> Tensor | None:
        if site.is_whole_tensor:
            return use(tensor)
        shown = tensor.view(*rows, -1) if rows else site.layout.view(tensor)
        new = use(shown * site.scale if site.scale != 1 else shown)
        if new is None:
            return None
        new = new / site.scale if site.scale != 1 else new
        return new.view(tensor.shape) if rows else site.layout.put(tensor, new)

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        if not turn.is_it():
            return None
        where, key = input_place(args, kwargs)
        new = scaled(_tensor(where, key, site))
        if new is None:
            return None
        return (_with(args, key, new), kwargs) if where is args else (args, _with(kwargs, key, new))

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not turn.is_it():
            return None
        new = scaled(tensor_at(output, site))
        return None if new is None else with_tensor(output, new)

    def note_rows(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        where, key = input_place(args, kwargs)
        rows[:] = where[key].shape[:2]

    handles = Handles()
    if site.flat_in is not None:
        block = model.get_submodule(site.flat_in)
        handles.append(block.register_forward_pre_hook(note_rows, with_kwargs=True))
    if site.counted_in is not None:
        holder = model.get_submodule(site.counted_in)
        handles.append(holder.register_forward_pre_hook(turn.begin, prepend=True))
    if site.end == "input":
        handles.append(module.register_forward_pre_hook(before, prepend=first, with_kwargs=True))
    else:
        handles.append(module.register_forward_hook(after, prepend=first))
    return handles


class _Turn:
    """Counts the calls of a module that runs again and again, to tell which is the site's."""

    def __init__(self, site: Site) -> None:
        self._site, self._calls = site, 0

    def begin(self, *_: Any) -> None:
        """What calls the module begins."""
        self._calls = 0

    def is_it(self) -> bool:
        """Whether the call that is told is the site's."""
        if self._site.counted_in is None:
            return True
        self._calls += 1
        return self._calls - 1 == self._site.call


class Handles:
    """The hooks of one site."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []

    def append(self, handle: RemovableHandle) -> None:
        """Add a hook."""
        self._handles.append(handle)

    def remove(self) -> None:
        """Take them all away."""
        for handle in self._handles:
            handle.remove()


def input_place(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """(container, key) of the tensor that a module was called with: its first."""
    if args:
        return args, 0
    return kwargs, "hidden_states" if "hidden_states" in kwargs else first_tensor(kwargs)


def first_tensor(output: Any) -> Any:
    """Key or index of the first tensor in a tuple, list or mapping (transformers' ModelOutput); else None."""
    if isinstance(output, Mapping):
        return next((key for key, value in output.items() if isinstance(value, Tensor)), None)
    if isinstance(output, tuple | list):
        return next((i for i, value in enumerate(output) if isinstance(value, Tensor)), None)
    return None


def tensor_at(output: Any, site: Site) -> Tensor:
    """The activation in a module's output: the output itself, or its first tensor.

    Raises:
        InputError: there is none.
    """
    return output if isinstance(output, Tensor) else _tensor(output, first_tensor(output), site)


def with_tensor(output: Any, new: Tensor) -> Any:
    """A module's output with another tensor in the place of :func:`tensor_at`'s."""
    return new if isinstance(output, Tensor) else _with(output, first_tensor(output), new)


def _tensor(container: Any, key: Any, site: Site) -> Tensor:
    try:
        value = container[key]
    except (KeyError, IndexError, TypeError):
        value = None
    if not isinstance(value, Tensor):
        raise InputError(
            f"the {site.end} of {site.module!r} holds no activation (it is a {type(container).__name__}): "
            "name a module that takes and returns hidden states"
        )
    return value


def _with(container: Any, key: Any, value: Tensor) -> Any:
    """A shallow copy of `container` with `value` at `key`."""
    if isinstance(container, tuple):
        items = (*container[:key], value, *container[key + 1 :])
        return type(container)(*items) if hasattr(container, "_fields") else items
    changed = copy.copy(container)
    changed[key] = value
    return changed
