"""Run a model on a few tokens, and record what goes in and out of the modules of its blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ndm_fast.activations.blocks import Block, Calls, Stacks
from ndm_fast.activations.layout import PLAIN, Layout
from ndm_fast.activations.site import End
from ndm_fast.activations.site_hooks import first_tensor, input_place
from ndm_fast.activations.wrappers import describe, input_device, text_config, without_compiler
from ndm_fast.errors import InputError

ROWS, LENGTH, LONGER = 2, 8, 12
"""Rows and tokens that a model is run on, and another length, to see what grows with it."""


_ENDS: tuple[End, End] = ("input", "output")


class Run(Protocol):
    """One forward pass on a few tokens; ends early where a hook raises :class:`Enough`."""

    def __call__(self, length: int = LENGTH, other: tuple[int, int] | None = None) -> None:
        """Run rows of so many tokens; ``other``: row and position of a token to put another for."""


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

    def run(length: int = LENGTH, other: tuple[int, int] | None = None) -> None:
        known = min(int(vocabulary), 1000)
        tokens = ((torch.arange(ROWS * length, device=device) * 7 + 11) % known).view(ROWS, length)
        if other is not None:
            tokens[other] = (tokens[other] + 1) % known
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


def calls_of(model: nn.Module, paths: Iterable[str], run: Run) -> Calls:
    """What some modules took and gave in a run, in order."""
    found: Calls = []
    with recording(
        ((path, model.get_submodule(path)) for path in paths),
        lambda path, end, value: found.append((path, end, value.detach().clone())),
    ):
        run()
    return found


def block_ends(
    stacks: Stacks, run: Run, length: int = LENGTH, other: tuple[int, int] | None = None
) -> dict[str, list[tuple[int, End, Tensor]]]:
    """By stack: (number of the block, end, the module's own tensor) of every call, in order."""
    found: dict[str, list[tuple[int, End, Tensor]]] = {name: [] for name in stacks}
    with ExitStack() as hooks:
        for name, blocks in stacks.items():
            numbers: dict[tuple[str, End], list[int]] = {}
            for number, block in enumerate(blocks):
                for end in _ENDS:
                    numbers.setdefault((block.path(block.end(end)), end), []).append(number)
            modules = {path: blocks[0].model.get_submodule(path) for path, _ in numbers}
            calls: Counter[tuple[str, End]] = Counter()

            def note(
                path: str, end: End, value: Tensor,
                name: str = name, numbers: Any = numbers, calls: Any = calls,
            ) -> None:  # fmt: skip
                mine = numbers.get((path, end))
                if mine is not None:
                    # A call beyond those that are known shows as one of the last block again.
                    number = mine[min(calls[path, end], len(mine) - 1)]
                    calls[path, end] += 1
                    found[name].append((number, end, value.detach().clone()))

            hooks.enter_context(recording(modules.items(), note))
        run(length, other)
    return found


def record_block(block: Block, run: Run, stop: bool = True) -> BlockTrace:
    """The records of one block in a run that ends after it."""
    calls: dict[tuple[str, End], list[Record]] = {}
    order = iter(range(1_000_000))
    first, last = block.end("input"), block.end("output")

    def note(path: str, end: End, value: Tensor) -> None:
        mine = calls.setdefault((path, end), [])
        mine.append(Record(path, end, value.detach().clone(), next(order)))
        if (path, end) == (last, "output") and stop and len(mine) > block.call:
            raise Enough

    with recording(block.modules(), note):
        run()
    pre, post = (calls[end][block.call].value for end in ((first, "input"), (last, "output")))
    own = (found[block.call] for found in calls.values() if len(found) == block.call + 1)
    inside = (_in_shape(r, pre.shape, block.layout) for r in own if r.module and r.value.is_floating_point())
    return BlockTrace(
        block.layout.view(pre),
        block.layout.view(post),
        sorted((r for r in inside if r is not None), key=lambda r: r.order),
    )


def _in_shape(found: Record, shape: torch.Size, layout: Layout) -> Record | None:
    """The text's part, where the tensor has the shape of the block's, or all tokens in one row."""
    if found.value.shape == shape:
        return replace(found, value=layout.view(found.value))
    if layout == PLAIN and found.value.shape == (shape[0] * shape[1], shape[2]):
        return replace(found, value=found.value.view(shape), flat=True)
    return None
