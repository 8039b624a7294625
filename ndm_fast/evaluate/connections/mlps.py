"""The MLP of a block: with which matrices it reads the stream and writes into it, and how to run it again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ndm_fast.activations.block_points import close
from ndm_fast.activations.blocks import one_module
from ndm_fast.activations.sites import resolve_site
from ndm_fast.activations.trace import Enough, Record, Run, record_block, runs
from ndm_fast.activations.wrappers import unwrapped

_INPUTS = ("gate_proj", "up_proj", "gate_up_proj", "c_fc", "fc1", "fc_in", "dense_h_to_4h")
_OUTPUTS = ("down_proj", "c_proj", "fc2", "fc_out", "dense_4h_to_h")


@dataclass(frozen=True)
class Mlp:
    """The MLP of one block."""

    block: int
    holder: nn.Module
    """The module that holds the matrices."""
    norm: nn.Module | None
    inputs: tuple[nn.Module, ...]
    """All that read the stream: the up projection, and the gate where there is one."""
    out: nn.Module
    out_norm: nn.Module | None
    scale: float
    """What is written is multiplied by this before it is added."""


@dataclass(frozen=True)
class MlpCall:
    """How the model called the MLP of a block, so that it can be called again with another input."""

    mlp: Mlp
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    stream: Tensor
    """[N, T, d] what was read, before the norm; in some families [N T, d]."""

    def written(self, stream: Tensor) -> Tensor:
        """[..., d] what the MLP adds to the stream where it reads another, [..., d] before the norm."""
        mlp = self.mlp
        read = stream if mlp.norm is None else mlp.norm.forward(stream)
        found: list[Tensor] = []

        def reread(module: nn.Module, _: Any, __: Tensor) -> Tensor:
            output: Tensor = module.forward(read)
            return output

        def end(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            found.append(args[0])
            raise Enough

        with ExitStack() as stack:
            for module in mlp.inputs:
                stack.callback(module.register_forward_hook(reread).remove)
            stack.callback(mlp.out.register_forward_pre_hook(end).remove)
            # Some families add the stream behind the output matrix, inside of the same module.
            with suppress(Enough):
                mlp.holder.forward(*self.args, **self.kwargs)
        output = mlp.out.forward(found[0])
        return (output if mlp.out_norm is None else mlp.out_norm.forward(output)) * mlp.scale


@contextmanager
def mlp_calls(mlps: Sequence[Mlp]) -> Iterator[dict[int, MlpCall]]:
    """Note how the model calls some blocks' MLPs in a forward pass inside the ``with`` block."""
    streams: dict[int, Tensor] = {}
    found: dict[int, MlpCall] = {}
    called: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    with ExitStack() as stack:
        for mlp in mlps:

            def enter(_: nn.Module, args: Any, kwargs: Any, mlp: Mlp = mlp) -> None:
                called.setdefault(mlp.block, (args, kwargs))

            def read(_: nn.Module, args: Any, mlp: Mlp = mlp) -> None:
                streams.setdefault(mlp.block, args[0])

            def leave(_: nn.Module, __: Any, ___: Any, mlp: Mlp = mlp) -> None:
                found.setdefault(mlp.block, MlpCall(mlp, *called[mlp.block], streams[mlp.block]))

            stack.callback(mlp.holder.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback((mlp.norm or mlp.inputs[0]).register_forward_pre_hook(read).remove)
            stack.callback(mlp.out.register_forward_hook(leave).remove)
        yield found


def find_mlps(model: nn.Module, blocks: Sequence[int]) -> list[Mlp | None]:
    """The MLPs of some blocks; None where a block has none of two plain matrices, as with experts.

    Proved in a run: the inputs read the stream or one norm of it, the output is what the site ``mlp_out``
    holds, through at most one norm, and running the MLP again gives it once more.
    """
    model = unwrapped(model)
    found: list[Mlp | None] = []
    with runs(model) as run:
        for number in blocks:
            end = resolve_site(model, f"blocks.{number}.hook_resid_post")
            found.append(_mlp_of(model, end.module, number, run) if end.is_whole_tensor else None)
    return found


def _mlp_of(model: nn.Module, path: str, number: int, run: Run) -> Mlp | None:
    block = model.get_submodule(path)
    names = {module: name for name, module in block.named_modules()}
    holders = [m for m in block.modules() if {n for n, _ in m.named_children()} & set(_OUTPUTS)]
    for holder in holders:
        children = dict(holder.named_children())
        inputs = tuple(children[name] for name in _INPUTS if name in children)
        if inputs:
            break
    else:
        return None
    out = next(children[name] for name in _OUTPUTS if name in children)
    records = record_block(one_module(model, path), run).records
    ends = {(r.module, r.end): r.value for r in records}
    read, made = ends.get((names[inputs[0]], "input")), ends.get((names[out], "output"))
    site = resolve_site(model, f"blocks.{number}.hook_mlp_out")
    last = model.get_submodule(site.module)
    wanted = ends.get((names.get(last, ""), "output"))
    if read is None or made is None or wanted is None:
        return None
    makers = [block.get_submodule(r.module) for r in records if _gives(r, read)]
    norm = next((maker for maker in makers if "norm" in type(maker).__name__.lower()), None)
    out_norm = None if close(wanted, made) else last
    mlp = Mlp(number, holder, norm, inputs, out, out_norm, site.scale)
    with mlp_calls([mlp]) as calls:
        run()
    call = calls[number]
    again = call.written(call.stream.view(wanted.shape))
    return mlp if close(wanted * mlp.scale, again) else None


def _gives(record: Record, value: Tensor) -> bool:
    return record.end == "output" and close(record.value, value)
