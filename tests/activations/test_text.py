"""Documents from anywhere, and their packing into rows."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ndm_fast.activations.documents import DOCSTRINGS, open_documents
from ndm_fast.activations.packing import pack
from ndm_fast.errors import InputError

BOS, EOS, CLS, SEP = 1, 2, 3, 4
FIRST_WORD = 10


class NumberTokenizer:
    """Documents are numbers in words, "10 11 12"; each is one token."""

    def __init__(self, *, bos: int | None = BOS, eos: int | None = EOS, encoder: bool = False) -> None:
        self.bos_token_id, self.eos_token_id = bos, eos
        self.cls_token_id, self.sep_token_id = (CLS, SEP) if encoder else (None, None)
        known = (self.bos_token_id, self.eos_token_id, self.cls_token_id, self.sep_token_id)
        self.all_special_ids = [one for one in known if one is not None]

    def __call__(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
        assert options["add_special_tokens"] is False
        return {"input_ids": [[int(word) for word in text.split()] for text in texts]}


def documents_of(lengths: list[int]) -> list[str]:
    """Documents with these numbers of tokens, no token twice."""
    count = iter(range(FIRST_WORD, FIRST_WORD + sum(lengths)))
    return [" ".join(str(next(count)) for _ in range(length)) for length in lengths]


def packed(documents: list[str], length: int, batch: int = 3, **options: Any) -> SimpleNamespace:
    """All rows that ``pack`` gives, joined; the sizes of its batches."""
    bos = options.pop("use_bos", False)
    parts = list(pack(documents, NumberTokenizer(**options), length, batch, bos=bos))
    if not parts:
        return SimpleNamespace(tokens=[], documents=[], special=[], sizes=[])
    assert all(part.tokens.dtype == part.documents.dtype == torch.int64 for part in parts)
    joined = (torch.cat(column).tolist() for column in zip(*parts, strict=True))
    return SimpleNamespace(
        **dict(zip(("tokens", "documents", "special"), joined, strict=True)),
        sizes=[len(p.tokens) for p in parts],
    )


def test_causal_rows():
    rows = packed(["10 11 12", "13", "", "14 15"], 4)
    assert rows.tokens == [[10, 11, 12, EOS], [13, EOS, EOS, 14]]  # 15 and EOS do not fill a row
    assert rows.documents == [[0, 0, 0, 0], [1, 1, 2, 3]]
    assert rows.special == [[False, False, False, True], [False, True, True, False]]


def test_bos_rows():
    rows = packed(["10 11 12", "13"], 4, use_bos=True)
    assert rows.tokens == [[BOS, 10, 11, 12], [BOS, EOS, 13, EOS]]
    assert rows.documents == [[0, 0, 0, 0], [0, 0, 1, 1]]
    assert rows.special[1] == [True, True, False, True]


@pytest.mark.parametrize("use_bos", [False, True])
def test_encoder_rows(use_bos):
    rows = packed(["10 11 12", "13 14"], 5, encoder=True, bos=None, eos=None, use_bos=use_bos)
    assert rows.tokens == [[CLS, 10, 11, 12, SEP], [CLS, SEP, 13, 14, SEP]]
    assert rows.documents == [[0, 0, 0, 0, 0], [0, 0, 1, 1, 1]]
    assert rows.special[1] == [True, True, False, False, True]


@given(
    lengths=st.lists(st.integers(0, 9), max_size=150),
    length=st.integers(3, 8),
    batch=st.integers(1, 5),
    kind=st.sampled_from(["causal", "bos", "encoder"]),
)
def test_no_token_is_lost_or_doubled(lengths, length, batch, kind):
    documents = documents_of(lengths)
    rows = packed(documents, length, batch, encoder=kind == "encoder", use_bos=kind == "bos")
    separator = SEP if kind == "encoder" else EOS
    first, last = {"causal": (0, 0), "bos": (1, 0), "encoder": (1, 1)}[kind]
    stream = [(int(w), n) for n, text in enumerate(documents) for w in [*text.split(), separator]]
    body = length - first - last
    assert len(rows.tokens) == len(stream) // body
    assert all(len(row) == length for row in rows.tokens)
    assert rows.sizes == [batch] * (len(rows.tokens) // batch) + [len(rows.tokens) % batch] * bool(
        len(rows.tokens) % batch
    )
    inner = slice(first, length - last)
    found = [
        pair
        for tokens, owners in zip(rows.tokens, rows.documents, strict=True)
        for pair in zip(tokens[inner], owners[inner], strict=True)
    ]
    assert found == stream[: len(found)]
    for tokens, special in zip(rows.tokens, rows.special, strict=True):
        assert special == [token < FIRST_WORD for token in tokens]
        assert first == 0 or tokens[0] == (CLS if kind == "encoder" else BOS)
        assert last == 0 or tokens[-1] == SEP


@pytest.mark.parametrize(
    ("tokenizer", "bos", "says"),
    [
        (NumberTokenizer(eos=None), False, "set eos_token"),
        (NumberTokenizer(bos=None), True, "leave --bos away"),
    ],
)
def test_missing_special_tokens_are_refused(tokenizer, bos, says):
    with pytest.raises(InputError, match=says):
        next(pack(["10 11"], tokenizer, 4, 1, bos=bos))


def test_a_real_tokenizer_and_model_text(loaded):
    _, tokenizer = loaded
    rows = next(pack(["the cat sees a dog"] * 20, tokenizer, 16, 2))
    text = tokenizer.decode(rows.tokens.flatten())
    assert text.startswith("the cat sees a dog" + tokenizer.eos_token + "the cat sees")
    assert rows.special.any()


def write_parquet(path: Any, columns: dict[str, list[Any]]) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table(columns), path)


@pytest.fixture
def folder(tmp_path):
    """One document or more in every format, with a file that is none."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.txt").write_text("text b\nsecond line ü", encoding="utf-8")
    (tmp_path / "a.md").write_text("# text a")
    (tmp_path / "c.jsonl").write_text('{"text": "one", "body": "uno"}\n\n{"text": "two", "body": "due"}\n')
    (tmp_path / "deep" / "d.txt").write_text("text d")
    (tmp_path / "e.log").write_text("not a document")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("b.txt", ["text b\nsecond line ü"]),
        ("a.md", ["# text a"]),
        ("c.jsonl", ["one", "two"]),
        ("", ["# text a", "text b\nsecond line ü", "one", "two", "text d"]),
        ("*.txt", ["text b\nsecond line ü"]),
        ("**/*.txt", ["text b\nsecond line ü", "text d"]),
        ("[ac].*", ["# text a", "one", "two"]),
    ],
)
def test_every_form_is_read_in_order_and_again(folder, name, expected):
    read = open_documents(str(folder / name) if name else str(folder))
    assert list(read()) == expected
    assert list(read()) == expected


