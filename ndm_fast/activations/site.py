"""A place in a model, and the ways to write its name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from ndm_fast.activations.layout import PLAIN, Layout

End = Literal["input", "output"]

POINTS = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
"""In the order of the forward pass."""

FORMS = (
    "blocks.3.hook_resid_pre|resid_mid|resid_post|attn_out|mlp_out, x3.pre|mid|post, a3, m3, or a module path"
)


_CANONICAL = re.compile(r"blocks\.(\d+)\.hook_(resid_pre|resid_mid|resid_post|attn_out|mlp_out)")


_SHORT = re.compile(r"x(\d+)\.(pre|mid|post)|([am])(\d+)")


@dataclass(frozen=True)
class Site:
    """A place in a model whose activation [B, T, d] can be read and replaced."""

    name: str  # canonical name; for a module path that is none of the named points, the path itself
    module: str  # path of the module as in `model.named_modules()`
    end: End  # which side of the module
    scale: float = 1.0  # the activation is this many times the module's tensor
    copied: bool = False  # read a copy, as the model may write to the tensor later
    flat_in: str | None = None  # the module's tensor is [B T, d], in the block of this path
    layout: Layout = PLAIN  # where the activation lies in the module's tensor
    skips: bool = False  # the module's input is read elsewhere too, as by a skip connection around the module
    call: int = 0  # which call of the module, in one run of `counted_in`
    counted_in: str | None = None  # path of what calls the module again and again; None: it is called once

    @property
    def is_named(self) -> bool:
        """Whether this is one of the named points, not just some module."""
        return self.name != self.module

    @property
    def is_whole_tensor(self) -> bool:
        """Whether the activation is the module's own tensor [B, T, d], as it is."""
        return self.scale == 1 and self.flat_in is None and self.layout == PLAIN and self.counted_in is None

    @property
    def feeds_skip(self) -> bool:
        """Whether the module's input tensor is read elsewhere too: by a skip connection around the module."""
        return self.end == "input" and (self.skips or self.name.endswith(".hook_resid_mid"))


def parse(name: str) -> tuple[int, str] | None:
    """(block, point) of a canonical or short name; None for anything else."""
    if match := _CANONICAL.fullmatch(name):
        return int(match[1]), match[2]
    if match := _SHORT.fullmatch(name):
        if match[1]:
            return int(match[1]), f"resid_{match[2]}"
        return int(match[4]), "attn_out" if match[3] == "a" else "mlp_out"
    return None


def canonical_name(name: str) -> str:
    """`name` in its canonical form as far as that is told without a model: short names, not module paths."""
    point = parse(name)
    return f"blocks.{point[0]}.hook_{point[1]}" if point else name
