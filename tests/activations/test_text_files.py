"""Text as people have it: marks and encodings, packed shards, leftovers, nested fields, large files."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ndm_fast.activations import documents, text_files
from ndm_fast.activations.documents import open_documents
from ndm_fast.activations.packing import tokenize
from ndm_fast.errors import InputError

LINES = '{"text": "one ü"}\n{"text": "two"}\n'


def read(path: Path, **reading: Any) -> list[Any]:
    return list(open_documents(str(path), **reading)())


def parquet(path: Path, columns: dict[str, list[Any]]) -> None:
    arrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(arrow.table(columns), path)


@pytest.fixture(autouse=True)
def everything_is_said() -> None:
    text_files.say_once.cache_clear()


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("asked", ["utf-8", "cp1252", "auto"])
def test_a_byte_order_mark_says_the_encoding(tmp_path, encoding, asked):
    (tmp_path / "a.txt").write_bytes("hello thérè\r\nΩ".encode(encoding))
    (tmp_path / "b.jsonl").write_bytes(LINES.encode(encoding))
    assert read(tmp_path, encoding=asked) == ["hello thérè\nΩ", "one ü", "two"]


def test_utf_16_without_a_mark_is_not_read_as_utf_8(tmp_path):
    (tmp_path / "a.txt").write_bytes("hello there".encode("utf-16-be"))
    with pytest.raises(InputError, match="--encoding utf-16-be"):
        read(tmp_path)
    assert read(tmp_path, encoding="utf-16-be") == read(tmp_path, encoding="auto") == ["hello there"]


def latin_folder(tmp_path: Path) -> Path:
    """Three files; of the second's characters one is of Latin-1, deep inside."""
    (tmp_path / "a.txt").write_text("plain")
    (tmp_path / "b.txt").write_bytes(b"x" * 27_596 + "½ cup of flour".encode("latin-1"))
    (tmp_path / "c.jsonl").write_bytes(
        b'{"text": "good"}\n{"text": "caf\xe9"}\n{"text": "ok", "n": "\xe9"}\n'
    )
    return tmp_path


def test_another_encoding_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(
        InputError, match=r"b.txt is not UTF-8 \(byte 27,596\), nor are 1 more files: pass --encoding"
    ):
        open_documents(str(latin_folder(tmp_path)))


def test_what_lies_beyond_the_first_look_is_refused_when_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "_CHECKED_BYTES", 1)
    (latin_folder(tmp_path) / "c.jsonl").unlink()
    opened = open_documents(str(tmp_path))
    with pytest.raises(InputError, match=r"b.txt is not UTF-8 \(byte 27,596\)"):
        list(opened())


def test_bad_text_is_skipped_and_counted_or_replaced(tmp_path, capsys):
    folder = latin_folder(tmp_path)
    assert read(folder, bad_text="skip") == ["plain", "good", "ok"]
    assert capsys.readouterr().err == (
        f"ndm-fast: skipped in {folder}: 2 not readable (see docs/activations.md)\n"
    )
    replaced = ["plain", "x" * 27_596 + "\ufffd cup of flour", "good", "caf\ufffd", "ok"]
    assert read(folder, bad_text="replace") == replaced
    assert not capsys.readouterr().err


def test_encodings_by_name_and_by_detection(tmp_path, capsys):
    (tmp_path / "a.txt").write_bytes("½ cup of flour, crème fraîche".encode("cp1252"))
    assert read(tmp_path, encoding="cp1252") == ["½ cup of flour, crème fraîche"]
    pytest.importorskip("charset_normalizer")
    (tmp_path / "a.txt").write_bytes("café".encode("latin-1"))
    assert read(tmp_path, encoding="auto")[0].startswith("caf"), "four bytes are no UTF-16"
    russian = "Все счастливые семьи похожи друг на друга. " * 30
    (tmp_path / "a.txt").write_bytes(russian.encode("cp1251"))
    (tmp_path / "b.txt").write_text(russian, encoding="utf-8")
    assert read(tmp_path, encoding="auto") == [russian, russian]
    assert "a.txt is read as cp1251, as detected" in capsys.readouterr().err


def test_unknown_encodings_and_a_missing_detector_are_refused(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a")
    for name in ("utf8x", "hex", ""):
        with pytest.raises(InputError, match="a name that Python knows"):
            open_documents(str(tmp_path), encoding=name)
    monkeypatch.setitem(sys.modules, "charset_normalizer", None)
    with pytest.raises(InputError, match=r"needs charset-normalizer: pip install 'ndm-fast\[data\]'"):
        open_documents(str(tmp_path), encoding="auto")


def zstd(content: bytes) -> bytes:
    """Two frames, as tools that pack in parallel write them."""
    pack = pytest.importorskip("zstandard").ZstdCompressor()
    return pack.compress(content[:20]) + pack.compress(content[20:])


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstd,
}


