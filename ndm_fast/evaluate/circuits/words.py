"""Prompts with the tokens of each word known; the same words, templates and seed give the same prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ndm_fast.errors import InputError
from ndm_fast.evaluate.patching.patching import Metric

FEWEST = 4
"""Words that a tokenizer must keep whole for a test to be run."""

TEMPLATE_SETS = ("a", "b", "all")
"""Two disjoint sets of templates and words: settings are chosen on one and reported on the other."""


class CircuitPrompts(NamedTuple):
    """N prompts with their counterfactuals of equal length, where to patch, and what to measure."""

    prompts: list[list[int]]
    counterfactuals: list[list[int]]
    positions: list[list[int]]
    metric: Metric
    texts: list[str]
    places: list[dict[str, list[int]]]
    """Per prompt, kind of position -> its tokens; those of no kind are in none."""
    signs: list[int]
    """[N] 1 or -1: which way the counterfactual changes the variable, so that differences do not cancel."""
    right_above: float = 0.0
    """The model does the task right where the metric is above this."""
    form: str = ""
    """Said after the test's name where the tokenizer asked for another form of it."""


class Marked(NamedTuple):
    """A tokenised text with BOS, and the tokens that cover each of its marked words."""

    tokens: list[int]
    spans: dict[str, list[int]]
    text: str


def mark(tokenizer: Any, template: str, words: dict[str, str]) -> Marked:
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
    return Marked(start + encoded["input_ids"], spans, text)


def whole_words(tokenizer: Any, words: Sequence[str], kind: str) -> list[str]:
    """The words that are one token in running text.

    Raises:
        InputError: too few of them to make varied prompts.
    """
    whole = [w for w in words if len(mark(tokenizer, "They saw {w} there", {"w": w}).spans["w"]) == 1]
    if len(whole) < FEWEST:
        split = next(word for word in words if word not in whole)
        more = len(words) - len(whole) - 1
        raise InputError(
            f"the tokenizer splits {split!r} and {more} more of {len(words)} {kind} into several tokens: "
            "run circuit tests on a model whose tokenizer keeps common words whole"
        )
    return whole


def half_of(words: Sequence[str], templates: str) -> Sequence[str]:
    """The words of one of ``TEMPLATE_SETS``: every other one, or all.

    Raises:
        InputError: an unknown set.
    """
    if templates not in TEMPLATE_SETS:
        raise InputError(f"unknown template set {templates!r}: take one of {', '.join(TEMPLATE_SETS)}")
    return words if templates == "all" else words[TEMPLATE_SETS.index(templates) :: 2]
