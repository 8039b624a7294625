"""Finds the heads of a block by the names that families give their modules, and proves them in a run.

Proved is: the projections read the block's input, through its norm; what the output matrix makes of all heads
is what the site ``attn_out`` holds; and where the columns of one head are silenced, that head changes alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ndm_fast.activations.block_points import PARALLEL, POST_NORM, SEQUENTIAL, close
from ndm_fast.activations.blocks import one_module
from ndm_fast.activations.families import family_of
from ndm_fast.activations.sites import resolve_site
from ndm_fast.activations.structure import structure_of
from ndm_fast.activations.trace import BlockTrace, Run, record_block, recording, runs
from ndm_fast.activations.wrappers import describe, text_config, unwrapped
from ndm_fast.errors import InputError
from ndm_fast.evaluate.connections.heads import SIDES, Heads, Projection, calls
from ndm_fast.evaluate.connections.matrices import matrix

_SEPARATE = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q_lin", "k_lin", "v_lin"))
_FUSED = ("c_attn", "query_key_value", "qkv_proj", "Wqkv", "qkv")
_OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense", "out_lin", "Wo", "output.dense")
_SIDE_NORMS = {
    "Q": ("q_norm", "q_layernorm", "query_layernorm"),
    "K": ("k_norm", "k_layernorm", "key_layernorm"),
}


class _Named(NamedTuple):
    """Modules of one block that have the names of attention's parts."""

    path: str
    """Of the module that holds the projections, inside the block."""
    attention: nn.Module
    projections: tuple[nn.Module, ...]
    """Three, or one for all."""
    out: nn.Module


def find_heads(model: nn.Module, blocks: Sequence[int]) -> list[Heads]:
    """The heads of some blocks.

    Raises:
        InputError: a block has no attention whose heads are known, or a proof fails.
    """
    model = unwrapped(model)
    with runs(model) as run:
        return [_heads_of(model, number, run) for number in blocks]


def entrance(model: nn.Module, block: int) -> str:
    """Where the change of one head is added: after the attention, or after both branches that run at once.

    Raises:
        InputError: the block normalises the sum, or no module takes or gives it.
    """
    model = unwrapped(model)
    family = family_of(model)
    if family is None:
        form = structure_of(model).forms[block]
    elif family.is_post_norm:
        form = POST_NORM
    else:
        form = SEQUENTIAL if "resid_mid" in family.points(model.config) else PARALLEL
    if form not in (SEQUENTIAL, PARALLEL):
        raise InputError(
            f"what a head of block {block} of {describe(model)} writes is not simply added to the stream at "
            "a known place, so its paths cannot be patched: leave --tests away, weights alone are read"
        )
    return f"blocks.{block}.hook_resid_{'mid' if form == SEQUENTIAL else 'post'}"


def _heads_of(model: nn.Module, number: int, run: Run) -> Heads:
    end = resolve_site(model, f"blocks.{number}.hook_resid_post")
    if not end.is_whole_tensor:
        raise _unknown(model, number, "its stream is no module's own tensor [B, T, d]")
    block = model.get_submodule(end.module)
    named = _named(block)
    if named is None:
        raise _unknown(model, number, "no modules have the names of queries, keys, values and output")
    trace = record_block(one_module(model, end.module), run)
    norms = _norms_before(block, named.projections[0], trace)
    if not norms:
        raise _unknown(model, number, "the projections do not read the block's input through one norm")
    site = resolve_site(model, f"blocks.{number}.hook_attn_out")
    last = model.get_submodule(site.module)
    inside = {*named.attention.modules(), *(m for m in block.modules() if named.attention in m.children())}
    out_norm = None if last in inside or isinstance(last, nn.Dropout) else last
    for sides in _splits(model, named):
        heads = Heads(
            number, named.attention, norms[0], sides, _side_norms(named.attention), named.out, out_norm,
            site.scale,
        )  # fmt: skip
        if _holds(heads, last, run):
            return heads
    raise _unknown(model, number, "its heads do not add up to what it writes")


