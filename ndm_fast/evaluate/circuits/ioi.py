"""Prompts of the indirect-object tests (docs/method.md): who is given something by whom?"""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ndm_fast.evaluate.circuits import word_lists
from ndm_fast.evaluate.circuits.words import CircuitPrompts, Marked, half_of, mark, whole_words
from ndm_fast.evaluate.patching.head import TokenMetric


class _Pair(NamedTuple):
    """A prompt and its counterfactual; the indirect object comes first (ABBA) or second (BABA)."""

    here: Marked
    there: Marked
    first: bool

    def places(self) -> dict[str, list[int]]:
        """Kind of position -> tokens of the prompt."""
        io = self.here.spans["a" if self.first else "b"][0]
        s1 = self.here.spans["b" if self.first else "a"][0]
        return {
            "IO": [io],
            "S1": [s1],
            "IO+1": [io + 1],
            "S1+1": [s1 + 1],
            "S2": self.here.spans["s"],
            "END": [len(self.here.tokens) - 1],
        }


def indirect_object(tokenizer: Any, count: int, seed: int, templates: str, kind: str) -> CircuitPrompts:
    """Indirect-object prompts, half of them ABBA and half BABA.

    Args:
        kind: ``"previous"`` (test 1), ``"second"`` (2), ``"position"`` (3) or ``"name"`` (3b).

    Raises:
        InputError: the tokenizer splits the words.
    """
    pairs = _pairs(tokenizer, count, seed, templates, swap_all=kind == "name")
    places = [pair.places() for pair in pairs]
    wanted = {"previous": ("IO+1", "S1+1"), "second": ("S2",)}.get(kind)
    positions = [[p for k in wanted for p in found[k]] if wanted else [-1] for found in places]
    right, wrong = (
        [pair.here.tokens[at[name][0]] for pair, at in zip(pairs, places, strict=True)]
        for name in ("IO", "S1")
    )
    return CircuitPrompts(
        [pair.here.tokens for pair in pairs],
        [pair.there.tokens for pair in pairs],
        positions,
        logit_difference(right, wrong),
        [pair.here.text for pair in pairs],
        places,
        [1 if pair.first else -1 for pair in pairs],
    )


def _pairs(tokenizer: Any, count: int, seed: int, templates: str, *, swap_all: bool) -> list[_Pair]:
    draw = random.Random(f"ioi {seed}")
    names, places, things = (
        whole_words(tokenizer, words, kinds)
        for words, kinds in (
            (half_of(word_lists.NAMES, templates), "names"),
            (word_lists.PLACES, "places"),
            (word_lists.THINGS, "things"),
        )
    )
    pairs = []
    for number in range(count):
        template = draw.choice(half_of(word_lists.IOI_TEMPLATES, templates))
        io, s = draw.sample(names, 2)
        fixed = {"place": draw.choice(places), "thing": draw.choice(things)}
        first = number % 2 == 0
        clean = {**fixed, "a": io if first else s, "b": s if first else io, "s": s}
        changed = {**fixed, "a": clean["b"], "b": clean["a"], "s": io if swap_all else s}
        pairs.append(_Pair(mark(tokenizer, template, clean), mark(tokenizer, template, changed), first))
    return pairs


def logit_difference(right: list[int], wrong: list[int]) -> TokenMetric:
    """A metric: logit of one token less that of another, [N] ids each, at the one position read."""
    good, bad = torch.tensor(right), torch.tensor(wrong)

    def metric(logits: Tensor, rows: Tensor) -> Tensor:
        last, rows = logits[:, 0].float(), rows.to(good.device)
        both = torch.stack([good[rows], bad[rows]], 1).to(last.device)
        chosen = last.gather(1, both)
        return chosen[:, 0] - chosen[:, 1]

    return TokenMetric(metric, torch.cat([good, bad]))
