"""Documents into packed rows of tokens: tokenized, joined by end-of-text, cut to the context length."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ndm_fast.activations.documents import Document
from ndm_fast.config import HarvestConfig
from ndm_fast.errors import InputError

_DOCUMENTS_AT_ONCE = 64


class PackedRows(NamedTuple):
    """Rows of tokens without padding, [B, L] each."""

    tokens: Tensor
    """int64 token ids."""
    documents: Tensor
    """int64 running number of the document that a token comes from."""
    special: Tensor
    """bool, true where the token is a special one (BOS, EOS, CLS, SEP ...)."""


class Frame(NamedTuple):
    """Token ids around a row of text, and between documents."""

    first: list[int]
    last: list[int]
    separator: int


def frame(tokenizer: Any, bos: bool = False) -> Frame:
    """What a row begins and ends with, see :func:`pack`.

    Raises:
        InputError: the tokenizer lacks a special token that is needed.
    """
    encoder = tokenizer.cls_token_id is not None and tokenizer.sep_token_id is not None
    separator = tokenizer.sep_token_id if encoder else tokenizer.eos_token_id
    if separator is None:
        raise InputError(
            "the tokenizer has neither EOS nor SEP, so documents cannot be kept apart: set eos_token"
        )
    if bos and not encoder and tokenizer.bos_token_id is None:
        raise InputError("the tokenizer has no BOS token: leave --bos away")
    first = [tokenizer.cls_token_id] if encoder else [tokenizer.bos_token_id] if bos else []
    return Frame(first, [separator] if encoder else [], separator)


def tokenize(documents: Iterable[Document], tokenizer: Any) -> Iterator[list[int]]:
    """Token ids of each document, without special tokens around it.

    Args:
        tokenizer: a fast Hugging Face tokenizer.

    Raises:
        InputError: it has no chat template, and a document is a conversation.
    """
    source = iter(documents)
    while group := list(islice(source, _DOCUMENTS_AT_ONCE)):
        texts = [one if isinstance(one, str) else _conversation(one, tokenizer) for one in group]
        yield from tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def _conversation(messages: list[dict[str, Any]], tokenizer: Any) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # templates are programs of their own
        raise InputError(
            f"the tokenizer's chat template does not take the messages ({error}): take the chat version of "
            "the model, or leave --chat-template away"
        ) from None


def pack(
    documents: Iterable[Document],
    tokenizer: Any,
    length: int,
    rows_per_batch: int,
    *,
    bos: bool = False,
) -> Iterator[PackedRows]:
    """Documents one after the other, cut into rows of exactly ``length`` tokens; a last short row is dropped.

    Causal models: EOS between documents, rows begin with BOS only where asked. Encoders with CLS and SEP
    tokens: every row is CLS ... SEP, with SEP between documents.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        length: tokens in a row, the special ones included.
        rows_per_batch: rows yielded at once; the last batch may hold fewer.
    """
    first, last, separator = frame(tokenizer, bos)
    special_ids = torch.tensor(sorted(set(tokenizer.all_special_ids)))
    body = length - len(first) - len(last)
    tokens: list[int] = []
    owners: list[int] = []
    rows: list[tuple[list[int], list[int]]] = []

    def batch() -> PackedRows:
        stacked = torch.tensor([row for row, _ in rows])
        owned = torch.tensor([owner for _, owner in rows])
        rows.clear()
        return PackedRows(stacked, owned, torch.isin(stacked, special_ids))

    for number, ids in enumerate(tokenize(documents, tokenizer)):
        tokens += [*ids, separator]
        owners += [number] * (len(ids) + 1)
        taken = 0
        while len(tokens) - taken >= body:
            cut, own = tokens[taken : taken + body], owners[taken : taken + body]
            rows.append(([*first, *cut, *last], [own[0]] * len(first) + own + [own[-1]] * len(last)))
            taken += body
            if len(rows) == rows_per_batch:
                yield batch()
        del tokens[:taken], owners[:taken]
    if rows:
        yield batch()


def packed_text(
    open_documents: Callable[[], Iterator[Document]], tokenizer: Any, length: int, config: HarvestConfig
) -> Iterator[PackedRows]:
    """The batches of rows that a harvest runs the model on.

    Raises:
        InputError: the text is to be repeated, but gives no row.
    """
    useful = True
    while useful:
        useful = False
        for rows in pack(open_documents(), tokenizer, length, config.rows_per_batch, bos=config.bos):
            useful = useful or not bool(rows.special.all())
            yield rows
        if not config.repeat_data:
            return
    raise InputError(
        f"the text {config.data} does not fill one row of {length} tokens: give more text, or lower "
        "--context-length"
    )
