"""Run a model on a few tokens, and record what goes in and out of the modules of its blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ndm_fast.activations.site import End
from ndm_fast.activations.site_hooks import first_tensor, input_place
from ndm_fast.activations.wrappers import describe, input_device, text_config, without_compiler
from ndm_fast.errors import InputError

ROWS, LENGTH, LONGER = 2, 8, 12
"""Rows and tokens that a model is run on, and another length, to see what grows with it."""


class Run(Protocol):
    """One forward pass on a few tokens; ends early where a hook raises :class:`Enough`."""

    def __call__(self, length: int = LENGTH) -> None:
        """Run rows of so many tokens."""


class Enough(Exception):  # noqa: N818 - not an error, the way out of a forward pass
    """Raised inside a model when all was recorded."""


@dataclass(frozen=True)
class Record:
    """What went into a module or came out of it, the first tensor of it."""

    module: str
    """Path inside the block; "" for the block itself."""
    end: End
    value: Tensor
    order: int
    """Place in the order of the run."""
    flat: bool = False
    """The module's own tensor is [B T, d]."""


@dataclass
class BlockTrace:
    """The records of one block, as long as they have the shape of the residual stream."""

    pre: Tensor
    post: Tensor
    records: list[Record] = field(default_factory=list)


@contextmanager
def runs(model: nn.Module) -> Iterator[Run]:
    """Run the model without gradients, without dropout and outside of compiled code.

    Raises:
        InputError: it cannot run on tokens alone.
    """
    training = [module for module in model.modules() if module.training]
    vocabulary = getattr(text_config(model), "vocab_size", None) or 100
    device = input_device(model)
    ways: list[dict[str, Any]] = [{"attention_mask": True, "use_cache": False}, {"attention_mask": True}, {}]

    def run(length: int = LENGTH) -> None:
        tokens = (torch.arange(ROWS * length, device=device) * 7 + 11) % min(int(vocabulary), 1000)
        tokens = tokens.view(ROWS, length)
        while True:
            options = dict(ways[0])
            if "attention_mask" in options:
                options["attention_mask"] = torch.ones_like(tokens)
            try:
                with suppress(Enough):
                    model(input_ids=tokens, **options)
                return
            except Exception as error:  # a model's own code raises whatever it likes
                if len(ways) == 1:
                    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                    raise InputError(
                        f"{describe(model)} cannot run on {ROWS} x {length} tokens alone "
                        f"({type(error).__name__}: {reason}), so its named sites are not known: give "
                        "a module path"
                    ) from None
                ways.pop(0)

    model.eval()
    try:
        with torch.no_grad(), without_compiler(model):
            yield run
    finally:
        for module in training:
            module.training = True


@contextmanager
def recording(
    modules: Iterable[tuple[str, nn.Module]], note: Callable[[str, End, Tensor], None]
) -> Iterator[None]:
    """Tell ``note`` the path, the end and the first tensor of every call of some modules."""
    with ExitStack() as hooks:
        for path, module in modules:

            def before(_: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
                where, key = input_place(args, kwargs)
                if key is not None and isinstance(where[key], Tensor):
                    note(path, "input", where[key])

            def after(_: nn.Module, args: Any, output: Any, path: str = path) -> None:
                key = first_tensor(output)
                value = output if isinstance(output, Tensor) else None if key is None else output[key]
                if value is not None:
                    note(path, "output", value)

            hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(after).remove)
        yield


def block_ends(
    model: nn.Module, paths: list[str], run: Run, length: int = LENGTH
) -> dict[str, list[tuple[int, End, Tensor]]]:
    """By list of blocks: (block, end, tensor) of every call, in order."""
    found: dict[str, list[tuple[int, End, Tensor]]] = {path: [] for path in paths}
    blocks = [
        (f"{p}.{name}", block) for p in paths for name, block in model.get_submodule(p).named_children()
    ]

    def note(path: str, end: End, value: Tensor) -> None:
        where, _, number = path.rpartition(".")
        found[where].append((int(number), end, value.detach().clone()))

    with recording(blocks, note):
        run(length)
    return found


def record_block(block: nn.Module, run: Run, stop: bool = True) -> BlockTrace:
    """The records of one block in a run that ends after it."""
    calls: dict[tuple[str, End], list[Record]] = {}
    order = iter(range(1_000_000))

    def note(path: str, end: End, value: Tensor) -> None:
        calls.setdefault((path, end), []).append(Record(path, end, value.detach().clone(), next(order)))
        if not path and end == "output" and stop:
            raise Enough

    with recording(block.named_modules(), note):
        run()
    pre, post = calls[("", "input")][0].value, calls[("", "output")][0].value
    once = (found[0] for found in calls.values() if len(found) == 1)
    inside = (_in_shape(r, pre.shape) for r in once if r.module and r.value.is_floating_point())
    return BlockTrace(pre, post, sorted((r for r in inside if r is not None), key=lambda r: r.order))


def _in_shape(found: Record, shape: torch.Size) -> Record | None:
    """The record, where it has the shape of the stream, or the same with all tokens in one row."""
    if found.value.shape == shape:
        return found
    if found.value.shape == (shape[0] * shape[1], shape[2]):
        return Record(found.module, found.end, found.value.view(shape), found.order, flat=True)
    return None
