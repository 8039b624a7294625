"""The blocks of a model: a module each, or parts of several lists, or the calls of one module."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from ndm_fast.activations.layout import PLAIN, Layout
from ndm_fast.activations.site import End, Site
from ndm_fast.activations.wrappers import text_config


@dataclass(frozen=True)
class Point:
    """A point inside a block: the tensor at an end of a module, times a constant."""

    module: str
    end: End
    scale: float = 1.0
    flat: bool = False
    """The tensor is [B T, d]."""


@dataclass(frozen=True)
class Block:
    """One block: a module, one call of a module, or modules that run one after the other."""

    model: nn.Module
    parts: tuple[tuple[str, str], ...]
    """(name inside the block, path in the model), in the order of the run; ("", path) of a single module."""
    layout: Layout = PLAIN
    in_place: bool = False
    """What is put in the place of its input must be written into the tensor, which is read elsewhere too."""
    call: int = 0
    """Which call of the modules it is, in one run of ``counted_in``."""
    counted_in: str | None = None
    """Path of a module that calls the block's modules several times; None where each is called once."""

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of its modules."""
        return tuple(path for _, path in self.parts)

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """(name inside the block, module) of everything in it."""
        for name, path in self.parts:
            for inner, module in self.model.get_submodule(path).named_modules():
                yield f"{name}.{inner}".strip("."), module

    def end(self, end: End) -> str:
        """Name inside the block of the module that the stream enters by, or leaves by."""
        return self.parts[0 if end == "input" else -1][0]

    def path(self, name: str) -> str:
        """Path in the model of a module inside the block."""
        for part, path in self.parts:
            if not part:
                return f"{path}.{name}".rstrip(".")
            if name == part or name.startswith(f"{part}."):
                return path + name.removeprefix(part)
        raise KeyError(name)

    def site(self, name: str, point: Point) -> Site:
        """The site of a point inside the block."""
        return Site(
            name,
            self.path(point.module or self.end(point.end)),
            point.end,
            point.scale,
            copied=True,
            flat_in=self.path(self.end("input")) if point.flat else None,
            layout=self.layout,
            skips=self.in_place and not point.module and point.end == "input",
            call=self.call,
            counted_in=self.counted_in,
        )


Stacks = dict[str, list[Block]]
"""By the path of the list that holds them, or the paths of the lists that hold their parts."""


def one_module(model: nn.Module, path: str) -> Block:
    """A block that is a module."""
    return Block(model, (("", path),))


def likely_blocks(model: nn.Module) -> list[str]:
    """Paths of lists with as many modules as the config says there are blocks, the heaviest first.

    Lists inside of such a list are left out. Where the config does not say, or no list is as long: all lists
    of two or more.
    """
    count = number_in_config(model)
    lists = {p: m for p, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    fitting = [p for p, m in lists.items() if len(m) == count] or [p for p, m in lists.items() if len(m) > 1]
    outer = [p for p in fitting if not any(p.startswith(f"{other}.") for other in fitting)]
    return sorted(outer, key=lambda p: -sum(w.numel() for w in lists[p].parameters()))


def number_in_config(model: nn.Module) -> int | None:
    """How many blocks the config says there are."""
    return getattr(text_config(model), "num_hidden_layers", None)


def stacks_of_modules(model: nn.Module, paths: list[str]) -> Stacks:
    """Of each list the blocks, each a module of it."""
    names = {path: [name for name, _ in model.get_submodule(path).named_children()] for path in paths}
    return {path: [one_module(model, f"{path}.{name}") for name in names[path]] for path in paths}


Calls = list[tuple[str, End, Tensor]]
"""(path, end, tensor) of the calls of some modules, in the order of a run."""


def part_paths(model: nn.Module, paths: list[str]) -> dict[str, tuple[int, str, str]]:
    """Path of what may be a part of a block -> (number of the block, name of the part, name of the stack).

    Parts are the modules with one number in all lists of one parent (XLM), or the children of a list's
    module, should that not be called itself (SqueezeBERT).
    """
    found: dict[str, tuple[int, str, str]] = {}
    beside = Counter(path.rpartition(".")[0] for path in paths)
    for path in paths:
        parent, _, name = path.rpartition(".")
        for number, (index, module) in enumerate(model.get_submodule(path).named_children()):
            if beside[parent] > 1:
                found[f"{path}.{index}"] = (number, name, parent)
                continue
            for child, _ in module.named_children():
                found[f"{path}.{index}.{child}"] = (number, child, path)
    return found


def stacks_of_parts(model: nn.Module, parts: dict[str, tuple[int, str, str]], calls: Calls) -> Stacks:
    """Blocks of parts that ran one after the other, each once and in the same order in each block."""
    orders: dict[str, dict[int, list[tuple[str, str]]]] = {}
    for path, end, _ in calls:
        number, name, stack = parts[path]
        if end == "input":
            orders.setdefault(stack, {}).setdefault(number, []).append((name, path))
    stacks: Stacks = {}
    for stack, blocks in orders.items():
        names = {tuple(name for name, _ in block) for block in blocks.values()}
        once = all(len(set(block)) == len(block) for block in blocks.values())
        if len(names) == 1 and once and list(blocks) == list(range(len(blocks))):
            stacks[stack] = [Block(model, tuple(block)) for block in blocks.values()]
    return stacks


def listed_paths(model: nn.Module) -> dict[str, str]:
    """Path of a module in any list -> path of what holds the list."""
    lists = (path for path, module in model.named_modules() if isinstance(module, nn.ModuleList))
    return {
        f"{path}.{name}": path.rpartition(".")[0]
        for path in lists
        for name, _ in model.get_submodule(path).named_children()
    }


def stacks_of_calls(model: nn.Module, holders: dict[str, str], calls: Calls) -> Stacks:
    """Blocks that are the calls of fewer modules than the config says there are blocks (ALBERT)."""
    count = number_in_config(model)
    order_of: dict[str, list[str]] = {}
    runs = Counter(path for path, end, _ in calls if end == "input")
    for path, end, _ in calls:
        if end == "input" and path in holders:
            order_of.setdefault(path.rpartition(".")[0], []).append(path)
    stacks: Stacks = {}
    for stack, order in order_of.items():
        if len(order) != count or len(set(order)) == count or runs[holders[order[0]]] != 1:
            continue
        numbers = [order[:place].count(path) for place, path in enumerate(order)]
        stacks[stack] = [
            Block(model, (("", path),), call=number, counted_in=holders[path])
            for path, number in zip(order, numbers, strict=True)
        ]
    return stacks