@pytest.mark.parametrize("kind", PACKERS)
def test_packed_shards_are_read_like_plain_ones(tmp_path, kind):
    (tmp_path / "a.jsonl").write_text(LINES, encoding="utf-8")
    for name, content in (("b.jsonl", LINES), ("c.json", LINES), ("d.txt", "text d"), ("e.MD", "# e")):
        (tmp_path / f"{name}.{kind}").write_bytes(PACKERS[kind](content.encode()))
    assert read(tmp_path) == ["one ü", "two"] * 3 + ["text d", "# e"]
    assert read(tmp_path / f"d.txt.{kind}") == ["text d"]


@pytest.mark.parametrize("kind", PACKERS)
def test_a_damaged_packed_shard_is_named(tmp_path, kind):
    packed = PACKERS[kind](LINES.encode() * 50)
    for number, content in enumerate((packed[:-9], b"not packed", packed[:8] + bytes(len(packed)))):
        path = tmp_path / f"{number}.jsonl.{kind}"
        path.write_bytes(content)
        with pytest.raises(InputError, match=rf"{number}.jsonl.{kind}"):
            read(path)


def test_a_missing_unpacker_is_named(tmp_path, monkeypatch):
    if sys.version_info >= (3, 14):
        pytest.skip("Python has it")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "a.txt.zst").write_bytes(b"")
    with pytest.raises(InputError, match=r"needs zstandard: pip install 'ndm-fast\[data\]'"):
        open_documents(str(tmp_path))


