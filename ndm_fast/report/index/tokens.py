"""Tokens as people read them: bytes decoded, word boundaries, special and invisible characters shown."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from markupsafe import Markup

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


_WHITESPACE = {"\n": "⏎", "\t": "⇥", "\r": "␍"}


_SENTENCEPIECE_SPACE, _WORDPIECE_PREFIX = "▁", "##"


class Piece(NamedTuple):
    """One token for display."""

    text: str
    """Its stretch of a text, with the space before it where the tokenizer means one."""
    name: str
    """The token by itself, with its space visible."""
    special: bool
    """Whether it is a special token (CLS, EOS, ...)."""


def token_pieces(tokenizer: Any, ids: Iterable[int]) -> dict[int, Piece]:
    """Pieces of these token ids, for byte-level BPE, SentencePiece and WordPiece tokenizers.

    Bytes that are no whole character are shown in hexadecimal (``⟨E2⟩``), control and direction characters by
    number (``⟨U+202E⟩``), line ends and tabs as ``⏎`` and ``⇥``.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
    """
    kinds = set(_decoder_kinds(json.loads(tokenizer.backend_tokenizer.to_str()).get("decoder")))
    special = set(tokenizer.all_special_ids)
    wanted = list(ids)
    pieces = {}
    for number, raw in zip(wanted, tokenizer.convert_ids_to_tokens(wanted), strict=True):
        if number in special:
            pieces[number] = Piece(visible(raw), visible(raw), True)
        elif "WordPiece" in kinds:
            inside = raw.startswith(_WORDPIECE_PREFIX) and len(raw) > len(_WORDPIECE_PREFIX)
            text = raw.removeprefix(_WORDPIECE_PREFIX) if inside else f" {raw}"
            pieces[number] = Piece(visible(text), visible(raw), False)
        else:
            text = visible(_from_bytes(raw) if "ByteLevel" in kinds else _from_sentencepiece(raw))
            pieces[number] = Piece(text, re.sub("^ +| +$", lambda m: "␣" * len(m[0]), text), False)
    return pieces


def visible(text: str) -> str:
    """The text with characters that would not be seen, or would move others, written out."""
    return "".join(_shown(character) for character in text)


def shown(content: Any) -> Any:
    """Any content of a page in which no control or direction character is left but line ends and tabs."""
    if isinstance(content, str):
        if content.isprintable() or isinstance(content, Markup):
            return content
        return "".join(c if c in "\n\t" else _shown(c) for c in content)
    if isinstance(content, dict):
        return {name: shown(value) for name, value in content.items()}
    return [shown(value) for value in content] if isinstance(content, list | tuple) else content


def _shown(character: str) -> str:
    if character in _WHITESPACE:
        return _WHITESPACE[character]
    unseen = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
    return f"⟨U+{ord(character):04X}⟩" if unseen else character


def _decoder_kinds(decoder: Any) -> Iterator[str]:
    """Types of a tokenizer's decoder and of those nested in it."""
    if isinstance(decoder, dict):
        yield str(decoder.get("type"))
        for nested in decoder.get("decoders", []):
            yield from _decoder_kinds(nested)


def _from_bytes(raw: str) -> str:
    values = [_BYTES.get(character) for character in raw]
    if None in values:  # a token that was added as it is
        return raw
    return _decoded(bytes(value for value in values if value is not None))


def _from_sentencepiece(raw: str) -> str:
    byte = _BYTE_TOKEN.fullmatch(raw)
    return _decoded(bytes([int(byte[1], 16)])) if byte else raw.replace(_SENTENCEPIECE_SPACE, " ")


def _decoded(content: bytes) -> str:
    text = content.decode("utf-8", errors="surrogateescape")
    return "".join(f"⟨{ord(c) - 0xDC00:02X}⟩" if 0xDC80 <= ord(c) <= 0xDCFF else c for c in text)


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level BPE: printable ones as in Latin-1, others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_alphabet()