def _named(block: nn.Module) -> _Named | None:
    for path, module in block.named_modules():
        children = dict(module.named_children())
        projections: tuple[nn.Module, ...] = (
            next(
                (tuple(children[n] for n in names) for names in _SEPARATE if set(names) <= set(children)), ()
            )
            or tuple(children[name] for name in _FUSED if name in children)[:1]
        )
        if not projections:
            continue
        parent = block.get_submodule(path.rpartition(".")[0])
        for holder in (module, parent):
            for name in _OUTPUTS:
                try:
                    return _Named(path, module, projections, holder.get_submodule(name))
                except AttributeError:
                    continue
    return None


def _norms_before(block: nn.Module, projection: nn.Module, trace: BlockTrace) -> list[nn.Module | None]:
    """What the projection may read the block's input through: norms, or None where it reads it as it is."""
    ends = {(r.module, r.end): r.value for r in trace.records}
    path = next(name for name, module in block.named_modules() if module is projection)
    read = ends.get((path, "input"))
    if read is None:
        return []
    if close(read, trace.pre):
        return [None]
    return [
        block.get_submodule(name)
        for (name, end), value in ends.items()
        if end == "output" and close(value, read)
        and (before := ends.get((name, "input"))) is not None and close(before, trace.pre)
    ]  # fmt: skip


def _side_norms(attention: nn.Module) -> dict[str, nn.Module]:
    children = dict(attention.named_children())
    return {side: children[n] for side, names in _SIDE_NORMS.items() for n in names if n in children}


def _splits(model: nn.Module, named: _Named) -> Iterator[Mapping[str, Projection]]:
    """Ways in which the columns of the projections may belong to heads; which is right is proved."""
    config = text_config(model)
    heads = int(getattr(named.attention, "num_heads", None) or config.num_attention_heads)
    outs = [matrix(module).shape[1] for module in named.projections]
    read = matrix(named.out).shape[0]
    if read % heads:
        return
    width = read // heads
    if len(outs) == 3:
        if outs[0] != read or outs[1] != outs[2] or outs[1] % width:
            return
        columns = [torch.arange(out).view(-1, width) for out in outs]
        yield _sides(named.projections, [_repeated(one, heads) for one in columns])
        return
    kept = (outs[0] - read) // (2 * width)  # heads of keys and values
    if kept < 1 or read + 2 * kept * width != outs[0] or heads % kept:
        return
    every = torch.arange(outs[0])
    in_turn = [one.view(-1, width) for one in every.split([read, kept * width, kept * width])]
    yield _sides(named.projections * 3, [_repeated(one, heads) for one in in_turn])
    grouped = every.view(kept, heads // kept + 2, width)  # each head of keys with its queries, as in NeoX
    parts = [grouped[:, :-2].reshape(heads, width), grouped[:, -2], grouped[:, -1]]
    yield _sides(named.projections * 3, [_repeated(one, heads) for one in parts])


def _repeated(columns: Tensor, heads: int) -> Tensor:
    return columns.repeat_interleave(heads // len(columns), 0)


def _sides(modules: Sequence[nn.Module], columns: Sequence[Tensor]) -> dict[str, Projection]:
    return {side: Projection(m, own) for side, m, own in zip(SIDES, modules, columns, strict=True)}


def _holds(heads: Heads, last: nn.Module, run: Run) -> bool:
    wanted: list[Tensor] = []

    def note(_: str, end: str, value: Tensor) -> None:
        if end == "output":
            wanted.append(value.detach().clone() * heads.scale)

    with calls([heads]) as found, recording([("", last)], note):
        run()
    call = found[heads.block]
    results = call.results()
    if results.shape[-1] != heads.slices.numel() or not close(wanted[0], call.written(results)):
        return False
    return all(_alone(heads, side, results, call) for side in SIDES)


def _alone(heads: Heads, side: str, results: Tensor, call: Any) -> bool:
    """Whether silencing the first head's columns changes the heads that have them, and no other."""
    columns = heads.sides[side].columns
    after = call.silenced(side, columns[0])
    own = torch.tensor([bool((row == columns[0]).all()) for row in columns])
    changed = torch.tensor([not torch.equal(after[..., s], results[..., s]) for s in heads.slices])
    silent = side != "V" or bool((after[..., heads.slices[own].flatten()] == 0).all())
    return bool((changed == own).all()) and silent


def _unknown(model: nn.Module, number: int, why: str) -> InputError:
    return InputError(
        f"the attention heads of block {number} of {describe(model)} are not known ({why}): take a model "
        "whose blocks have plain multi-head attention"
    )
