"""Blocks and named points of a family that no table knows: found in a run on a few tokens, and proved there.

A run records what goes in and out of every module of every block. The points are those that add up:

    sequential   resid_mid = resid_pre + attn_out, resid_post = resid_mid + mlp_out
    parallel     resid_post = resid_pre + attn_out + mlp_out
    post-norm    resid_mid = norm(resid_pre + attn_out), resid_post = norm(resid_mid + mlp_out)

where attn_out and mlp_out may be a module's output times a constant. Then each point is replaced by noise,
and the sums must follow; a point where they do not is left out.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ndm_fast.activations.block_points import ENDS, Found, close, find_points
from ndm_fast.activations.site import End, Site
from ndm_fast.activations.trace import LENGTH, LONGER, ROWS, Run, block_ends, runs
from ndm_fast.activations.wrappers import describe, is_empty, join, text_config
from ndm_fast.errors import InputError


@dataclass(frozen=True)
class Structure:
    """Where the blocks of a model are, and the named points of each."""

    blocks: str
    """Path of the list of blocks."""
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


def _find(model: nn.Module) -> Structure:
    with runs(model) as run:
        path, width, ran = _blocks(model, run)
        blocks = model.get_submodule(path)
        assert isinstance(blocks, nn.ModuleList)
        kinds: dict[tuple[Any, ...], list[int]] = {}
        for number, block in enumerate(blocks):
            if number not in ran:
                continue
            kind = tuple((name, type(module)) for name, module in block.named_modules())
            kinds.setdefault(kind, []).append(number)
        found = dict.fromkeys(range(len(blocks)), Found(ENDS))
        for numbers in kinds.values():
            first, *others = (blocks[number] for number in numbers)
            found |= dict.fromkeys(numbers, find_points(first, run, others))
    points = tuple(_sites(path, n, found[n]) if n in ran else {} for n in range(len(blocks)))
    return Structure(path, points, tuple(found[number].form for number in range(len(blocks))), width)


def _sites(path: str, number: int, found: Found) -> dict[str, Site]:
    """Point -> site of one block, in the order of the forward pass."""
    return {
        kind: Site(
            f"blocks.{number}.hook_{kind}",
            f"{path}.{number}.{point.module}".rstrip("."),
            point.end,
            point.scale,
            copied=True,
            flat_in=f"{path}.{number}" if point.flat else None,
        )
        for kind, point in found.points().items()
    }


def _blocks(model: nn.Module, run: Run) -> tuple[str, int, set[int]]:
    """A list of blocks that hand the residual stream on, each to the next; its width, and which ran.

    Raises:
        InputError: there is none, or several as long.
    """
    likely = likely_blocks(model)
    ends = block_ends(model, likely, run)
    ran = [path for path in likely if ends[path]]
    if not ran:
        raise InputError(
            f"{describe(model)} has no list of blocks, so its named sites are not known: give a module path"
        )
    longer = block_ends(model, ran, run, LONGER)
    chains = [
        p for p in ran if _is_chain(model, p, ends[p], LENGTH) and _is_chain(model, p, longer[p], LONGER)
    ]
    if not chains:
        raise InputError(
            f"the blocks of {describe(model)} ({ran[0]}) do not hand a residual stream [B, T, d] on, each "
            "to the next, so it has no named sites: give a module path"
        )
    longest = [path for path in chains if len(ends[path]) == max(len(ends[other]) for other in chains)]
    if len(longest) > 1:
        raise InputError(
            f"{describe(model)} has {len(longest)} stacks of blocks ({join(longest)}), so a block's number "
            "does not say which: give a module path"
        )
    chosen = ends[longest[0]]
    again = block_ends(model, longest, run, LONGER)[longest[0]]
    if not all(close(here, there) for (*_, here), (*_, there) in zip(longer[longest[0]], again, strict=True)):
        raise InputError(
            f"{describe(model)} gives other activations for the same tokens each time, so where its named "
            "sites are cannot be checked: give a module path"
        )
    return longest[0], chosen[0][2].shape[-1], {number for number, _, _ in chosen}


def _is_chain(model: nn.Module, path: str, calls: list[tuple[int, End, Tensor]], length: int) -> bool:
    """Whether the blocks ran once, in order, and took what the one before gave; some may be passed over."""
    ran = sorted({number for number, _, _ in calls})
    count = len(list(model.get_submodule(path).children()))
    in_order = [(number, end) for number in ran for end in ("input", "output")]
    if [(number, end) for number, end, _ in calls] != in_order or 2 * len(ran) < count:
        return False
    values = [value for _, _, value in calls]
    shape = (ROWS, length, values[0].shape[-1])
    if any(value.shape != shape or not value.is_floating_point() for value in values):
        return False
    return all(torch.equal(gave, took) for gave, took in zip(values[1:-1:2], values[2::2], strict=True))
