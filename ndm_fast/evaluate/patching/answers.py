"""Tokens of a prompt, and of an answer as it follows that prompt."""

from __future__ import annotations

from typing import Any


def prompt_tokens(tokenizer: Any, text: str) -> list[int]:
    """BOS, where the tokenizer has one, and the tokens of a text."""
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return start + tokenizer(text, add_special_tokens=False)["input_ids"]


def answer_token(tokenizer: Any, text: str, answer: str) -> int | None:
    """First token of an answer after a prompt; None where the prompt's last token would change with it.

    Taken from prompt and answer together: by itself an answer may begin otherwise, as SentencePiece puts a
    space before any text.

    Args:
        answer: as it is written after the prompt, so mostly with a space first.
    """
    before, whole = prompt_tokens(tokenizer, text), prompt_tokens(tokenizer, text + answer)
    return whole[len(before)] if len(whole) > len(before) and whole[: len(before)] == before else None
