"""The matrices with which the MLP of a block reads the stream and writes into it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ndm_fast.activations.block_points import close
from ndm_fast.activations.blocks import one_module
from ndm_fast.activations.sites import resolve_site
from ndm_fast.activations.trace import Record, Run, record_block, runs
from ndm_fast.activations.wrappers import unwrapped

_INPUTS = ("gate_proj", "up_proj", "gate_up_proj", "c_fc", "fc1", "fc_in", "dense_h_to_4h")
_OUTPUTS = ("down_proj", "c_proj", "fc2", "fc_out", "dense_4h_to_h")


@dataclass(frozen=True)
class Mlp:
    """The MLP of one block."""

    block: int
    norm: nn.Module | None
    inputs: tuple[nn.Module, ...]
    """All that read the stream: the up projection, and the gate where there is one."""
    out: nn.Module
    out_norm: nn.Module | None


def find_mlps(model: nn.Module, blocks: Sequence[int]) -> list[Mlp | None]:
    """The MLPs of some blocks; None where a block has none of two plain matrices, as with experts.

    Proved in a run: the inputs read the stream or one norm of it, the output is what the site ``mlp_out``
    holds, through at most one norm.
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
    return Mlp(number, norm, inputs, out, out_norm)


def _gives(record: Record, value: Tensor) -> bool:
    return record.end == "output" and close(record.value, value)
