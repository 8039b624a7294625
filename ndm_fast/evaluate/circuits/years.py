"""Prompts of the greater-than test (docs/method.md): years that come later.

GPT-2 splits 1732 into 17|32: what counts is the summed probability of the endings above 32. Where a tokenizer
makes a token of every digit, "... from the year 1 7 3 2 to 1 7" is followed by the tens digit: what counts
is the summed probability of the digits above 3. The counterfactual year ends in 01 in both.
"""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ndm_fast.errors import InputError
from ndm_fast.evaluate.circuits import word_lists
from ndm_fast.evaluate.circuits.words import FEWEST, CircuitPrompts, half_of, mark, whole_words
from ndm_fast.evaluate.patching.patching import Metric

_FIRST_ENDING = 1
"""Ending of the counterfactual year."""


class _Form(NamedTuple):
    """How a tokenizer splits years, and what answers a prompt."""

    name: str
    years: list[tuple[int, int]]
    """Usable centuries and endings."""
    answers: dict[int, int]
    """What may follow, the ending or its tens digit -> token."""

    def said(self, ending: int) -> int:
        """What an answer must be greater than."""
        return ending // 10 if self.name else ending


def greater_than(tokenizer: Any, count: int, seed: int, templates: str) -> CircuitPrompts:
    """Year prompts, in the form that the tokenizer asks for.

    Raises:
        InputError: it splits years in neither way.
    """
    draw = random.Random(f"years {seed}")
    nouns = whole_words(tokenizer, half_of(word_lists.NOUNS, templates), "nouns")
    form = _pair_form(tokenizer) or _digit_form(tokenizer)
    if form is None:
        raise InputError(
            "the tokenizer splits years such as 1732 neither into 17 and 32 nor into digits: run the "
            "greater-than test on a model whose tokenizer does, as GPT-2's"
        )
    prompts, others, texts, places, said = [], [], [], [], []
    for _ in range(count):
        century, ending = draw.choice(form.years)
        noun = draw.choice(nouns)
        here = mark(tokenizer, word_lists.YEARS_TEMPLATE, _words(noun, century, ending))
        there = mark(tokenizer, word_lists.YEARS_TEMPLATE, _words(noun, century, _FIRST_ENDING))
        prompts.append(here.tokens)
        others.append(there.tokens)
        texts.append(here.text)
        changed = [p for p in here.spans["year"] if here.tokens[p] != there.tokens[p]]
        places.append({"YY": changed, "END": [len(here.tokens) - 1]})
        said.append(form.said(ending))
    return CircuitPrompts(
        prompts,
        others,
        [[-1]] * count,
        _chance_above(said, form.answers),
        texts,
        places,
        [1] * count,
        right_above=0.5,
        form=form.name,
    )


def _words(noun: str, century: int, ending: int) -> dict[str, str]:
    return {"noun": noun, "year": f"{century}{ending:02}", "century": str(century)}


def _chance_above(said: list[int], answers: dict[int, int]) -> Metric:
    values = torch.tensor(sorted(answers))
    ids = torch.tensor([answers[value] for value in values.tolist()])
    valid = values > torch.tensor(said)[:, None]

    def metric(logits: Tensor, rows: Tensor) -> Tensor:
        chances = logits[:, 0].float().softmax(1)[:, ids.to(logits.device)]
        return (chances * valid[rows.cpu()].to(chances.device)).sum(1)

    return metric


def _split(tokenizer: Any, century: int, ending: int) -> tuple[list[int], list[int]]:
    """Tokens of the year and of the century at the end of a prompt."""
    found = mark(tokenizer, word_lists.YEARS_TEMPLATE, _words("war", century, ending))
    year, end = ([found.tokens[p] for p in found.spans[key]] for key in ("year", "century"))
    return year, end


def _pair_form(tokenizer: Any) -> _Form | None:
    """Only years that are two tokens, century and ending, are used."""
    answers: dict[int, int] = {}
    usable: list[tuple[int, int]] = []
    for century in word_lists.CENTURIES:
        found = {}
        for ending in range(100):
            year, end = _split(tokenizer, century, ending)
            if len(year) == 2 and end == year[:1]:
                found[ending] = year[1]
        answers |= found
        if _FIRST_ENDING in found:
            usable += [(century, ending) for ending in found if 2 <= ending <= 98]
    return _Form("", usable, answers) if len(usable) >= FEWEST else None


def _digit_form(tokenizer: Any) -> _Form | None:
    """Years of four tokens, perhaps after one for the space, of which the prompt's end repeats two."""
    digits: dict[int, int] = {}
    usable: list[tuple[int, int]] = []
    for century in word_lists.CENTURIES:
        for ending in [_FIRST_ENDING, *range(10, 90)]:  # nothing is above a tens digit of 9
            year, end = _split(tokenizer, century, ending)
            if len(year) < 4 or year[:-2] != end:
                return None
            digits[ending // 10] = year[-2]
            if ending != _FIRST_ENDING:
                usable.append((century, ending))
    year, _ = _split(tokenizer, word_lists.CENTURIES[0], 99)
    digits[9] = year[-2]
    return _Form("tens digit", usable, digits) if len(set(digits.values())) == 10 else None