def test_hidden_files_are_left_out_and_what_is_not_read_is_named_once(tmp_path, capsys):
    for name in (".git/description.txt", ".ipynb_checkpoints/a.txt", "deep/a.txt", "deep/.b.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "._part-00.jsonl").write_bytes(b"\x00\x05\x16\x07")
    for name in ("part-00.csv", "part-01.csv", "x.tar.gz", "LICENSE", "dataset_info.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "linked").symlink_to(tmp_path / "deep")
    for _ in range(2):
        assert read(tmp_path) == ["deep/a.txt"]
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "2 .csv (part-00.csv), 1 .tar.gz (x.tar.gz), 1 about a dataset (dataset_info.json)" in said
    assert "4 hidden (.git), 1 linked folder (linked), 1 without a suffix (LICENSE)" in said


def test_a_glob_says_what_it_does_not_read(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.csv").write_text("a")
    assert read(tmp_path / "a*") == ["a"]
    assert "1 .csv (a.csv)" in capsys.readouterr().err


NESTED = [
    {"data": {"text": "one", "meta": {"n": 1}}},
    {"data": {"text": "two", "meta": None}},
    {"data": None},
]


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_nested_fields(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        parquet(path, {"data": [record["data"] for record in NESTED], "n": [1, 2, 3]})
    else:
        path.write_text(json.dumps(NESTED) if kind == "json" else "\n".join(map(json.dumps, NESTED)))
    assert read(path, text_field="data.text") == ["one", "two"]
    for field in ("data", "data.txt", "data.meta", "data.text.deeper"):
        with pytest.raises(InputError, match=r"set --text-field to one of \['data.text'\]"):
            open_documents(str(path), text_field=field)
    there = r"\['data', 'n'\]" if kind == "parquet" else r"\['data.text'\]"
    with pytest.raises(InputError, match=f"set --text-field to one of {there}"):
        open_documents(str(path), text_field="text")


def test_a_field_without_text_is_not_advised(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": 3, "n": {"m": 4}}')
    with pytest.raises(InputError, match=r"in field 'text' but int: set --text-field to one of \['n'\]"):
        read(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"text": 3}')
    with pytest.raises(InputError, match=r"in field 'text' but int: mend it, or pass"):
        read(tmp_path)


def test_a_field_with_a_dot_in_its_name(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"data.text": "whole", "data": {"text": "nested"}}')
    parquet(tmp_path / "a.parquet", {"data.text": ["whole"]})
    assert read(tmp_path, text_field="data.text") == ["whole", "whole"]


def test_parquet_bytes_are_utf_8(tmp_path):
    parquet(tmp_path / "a.parquet", {"text": ["größe".encode(), b"caf\xe9", None, b""]})
    with pytest.raises(InputError, match=r"row 2 .* --bad-text skip or replace"):
        read(tmp_path)
    assert read(tmp_path, bad_text="skip") == ["größe"]
    assert read(tmp_path, bad_text="replace") == ["größe", "caf\ufffd"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "dataset"])
def test_null_and_empty_records_are_skipped_and_counted(tmp_path, kind, capsys, monkeypatch):
    texts = [None, "a", "", " \n", "b", None]
    if kind == "parquet":
        parquet(tmp_path / "a.parquet", {"text": texts})
    elif kind == "jsonl":
        (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    else:
        records = [(f"d, record {n}", {"text": text}) for n, text in enumerate(texts)]
        monkeypatch.setattr(documents, "dataset_records", lambda name: iter(records))
    opened = open_documents("d" if kind == "dataset" else str(tmp_path))
    assert list(opened()) == ["a", "b"]
    assert opened.skipped == {"empty": 4}
    assert ": 4 empty" in capsys.readouterr().err


def test_a_reader_that_has_enough_is_told_of_what_was_skipped_so_far(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": "a"}\n{"text": ""}\n')
    reading = open_documents(str(tmp_path))()
    assert next(reading) == "a"
    reading.close()
    assert ": 1 empty" in capsys.readouterr().err


ODD = [
    ('{"text": "a"', "is not JSON"),
    ("[" * 100_000, "cannot be read"),
    ('{"text": ' + "9" * 5000 + "}", "cannot be read"),
    ('{"text": "\\ud800 half"}', "is no Unicode"),
    ('{"body": "b"}', r"set --text-field to one of \['body'\]"),
    ('"a"', "no text in field 'text' but str"),
    ('{"text": ["a", "b"]}', "but list"),
]


@pytest.mark.parametrize(("line", "says"), ODD, ids=range(len(ODD)))
def test_odd_records_are_refused_or_skipped(tmp_path, line, says):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "fine"}}\n{line}\n{{"text": "good"}}\n')
    with pytest.raises(InputError, match=says) as refusal:
        read(path)
    assert "\n" not in str(refusal.value)
    opened = open_documents(str(path), bad_text="skip")
    assert list(opened()) == ["fine", "good"]
    assert opened.skipped == {"not readable": 1}


MESSAGES = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sees a dog"}]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_messages_go_through_the_chat_template(tmp_path, kind, tiny_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        parquet(path, {"messages": [MESSAGES, None, []]})
    else:
        path.write_text(json.dumps({"messages": MESSAGES}) + '\n{"messages": []}\n')
    with pytest.raises(InputError, match="holds messages: pass --chat-template"):
        open_documents(str(path), text_field="messages")
    opened = open_documents(str(path), text_field="messages", chat_template=True)
    with pytest.raises(InputError, match="the chat version of the model"):
        list(tokenize(opened(), tokenizer))
    tokenizer.chat_template = TEMPLATE
    (ids,) = tokenize(opened(), tokenizer)
    assert tokenizer.decode(ids) == "user: the cat\nassistant: sees a dog\n"


PARAGRAPHS = "one\nof two lines\n\n \ntwo\n\n\nthree\n"


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("auto", [PARAGRAPHS]),
        ("none", [PARAGRAPHS]),
        ("lines", ["one", "of two lines", "two", "three"]),
        ("blank-lines", ["one\nof two lines", "two", "three"]),
    ],
)
def test_text_files_are_split_where_asked(tmp_path, mode, expected):
    (tmp_path / "a.txt").write_text(PARAGRAPHS)
    assert read(tmp_path, split_documents=mode) == expected


@pytest.mark.parametrize("joint", ["\n", "\n\n"], ids=["lines", "blank-lines"])
@pytest.mark.parametrize("packed", [False, True])
def test_large_text_files_are_split_by_default_and_it_is_said(tmp_path, joint, packed, capsys):
    parts = [f"{number} " + "word " * 50 + "." for number in range(5000)]
    content = joint.join(parts).encode()
    (tmp_path / ("a.txt.gz" if packed else "a.txt")).write_bytes(
        gzip.compress(content) if packed else content
    )
    assert read(tmp_path) == parts
    said = capsys.readouterr().err
    assert f"by {'lines' if joint == chr(10) else 'blank-lines'}: choose with --split-documents" in said


def test_the_result_of_a_run_says_what_was_skipped(ndm, train_flags, corpus, tmp_path):
    data = Path(shutil.copytree(corpus, tmp_path / "data"))
    (data / "0.txt").write_bytes(b"caf\xe9")
    (data / "00.jsonl").write_text('{"text": null}\n{"text": ""}\n')
    assert ndm(*train_flags(tmp_path / "run", data=data, bad_text="skip", max_steps=4)).code == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["text_skipped"] == {"empty": 2, "not readable": 1}


def test_a_harvest_says_what_it_skipped_and_gives_each_part_a_document(ndm, harvest_flags, corpus, tmp_path):
    from ndm_fast.activations.cache import ActivationCache

    data = Path(shutil.copytree(corpus, tmp_path / "data"))
    (data / "notes.pdf").write_bytes(b"")
    (data / "0.txt").write_bytes(b"caf\xe9")
    refused = ndm(*harvest_flags(tmp_path / "acts", data=data, model="no/such-model"))
    assert "0.txt is not UTF-8 (byte 3)" in refused.err, "the text is looked at before the model is loaded"
    flags = harvest_flags(tmp_path / "acts", data=data, bad_text="skip", rows=10**6, split_documents="lines")
    outcome = ndm(*flags)
    assert outcome.code == 0
    assert "1 not readable" in outcome.err
    cache = ActivationCache(tmp_path / "acts")
    assert cache.stream("x0.mid").text_skipped == {"not readable": 1}
    seen = {int(n) for rows in cache.stream("x0.mid").token_rows() for n in rows.document}
    assert len(seen) >= 58
