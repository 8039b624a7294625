"""Prompts of the induction language, and others that differ in one thing alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ndm_fast.evaluate.patching.prompts import Prompts
from ndm_fast.evaluate.truth.induction_model import InductionLanguage
from ndm_fast.seeds import Draw, seeded

_AT = 4
"""Place in the ring of the token that is asked about."""


KINDS = ("previous", "current", "query")
"""Of counterfactuals; each drives one of the three known edges, in the order K, V, Q."""

KNOWN = {"previous": "K", "current": "V", "query": "Q"}


class Pairs(NamedTuple):
    """N prompts with counterfactuals that differ in one thing alone at the positions that are patched."""

    prompts: Prompts
    counterfactuals: Prompts
    positions: Tensor
    """[N, P]"""
    right: Tensor
    wrong: Tensor


def induction_pairs(language: InductionLanguage, kind: str, count: int, seed: int) -> Pairs:
    """Prompts that say a ring once, and again as far as the token that is asked about.

    Args:
        kind: what the counterfactual changes: ``previous``, the token before the answer, by swapping the one
            asked about with another; ``current``, the answer itself; ``query``, the token that asks.
    """
    generator = seeded(seed, Draw.INDUCTION_PROMPTS)
    drawn = 1 + torch.rand(count, language.tokens, generator=generator).argsort(1)
    ring, outside = drawn[:, : language.ring], drawn[:, language.ring]
    other = torch.randint(_AT + 2, language.ring - 1, (count,), generator=generator)
    every = torch.arange(count)
    changed = ring.clone()
    positions = torch.full((count, 1), language.ring + _AT + 1)
    asked = ring[:, : _AT + 1].clone()
    wrong = ring[every, other + 1]
    here = torch.cat([torch.zeros(count, 1, dtype=torch.int64), ring, asked], 1)
    if kind == "previous":
        changed[every, _AT], changed[every, other] = ring[every, other], ring[every, _AT]
        positions = torch.stack([torch.full((count,), _AT + 2), other + 2], 1)
    elif kind == "current":
        changed[:, _AT + 1] = wrong = outside
        positions = torch.full((count, 1), _AT + 2)
    else:
        asked[:, -1] = ring[every, other]
    there = torch.cat([torch.zeros(count, 1, dtype=torch.int64), changed, asked], 1)
    mask = torch.ones_like(here)
    return Pairs(Prompts(here, mask), Prompts(there, mask), positions, ring[:, _AT + 1], wrong)
