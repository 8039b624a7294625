"""Prompts of the circuit tests (docs/method.md): indirect objects, and years that come later.

Positions are those of the tokens that cover a word, so any tokenizer serves that keeps the words whole.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ndm_fast.errors import InputError
from ndm_fast.evaluate.circuits import word_lists
from ndm_fast.evaluate.patching.patching import Metric

_FEWEST = 4
"""Words that a tokenizer must keep whole for a test to be run."""


class CircuitPrompts(NamedTuple):
    """N prompts with their counterfactuals of equal length, where to patch, and what to measure."""

    prompts: list[list[int]]
    counterfactuals: list[list[int]]
    positions: list[list[int]]
    metric: Metric
    texts: list[str]


@dataclass(frozen=True)
class CircuitTest:
    """One test of the paper, at its site in GPT-2 small."""

    name: str
    what: str
    site: str
    build: Callable[[Any, int, int], CircuitPrompts]
    """From tokenizer, number of prompts and seed; the same ones give the same prompts."""


class _Text(NamedTuple):
    """A tokenised text with BOS, and the tokens that cover each of its marked words."""

    tokens: list[int]
    spans: dict[str, list[int]]
    text: str


def mark(tokenizer: Any, template: str, words: dict[str, str]) -> _Text:
    """Fill in a template and find every word's tokens.

    Args:
        template: with ``{key}`` for each key of ``words``, each once.

    Raises:
        InputError: the tokenizer gives no offsets.
    """
    text, ends = "", {}
    for piece in template.split("{"):
        key, closed, rest = piece.partition("}")
        if closed:
            ends[key] = (len(text), len(text) + len(words[key]))
            text += words[key] + rest
        else:
            text += piece
    if not getattr(tokenizer, "is_fast", False):
        raise InputError("circuit tests need a fast tokenizer, which knows where each token lies in the text")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    spans = {
        key: [
            number + len(start)
            for number, (first, last) in enumerate(encoded["offset_mapping"])
            if first < end and last > begin
        ]
        for key, (begin, end) in ends.items()
    }
    return _Text(start + encoded["input_ids"], spans, text)


def whole_words(tokenizer: Any, words: Sequence[str], kind: str) -> list[str]:
    """The words that are one token in running text.

    Raises:
        InputError: too few of them to make varied prompts.
    """
    whole = [w for w in words if len(mark(tokenizer, "They saw {w} there", {"w": w}).spans["w"]) == 1]
    if len(whole) < _FEWEST:
        split = next(word for word in words if word not in whole)
        more = len(words) - len(whole) - 1
        raise InputError(
            f"the tokenizer splits {split!r} and {more} more of {len(words)} {kind} into several tokens: "
            "run circuit tests on a model whose tokenizer keeps common words whole"
        )
    return whole


def _ioi(tokenizer: Any, count: int, seed: int, kind: str) -> CircuitPrompts:
    """Indirect-object prompts. ``kind``: which test."""
    draw = random.Random(f"ioi {seed}")
    names, places, things = (
        whole_words(tokenizer, words, kinds)
        for words, kinds in (
            (word_lists.NAMES, "names"),
            (word_lists.PLACES, "places"),
            (word_lists.THINGS, "things"),
        )
    )
    prompts, others, positions, right, wrong, texts = [], [], [], [], [], []
    for number in range(count):
        template = draw.choice(word_lists.IOI_TEMPLATES)
        io, s = draw.sample(names, 2)
        fixed = {"place": draw.choice(places), "thing": draw.choice(things)}
        first = number % 2 == 0  # ABBA: the indirect object comes first; then BABA
        clean = {**fixed, "a": io if first else s, "b": s if first else io, "s": s}
        if kind == "name":
            changed = {**fixed, "a": clean["b"], "b": clean["a"], "s": io}
        else:
            changed = {**fixed, "a": clean["b"], "b": clean["a"], "s": s}
        here, there = mark(tokenizer, template, clean), mark(tokenizer, template, changed)
        at_io, at_s1 = here.spans["a" if first else "b"][0], here.spans["b" if first else "a"][0]
        prompts.append(here.tokens)
        others.append(there.tokens)
        texts.append(here.text)
        positions.append({"previous": [at_io + 1, at_s1 + 1], "second": here.spans["s"]}.get(kind, [-1]))
        right.append(here.tokens[at_io])
        wrong.append(here.tokens[at_s1])
    return CircuitPrompts(prompts, others, positions, _difference(right, wrong), texts)


def _difference(right: list[int], wrong: list[int]) -> Metric:
    good, bad = torch.tensor(right), torch.tensor(wrong)

    def metric(logits: Tensor, rows: Tensor) -> Tensor:
        last, rows = logits[:, 0].float(), rows.to(good.device)
        both = torch.stack([good[rows], bad[rows]], 1).to(last.device)
        chosen = last.gather(1, both)
        return chosen[:, 0] - chosen[:, 1]

    return metric


def _greater_than(tokenizer: Any, count: int, seed: int) -> CircuitPrompts:
    """Year prompts; only years that are two tokens, century and rest, are used."""
    draw = random.Random(f"years {seed}")
    nouns = whole_words(tokenizer, word_lists.NOUNS, "nouns")
    endings: dict[int, int] = {}  # two digits -> token
    usable: list[tuple[int, int]] = []
    for century in word_lists.CENTURIES:
        found = {rest: tokens for rest in range(100) if (tokens := _year_tokens(tokenizer, century, rest))}
        endings |= {rest: tokens[1] for rest, tokens in found.items()}
        if 1 in found:
            usable += [(century, rest) for rest in found if 2 <= rest <= 98]
    if len(usable) < _FEWEST:
        raise InputError(
            "the tokenizer does not split years such as 1732 into 17 and 32: run the greater-than test on a "
            "model whose tokenizer does, as GPT-2's"
        )
    prompts, others, texts, years = [], [], [], []
    for _ in range(count):
        century, rest = draw.choice(usable)
        words = {"noun": draw.choice(nouns), "year": f"{century}{rest:02}", "century": str(century)}
        here = mark(tokenizer, word_lists.YEARS_TEMPLATE, words)
        prompts.append(here.tokens)
        others.append(mark(tokenizer, word_lists.YEARS_TEMPLATE, {**words, "year": f"{century}01"}).tokens)
        texts.append(here.text)
        years.append(rest)
    digits = torch.tensor(sorted(endings))
    ids = torch.tensor([endings[rest] for rest in digits.tolist()])
    valid = digits > torch.tensor(years)[:, None]

    def metric(logits: Tensor, rows: Tensor) -> Tensor:
        chances = logits[:, 0].float().softmax(1)[:, ids.to(logits.device)]
        return (chances * valid[rows.cpu()].to(chances.device)).sum(1)

    return CircuitPrompts(prompts, others, [[-1]] * count, metric, texts)


def _year_tokens(tokenizer: Any, century: int, rest: int) -> list[int] | None:
    """The two tokens of a year in the template, where they split it as 17|32 and stand for 17 at the end."""
    words = {"noun": "war", "year": f"{century}{rest:02}", "century": str(century)}
    found = mark(tokenizer, word_lists.YEARS_TEMPLATE, words)
    span = found.spans["year"]
    tokens = [found.tokens[place] for place in span]
    same_end = [found.tokens[place] for place in found.spans["century"]] == tokens[:1]
    return tokens if len(span) == 2 and same_end else None


def _build_ioi(kind: str) -> Callable[[Any, int, int], CircuitPrompts]:
    return lambda tokenizer, count, seed: _ioi(tokenizer, count, seed, kind)


TESTS = {
    test.name: test
    for test in (
        CircuitTest(
            "1", "IOI previous token, IO+1 and S1+1", "blocks.4.hook_resid_post", _build_ioi("previous")
        ),
        CircuitTest("2", "IOI induction, S2", "blocks.6.hook_resid_post", _build_ioi("second")),
        CircuitTest("3", "IOI position of S, END", "blocks.8.hook_resid_post", _build_ioi("position")),
        CircuitTest("3b", "IOI name of S, END", "blocks.8.hook_resid_post", _build_ioi("name")),
        CircuitTest("4", "greater-than, END", "blocks.9.hook_resid_post", _greater_than),
    )
}
"""The paper's tests by name; effects are of logit(IO) - logit(S), in test 4 of the years' probability."""
