"""Prompts in which the context contradicts what the model knows.

    ENTITY attribute WRONG. OTHER attribute ITS-OWN. ENTITY attribute ...

The context says WRONG, the parameters say RIGHT.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ndm_fast.errors import InputError
from ndm_fast.evaluate.patching.answers import answer_token, prompt_tokens
from ndm_fast.evaluate.patching.language_model import check_lengths
from ndm_fast.evaluate.patching.prompts import pad_prompts
from ndm_fast.files import read_json

_SYLLABLES = tuple(first + second for first in "bdfgklmnrstvz" for second in "aeiou")

_TRIES = 2000

_CANDIDATES = 32
"""Entities that the model is asked about in one forward pass."""


class Attributes(NamedTuple):
    """RAVEL's two files of one kind of entity."""

    values: dict[str, dict[str, str]]
    """Entity -> attribute -> value."""
    prompts: dict[str, list[str]]
    """Attribute -> texts with ``%s`` for the entity, which the value follows."""


class Conflict(NamedTuple):
    """One prompt with its two counterfactuals, all of the same number of tokens."""

    prompt: list[int]
    corrupt_param: list[int]
    corrupt_context: list[int]
    wrong: int
    """First token of what the context says."""
    right: int
    """First token of what the model knows."""
    text: str


def read_ravel(entities: str | Path, prompts: str | Path) -> Attributes:
    """Read ``ravel_<kind>_entity_attributes.json`` and ``ravel_<kind>_attribute_to_prompts.json``.

    Raises:
        InputError: a file cannot be read or has another form.
    """
    values = _read(entities, {str: {str: str}}, "{entity: {attribute: value}}")
    return Attributes(values, _read(prompts, {str: [str]}, "{attribute: [texts with %s]}"))


def _read(path: str | Path, shape: Any, form: str) -> Any:
    remedy = f"give a JSON file of RAVEL's form, {form}"
    try:
        return read_json(Path(path), shape, remedy=remedy, seal=False)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path} is missing: {remedy}") from None


def make_conflicts(
    model: nn.Module,
    tokenizer: Any,
    data: Attributes,
    attribute: str,
    *,
    count: int = 500,
    seed: int = 0,
    known_only: bool = True,
) -> list[Conflict]:
    """Prompts about entities whose value the model knows.

    Known: after one true example of another entity, the first token of the value is the likeliest.

    Args:
        known_only: False keeps entities that the model does not know, to try the machinery on a random model.

    Raises:
        InputError: unknown attribute, or no entity is left.
    """
    texts = [text for text in data.prompts.get(attribute, []) if text.count("%s") == 1]
    values = {e: v[attribute].strip() for e, v in data.values.items() if v.get(attribute, "").strip()}
    if not texts or len(set(values.values())) < 3:
        raise InputError(
            f"attribute {attribute!r} needs a text with one %s and three different values: the files have "
            f"texts for {', '.join(data.prompts) or 'none'}"
        )
    draw = random.Random(f"conflict {seed}")
    order = list(values)
    draw.shuffle(order)
    found: list[Conflict] = []
    for first in range(0, len(order), _CANDIDATES):
        asked = [_ask(draw, texts, values, entity) for entity in order[first : first + _CANDIDATES]]
        if known_only:
            asked = _known(model, tokenizer, asked)
        for question in asked:
            wrong = draw.choice(sorted(set(values.values()) - {question.value, values[question.other]}))
            conflict = _conflict(tokenizer, question, wrong, draw)
            if conflict and len(found) < count:
                found.append(conflict)
        if len(found) == count:
            break
    if not found:
        raise InputError(
            f"the model knows {attribute!r} of none of {len(values)} entities, or no made-up name has as "
            "many tokens: take another attribute or model"
        )
    return found


class _Question(NamedTuple):
    """What is asked of an entity, after a true example of another one."""

    text: str
    entity: str
    value: str
    other: str
    example: str

    def written(self) -> str:
        """The example and the question, without a conflict."""
        return f"{self.example} {_filled(self.text, self.entity)}"


def _ask(draw: random.Random, texts: list[str], values: dict[str, str], entity: str) -> _Question:
    text = draw.choice(texts)
    other = draw.choice([e for e in values if values[e] != values[entity]])
    return _Question(text, entity, values[entity], other, f"{_filled(text, other)} {values[other]}.")


def _filled(text: str, entity: str) -> str:
    return text.replace("%s", entity).strip()


@torch.no_grad()
def _known(model: nn.Module, tokenizer: Any, asked: Sequence[_Question]) -> list[_Question]:
    """The questions whose answer's first token is the likeliest."""
    tokens = [prompt_tokens(tokenizer, question.written()) for question in asked]
    check_lengths(model, tokens)
    prompts = pad_prompts(tokens, device=next(model.parameters()).device)
    logits = model(**prompts.model_inputs(), use_cache=False, logits_to_keep=1).logits
    return [
        question
        for question, likeliest in zip(asked, logits[:, -1].argmax(1).tolist(), strict=True)
        if likeliest == answer_token(tokenizer, question.written(), f" {question.value}")
    ]


def _conflict(tokenizer: Any, asked: _Question, wrong: str, draw: random.Random) -> Conflict | None:
    """None where the two answers begin alike, or no made-up entity fits."""

    def written(first: str, second: str) -> str:
        return f"{_filled(asked.text, first)} {wrong}. {asked.example} {_filled(asked.text, second)}"

    text = written(asked.entity, asked.entity)
    said, true = (answer_token(tokenizer, text, f" {value}") for value in (wrong, asked.value))
    if said is None or true is None or said == true:
        return None
    prompt = prompt_tokens(tokenizer, text)
    for _ in range(_TRIES):
        name = "".join(draw.choices(_SYLLABLES, k=draw.randint(1, 5))).capitalize()
        both, first = (prompt_tokens(tokenizer, written(name, second)) for second in (name, asked.entity))
        if len(both) == len(first) == len(prompt):
            return Conflict(prompt, both, first, said, true, text)
    return None
