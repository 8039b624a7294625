"""The attention heads of a block: with what each reads the stream, and through what it writes into it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SIDES = ("Q", "K", "V")
"""Where a head looks from, what it looks for, and what it takes along."""

_Hook = Callable[[nn.Module, Any, Tensor], Tensor]


@dataclass(frozen=True)
class Projection:
    """The part of a linear module that makes one side of every head."""

    module: nn.Module
    columns: Tensor
    """[H, c] int64 columns of the module's output; heads that share keys and values have the same ones."""


@dataclass(frozen=True)
class Heads:
    """The attention of one block."""

    block: int
    attention: nn.Module
    """The module that holds the projections."""
    norm: nn.Module | None
    """Of the block's input; None where the projections read the stream as it is."""
    sides: Mapping[str, Projection]
    side_norms: Mapping[str, nn.Module]
    """Norms of queries and keys, where there are any."""
    out: nn.Module
    """The linear module that all heads write through."""
    out_norm: nn.Module | None
    """Of what is written, before it is added."""
    scale: float
    """What is written is multiplied by this before it is added."""

    @property
    def count(self) -> int:
        """Heads H."""
        return len(self.sides["Q"].columns)

    @property
    def shared(self) -> int:
        """Heads that share one head of keys and values."""
        return self.count // len({row[0] for row in self.sides["K"].columns.tolist()})

    @property
    def slices(self) -> Tensor:
        """[H, c] inputs of ``out`` that hold each head's result."""
        width = self.sides["V"].columns.shape[1]
        return torch.arange(self.count * width).view(self.count, width)


@dataclass(frozen=True)
class Call:
    """How the model called the attention of a block, so that it can be called again with other inputs."""

    heads: Heads
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def results(self, inputs: Mapping[str, Tensor] | None = None) -> Tensor:
        """[N, T, H c] results of all heads; some sides may read other inputs than in the run.

        Args:
            inputs: side -> [N, T, d] what its projection reads instead, after the norm.
        """
        return self._run({side: self._rereading(side, new) for side, new in (inputs or {}).items()})

    def silenced(self, side: str, columns: Tensor) -> Tensor:
        """[N, T, H c] results of all heads, where some columns of a projection give 0."""

        def silence(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            return output.index_fill(-1, columns.to(output.device), 0.0)

        return self._run({side: silence})

    def written(self, results: Tensor) -> Tensor:
        """[N, T, d] what the attention adds to the stream, from results of all heads [N, T, H c]."""
        heads = self.heads
        output = heads.out.forward(results)
        return (output if heads.out_norm is None else heads.out_norm.forward(output)) * heads.scale

    def _rereading(self, side: str, new: Tensor) -> _Hook:
        columns = self.heads.sides[side].columns.unique()

        def reread(module: nn.Module, _: Any, output: Tensor) -> Tensor:
            chosen = columns.to(output.device)
            other = module.forward(new.to(output.dtype))
            return output.index_copy(-1, chosen, other.index_select(-1, chosen))

        return reread

    def _run(self, hooks: Mapping[str, _Hook]) -> Tensor:
        found: list[Tensor] = []
        with ExitStack() as stack:
            for side, hook in hooks.items():
                handle = self.heads.sides[side].module.register_forward_hook(hook)
                stack.callback(handle.remove)
            handle = self.heads.out.register_forward_pre_hook(lambda _, args: found.append(args[0]))
            stack.callback(handle.remove)
            output = self.heads.attention.forward(*self.args, **self.kwargs)
        # BERT's output matrix lies outside of the module that holds the projections.
        return found[0] if found else output[0]


@contextmanager
def calls(blocks: Sequence[Heads]) -> Iterator[dict[int, Call]]:
    """Note how the model calls some blocks' attention in a forward pass inside the ``with`` block."""
    found: dict[int, Call] = {}
    with ExitStack() as stack:
        for heads in blocks:

            def note(_: nn.Module, args: Any, kwargs: Any, heads: Heads = heads) -> None:
                found.setdefault(heads.block, Call(heads, args, kwargs))

            handle = heads.attention.register_forward_pre_hook(note, with_kwargs=True)
            stack.callback(handle.remove)
        yield found
