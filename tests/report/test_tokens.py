"""Tokens for display: bytes, spaces, special and invisible characters."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ndm_fast.report.index.tokens import token_pieces, visible


def pieces_of(tokenizer: Any, text: str) -> list[tuple[str, str, bool]]:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = token_pieces(tokenizer, sorted(set(ids)))
    return [tuple(pieces[token]) for token in ids]


def test_byte_level_tokens_are_decoded(loaded: tuple[Any, Any]) -> None:
    _, tokenizer = loaded
    pieces = pieces_of(tokenizer, "a cat\nsees é\t<|endoftext|>")
    assert "".join(text for text, _, _ in pieces[:-1]) == "a cat⏎sees ⟨C3⟩⟨A9⟩⇥"
    assert [name for _, name, _ in pieces][:2] == ["a", "␣cat"]
    assert pieces[-1] == ("<|endoftext|>", "<|endoftext|>", True)
    assert not any(special for _, _, special in pieces[:-1])


def test_whole_characters_of_several_bytes_are_joined() -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate([*alphabet, "Ã©"])}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ã", "©")]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe)
    assert [text for text, _, _ in pieces_of(tokenizer, "aé")] == ["a", "é"]


def test_wordpiece_words_are_set_apart() -> None:
    vocabulary = {"[UNK]": 0, "ring": 1, "##ing": 2, "[CLS]": 3}
    wordpiece = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    wordpiece.pre_tokenizer = pre_tokenizers.Whitespace()
    wordpiece.decoder = decoders.WordPiece()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=wordpiece, cls_token="[CLS]", unk_token="[UNK]")
    assert [*token_pieces(tokenizer, [1, 2, 3]).values()] == [
        (" ring", "ring", False),
        ("ing", "##ing", False),
        ("[CLS]", "[CLS]", True),
    ]


def test_sentencepiece_spaces_and_bytes() -> None:
    bpe = Tokenizer(models.BPE({"▁the": 0, "<0xE2>": 1, "<0x0A>": 2, "▁▁": 3, "re": 4}, []))
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe)
    assert [*token_pieces(tokenizer, range(5)).values()] == [
        (" the", "␣the", False),
        ("⟨E2⟩", "⟨E2⟩", False),
        ("⏎", "⏎", False),
        ("  ", "␣␣", False),
        ("re", "re", False),
    ]


@pytest.mark.parametrize(
    ("character", "shown"),
    [
        ("\u202e", "⟨U+202E⟩"),
        ("\u200b", "⟨U+200B⟩"),
        ("\x00", "⟨U+0000⟩"),
        ("\r", "␍"),
        ("\ufeff", "⟨U+FEFF⟩"),
    ],
)
def test_characters_without_a_face_are_written_out(character: str, shown: str) -> None:
    assert visible(f"a{character}b") == f"a{shown}b"
    assert visible("日本 é <b>&") == "日本 é <b>&"
