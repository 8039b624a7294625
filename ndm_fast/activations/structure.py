"""Blocks and named points of a family that no table knows: found in a run on a few tokens, and proved there.

A run records what goes in and out of every module of every block. The points are those that add up:

    sequential   resid_mid = resid_pre + attn_out, resid_post = resid_mid + mlp_out
    parallel     resid_post = resid_pre + attn_out + mlp_out
    post-norm    resid_mid = norm(resid_pre + attn_out), resid_post = norm(resid_mid + mlp_out)

where attn_out and mlp_out may be a module's output times a constant. Then each point is replaced by noise,
and the sums must follow; a point where they do not is left out.

Blocks are the modules of a list; where those hand no stream on, modules with one number in several lists, or
the calls of a module that runs again and again (`blocks`).
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ndm_fast.activations.block_points import ENDS, INPUT, OUTPUT, Found, close, find_points, trace_with
from ndm_fast.activations.blocks import (
    Block,
    Stacks,
    likely_blocks,
    listed_paths,
    part_paths,
    stacks_of_calls,
    stacks_of_modules,
    stacks_of_parts,
)
from ndm_fast.activations.layout import PLAIN, Layout, layout_of
from ndm_fast.activations.site import End, Site
from ndm_fast.activations.trace import LENGTH, LONGER, ROWS, Run, block_ends, calls_of, record_block, runs
from ndm_fast.activations.wrappers import describe, is_empty, join
from ndm_fast.errors import InputError


@dataclass(frozen=True)
class Structure:
    """Where the blocks of a model are, and the named points of each."""

    blocks: tuple[tuple[str, ...], ...]
    """Of each block the paths of its modules: of one, or of those that run one after the other."""
    points: tuple[dict[str, Site], ...]
    """Of each block: point -> site, in the order of the forward pass."""
    forms: tuple[str, ...]
    """Of each block: how it adds up; "" where only its ends are known."""
    width: int
    """Of the residual stream."""


_KNOWN: weakref.WeakKeyDictionary[nn.Module, Structure | str] = weakref.WeakKeyDictionary()
"""What was found for a model, or why nothing was."""


def structure_of(model: nn.Module) -> Structure:
    """Blocks and points of a model, found the first time in a few runs on a few tokens.

    Raises:
        InputError: the model has no weights yet, cannot run on tokens alone, or has no list of blocks that
            hand the residual stream on.
    """
    if not hasattr(model, "config"):
        raise InputError(
            f"{describe(model)} is no Hugging Face model, so how many blocks it has is not known: give a "
            "module path"
        )
    if is_empty(model):
        raise InputError(
            f"{describe(model)} has no weights yet, and where its family's named sites are is told by a run: "
            "give a module path"
        )
    if model not in _KNOWN:
        try:
            _KNOWN[model] = _find(model)
        except InputError as error:
            _KNOWN[model] = str(error)
    found = _KNOWN[model]
    if isinstance(found, str):
        raise InputError(found)
    return found


def _find(model: nn.Module) -> Structure:
    with runs(model) as run:
        blocks, width = _blocks(model, run)
        kinds: dict[tuple[Any, ...], list[int]] = {}
        for number, block in blocks.ran.items():
            kind = tuple((name, type(module)) for name, module in block.modules())
            kinds.setdefault(kind, []).append(number)
        found: dict[int, Found] = {}
        for numbers in kinds.values():
            first, *others = (blocks.ran[number] for number in numbers)
            found |= dict.fromkeys(numbers, find_points(first, run, others))
    everyone = range(len(blocks.all))
    return Structure(
        tuple(block.paths for block in blocks.all),
        tuple(_sites(blocks.ran[n], n, found[n]) if n in found else {} for n in everyone),
        tuple(found[n].form if n in found else ENDS for n in everyone),
        width,
    )


def _sites(block: Block, number: int, found: Found) -> dict[str, Site]:
    """Point -> site of one block, in the order of the forward pass."""
    return {kind: block.site(f"blocks.{number}.hook_{kind}", point) for kind, point in found.points().items()}


@dataclass(frozen=True)
class _Stack:
    """Blocks that hand the stream on, each to the next."""

    all: list[Block]
    ran: dict[int, Block]
    """By number; how they take the stream is told."""


def _blocks(model: nn.Module, run: Run) -> tuple[_Stack, int]:
    """Blocks that hand the residual stream on, each to the next, and its width.

    Raises:
        InputError: there are none, or several stacks as long.
    """
    likely = likely_blocks(model)
    plain = stacks_of_modules(model, likely)
    chains = _chains(plain, run) or _chains(_in_parts(model, likely, run), run)
    chains = chains or _chains(_in_calls(model, run), run)
    if not chains:
        raise _none(model, plain, run)
    longest = [path for path, (chain, _) in chains.items() if len(chain.ran) == _length(chains)]
    if len(longest) > 1:
        raise InputError(
            f"{describe(model)} has {len(longest)} stacks of blocks ({join(longest)}), so a block's number "
            "does not say which: give a module path"
        )
    chosen = {longest[0]: chains[longest[0]][0].all}
    here, there = (block_ends(chosen, run, LONGER)[longest[0]] for _ in range(2))
    if not all(close(one, other) for (*_, one), (*_, other) in zip(here, there, strict=True)):
        raise InputError(
            f"{describe(model)} gives other activations for the same tokens each time, so where its named "
            "sites are cannot be checked: give a module path"
        )
    stack, width = chains[longest[0]]
    return _Stack(stack.all, _entered(model, stack.ran, run)), width


def _length(chains: dict[str, tuple[_Stack, int]]) -> int:
    return max(len(chain.ran) for chain, _ in chains.values())


def _none(model: nn.Module, plain: Stacks, run: Run) -> InputError:
    """Why a model has no named sites."""
    ran = [path for path, calls in block_ends(plain, run).items() if calls]
    if not ran:
        return InputError(
            f"{describe(model)} has no list of blocks, so its named sites are not known: give a module path"
        )
    return InputError(
        f"the blocks of {describe(model)} ({ran[0]}) do not hand a residual stream [B, T, d] on, each "
        "to the next, so it has no named sites: give a module path"
    )


def _in_parts(model: nn.Module, likely: list[str], run: Run) -> Stacks:
    """Blocks that no module holds together."""
    parts = part_paths(model, likely)
    return stacks_of_parts(model, parts, calls_of(model, parts, run))


def _in_calls(model: nn.Module, run: Run) -> Stacks:
    """Blocks that share a module, which is called for each."""
    holders = listed_paths(model)
    return stacks_of_calls(model, holders, calls_of(model, {*holders, *holders.values()}, run))


def _chains(stacks: Stacks, run: Run) -> dict[str, tuple[_Stack, int]]:
    """The stacks that hand on a stream of the text, each with the width of that."""
    ends = block_ends(stacks, run)
    stacks = {name: blocks for name, blocks in stacks.items() if _is_chain(blocks, ends[name])}
    longer = block_ends(stacks, run, LONGER)
    found: dict[str, tuple[_Stack, int]] = {}
    for name, blocks in stacks.items():
        shapes = [{value.shape for *_, value in calls} for calls in (ends[name], longer[name])]
        if not _is_chain(blocks, longer[name]) or len(shapes[0]) > 1 or len(shapes[1]) > 1:
            continue
        laid_out = layout_of(shapes[0].pop(), shapes[1].pop(), ROWS, (LENGTH, LONGER))
        if laid_out is None or not _is_of_text(name, blocks, laid_out[0], ends[name][0][2], run):
            continue
        ran = {number: replace(blocks[number], layout=laid_out[0]) for number, _, _ in ends[name]}
        found[name] = _Stack(blocks, ran), laid_out[1]
    return found


def _is_of_text(name: str, blocks: list[Block], layout: Layout, before: Tensor, run: Run) -> bool:
    """Whether another token changes what the first block takes at that token's own place, and nowhere else.

    A stream [B, T, d] is the text's. Where the axes are others, or there are positions beside the text's,
    this proves which is which.
    """
    if layout == PLAIN:
        return True
    place = (ROWS - 1, LENGTH // 3)
    after = block_ends({name: blocks}, run, LENGTH, place)[name][0][2]
    expected = torch.zeros_like(after, dtype=torch.bool)
    layout.view(expected)[place] = True
    changed = after != before
    return bool(layout.view(changed)[place].any()) and not bool((changed & ~expected).any())


def _entered(model: nn.Module, blocks: dict[int, Block], run: Run) -> dict[int, Block]:
    """The blocks, told how a new stream enters them: noise there does what it does at the end before.

    A block may read its input elsewhere too, as other arguments (Funnel's queries, keys and values) or in a
    skip connection around its first part (XLM): what is put there is then written into the tensor.

    Raises:
        InputError: neither way the whole block reads it.
    """
    if len(blocks) == 1:
        return blocks
    before, block = list(blocks.values())[:2]
    clean = record_block(block, run)
    noise = clean.pre.flip(0, 1).contiguous()
    post = before.site("blocks.0.hook_resid_post", OUTPUT)
    wanted = trace_with(block, post, noise, run).post
    for in_place in (False, True):
        pre = replace(block, in_place=in_place).site("blocks.1.hook_resid_pre", INPUT)
        if close(wanted, trace_with(block, pre, noise, run).post):
            return {n: replace(each, in_place=in_place) for n, each in blocks.items()}
    raise InputError(
        f"the blocks of {describe(model)} ({block.paths[0]}) do not all read the residual stream where they "
        "are given it, so it has no named sites: give a module path"
    )


def _is_chain(blocks: list[Block], calls: list[tuple[int, End, Tensor]]) -> bool:
    """Whether the blocks ran once, in order, and took what the one before gave; some may be passed over."""
    ran = sorted({number for number, _, _ in calls})
    in_order = [(number, end) for number in ran for end in ("input", "output")]
    if not ran or [(number, end) for number, end, _ in calls] != in_order or 2 * len(ran) < len(blocks):
        return False
    values = [value for _, _, value in calls]
    if not all(value.is_floating_point() for value in values):
        return False
    return all(torch.equal(gave, took) for gave, took in zip(values[1:-1:2], values[2::2], strict=True))