def test_parquet_and_other_fields(folder):
    write_parquet(folder / "p.parquet", {"text": ["x", None, "", "y"], "body": ["1", "2", "3", "4"]})
    assert list(open_documents(str(folder / "p.parquet"))()) == ["x", "y"]
    assert list(open_documents(str(folder / "p.parquet"), "body")()) == ["1", "2", "3", "4"]
    assert list(open_documents(str(folder / "c.jsonl"), "body")()) == ["uno", "due"]


def test_home_is_expanded(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert list(open_documents("~/a.md")()) == ["# text a"]
    assert list(open_documents("~/*.md")()) == ["# text a"]


def damaged_parquet(path):
    write_parquet(path, {"text": [f"text {i} " * 50 for i in range(500)]})
    content = bytearray(path.read_bytes())
    content[100 : len(content) // 2] = bytes(len(content) // 2 - 100)
    path.write_bytes(content)


def cut_parquet(path):
    write_parquet(path, {"text": ["a"] * 100})
    path.write_bytes(path.read_bytes()[:50])


BROKEN: list[tuple[str, Any, str]] = [
    ("bad.txt", b"caf\xe9", "UTF-8"),
    ("bad.jsonl", b'{"text": "a"}\n{"text": \n', "bad.jsonl:2 is not JSON"),
    ("latin.jsonl", b'{"text": "caf\xe9"}\n', "UTF-8"),
    ("field.jsonl", b'{"body": "a", "title": "b"}\n', r"set --text-field to one of \['body', 'title'\]"),
    ("number.jsonl", b'{"text": 5}\n', "has no text in field 'text'"),
    ("list.jsonl", b"[1, 2]\n", "has no text in field 'text'"),
    ("cut.parquet", cut_parquet, "whole parquet file"),
    ("damaged.parquet", damaged_parquet, "whole parquet file"),
    ("text.parquet", b"hello", "whole parquet file"),
    ("field.parquet", lambda p: write_parquet(p, {"body": ["a"]}), r"set --text-field to one of \['body'\]"),
    ("number.parquet", lambda p: write_parquet(p, {"text": [1, 2], "body": ["a", "b"]}), "but int"),
]


@pytest.mark.parametrize(("name", "content", "says"), BROKEN, ids=[name for name, _, _ in BROKEN])
def test_unreadable_files_are_refused(tmp_path, name, content, says):
    if isinstance(content, Callable):
        content(tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=says) as refusal:
        list(open_documents(str(tmp_path / name))())
    assert name in str(refusal.value)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("", "pass --data"),
        ("{}/none.txt", "check the path"),
        ("{}/*.txt", "check the path"),
        ("{}", "matches no file that is read"),
        ("{}/e.csv", "convert it or rename it"),
        ("no/such-dataset", "no/such-dataset"),
    ],
)
def test_missing_data_is_refused(tmp_path, data, says):
    (tmp_path / "e.csv").write_text("a,b")
    with pytest.raises(InputError, match=says):
        next(iter(open_documents(data.format(tmp_path))()))


def test_docstrings_are_deterministic_by_seed(monkeypatch):
    """On one package of the standard library; the whole of it takes a while to parse."""
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(Path(asyncio.__file__).parent)})
    first = list(islice(open_documents(DOCSTRINGS, seed=0)(), 150))
    assert list(islice(open_documents(DOCSTRINGS, seed=0)(), 150)) == first
    assert list(islice(open_documents(DOCSTRINGS, seed=1)(), 150)) != first
    assert len(set(first)) > 100
    assert any("event loop" in text for text in first)
