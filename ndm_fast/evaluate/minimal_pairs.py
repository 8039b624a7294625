"""Minimal pairs of sentences in CausalGym's form: read from a file, and aligned in a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ndm_fast.errors import InputError
from ndm_fast.evaluate.patching.answers import answer_token, prompt_tokens

_FIELDS = ("base", "src", "base_type", "src_type", "base_label", "src_label")

_BOS = "<|endoftext|>"
"""What their first span begins with; the tokenizer's own BOS takes its place."""


class MinimalPair(NamedTuple):
    """Two sentences in aligned spans, which differ in one feature, and what follows each."""

    task: str
    base: list[str]
    src: list[str]
    base_label: str
    src_label: str


class PairTokens(NamedTuple):
    """A pair in one tokenizer."""

    pair: MinimalPair
    base: list[int]
    src: list[int]
    last: list[tuple[int, int] | None]
    """Per span its last token in base and source; None where a side has none."""
    labels: tuple[int, int]


def read_pairs(path: str | Path) -> list[MinimalPair]:
    """Pairs from a JSON list, or a file with one JSON object a line.

    Each has ``base`` and ``src`` (equally long lists of spans that join to the sentence, or single texts),
    ``base_type``, ``src_type``, ``base_label``, ``src_label`` and perhaps ``task``.

    Raises:
        InputError: the file cannot be read or has another form.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        records = json.loads(text) if text.lstrip().startswith("[") else _lines(text)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read {path} ({error}): give a JSON file of CausalGym's form") from None
    if not records:
        raise InputError(f"{path} holds no pair: give objects with {', '.join(_FIELDS)}")
    return [_pair(record, f"pair {number} of {path}") for number, record in enumerate(records)]


def _lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def _pair(record: Any, where: str) -> MinimalPair:
    missing = [n for n in _FIELDS if n not in record] if isinstance(record, dict) else list(_FIELDS)
    if missing:
        raise InputError(f"{where} has no {missing[0]!r}: give objects with {', '.join(_FIELDS)}")
    base, src = (record[n] if isinstance(record[n], list) else [record[n]] for n in ("base", "src"))
    labels = record["base_label"], record["src_label"]
    if len(base) != len(src) or not base or not all(isinstance(t, str) for t in (*base, *src, *labels)):
        raise InputError(f"{where} is not of CausalGym's form: base and src are lists of as many texts")
    return MinimalPair(str(record.get("task", "")), base, src, *labels)


def pair_tokens(tokenizer: Any, pair: MinimalPair) -> PairTokens | None:
    """None where the labels begin alike or change the last token of their sentence."""
    sides = []
    for spans in (pair.base, pair.src):
        spans = [spans[0].removeprefix(_BOS), *spans[1:]]
        text = "".join(spans)
        sides.append((prompt_tokens(tokenizer, text), _last_tokens(tokenizer, spans), text))
    (base, base_last, text), (src, src_last, _) = sides
    labels = [answer_token(tokenizer, text, label) for label in (pair.base_label, pair.src_label)]
    if None in labels or labels[0] == labels[1] or not base or not src:
        return None
    last = [None if b is None or s is None else (b, s) for b, s in zip(base_last, src_last, strict=True)]
    return PairTokens(pair, base, src, last, (int(labels[0] or 0), int(labels[1] or 0)))


def _last_tokens(tokenizer: Any, spans: Sequence[str]) -> list[int | None]:
    """Number of the last token that ends inside each span."""
    if not getattr(tokenizer, "is_fast", False):
        raise InputError("minimal pairs need a fast tokenizer, which knows where each token lies in the text")
    encoded = tokenizer("".join(spans), add_special_tokens=False, return_offsets_mapping=True)
    before = 0 if tokenizer.bos_token_id is None else 1
    found: list[int | None] = []
    begin = 0
    for span in spans:
        end = begin + len(span)
        inside = [n for n, (_, last) in enumerate(encoded["offset_mapping"]) if begin < last <= end]
        found.append(inside[-1] + before if inside else None)
        begin = end
    return found


def halves_of(usable: Sequence[PairTokens]) -> tuple[list[PairTokens], list[PairTokens]]:
    """Every other sentence pair, and those between; a pair is one with itself swapped."""
    numbers: dict[tuple[str, frozenset[str]], int] = {}
    halves: tuple[list[PairTokens], list[PairTokens]] = ([], [])
    for tokens in usable:
        pair = tokens.pair
        key = pair.task, frozenset("".join(spans) for spans in (pair.base, pair.src))
        halves[numbers.setdefault(key, len(numbers)) % 2].append(tokens)
    return halves
