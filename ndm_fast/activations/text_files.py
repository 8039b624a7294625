"""Files of text: which ones of a folder are read, how they are opened, and which encoding they have."""

from __future__ import annotations

import bz2
import codecs
import functools
import glob
import gzip
import io
import lzma
import os
import sys
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from ndm_fast.errors import InputError
from ndm_fast.ranks import launched

KINDS = (".txt", ".md", ".jsonl", ".ndjson", ".json", ".parquet")
"""Suffixes of files that are read."""

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
"""Suffixes that may follow those of text and JSON."""

FORMATS = f"{', '.join(KINDS)}; all but parquet also with {', '.join(COMPRESSED)}"

_ABOUT_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""Files that lie beside a Hugging Face dataset and hold no text of it."""

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins as the mark of UTF-16 does
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)

_HEAD, _CHUNK, _SAMPLE = 4096, 1 << 20, 1 << 17

_CHECKED_BYTES = 1 << 30
"""Bytes that are decoded before anything else is done; a second or two."""

_DETECTED_BYTES = 1 << 26
"""Bytes of a file that have to be UTF-8 for it to be taken for that; beyond them an odd byte is bad text."""

_WIDE = ("utf_16", "utf_16_le", "utf_16_be", "utf_32", "utf_32_le", "utf_32_be", "utf_7")
"""What a detector makes of a few odd bytes; wide text is known by its mark or its zeros."""

SKIP_MARK = "ndm_fast.mark"
"""Error handler of a decoder that puts half a character, which no text holds, in place of bad bytes."""

codecs.register_error(SKIP_MARK, lambda error: ("\udfff", getattr(error, "end", 0)))


@functools.cache
def say_once(line: str) -> None:
    """Write a line to stderr, the first time only; of torchrun's processes the first one does."""
    if launched().rank == 0:
        tqdm.write(f"ndm-fast: {line}", file=sys.stderr)


def kind_of(path: Path) -> str | None:
    """Which of ``KINDS`` a file is, by its name; None where it is not read."""
    *others, last = ["", *(suffix.lower() for suffix in path.suffixes[-2:])]
    if last in COMPRESSED:
        return others[-1] if others[-1] in KINDS and others[-1] != ".parquet" else None
    return last if last in KINDS else None


def find_files(data: str) -> list[Path]:
    """The files of text that a path or glob names, sorted; says what else lies there and is not read.

    Hidden files and folders (``.git``, ``._part-00.jsonl``, ``.ipynb_checkpoints``) are not read.

    Raises:
        InputError: it names one file, and of a kind that is not read.
    """
    path = Path(data).expanduser()
    if path.is_file():
        if kind_of(path) is None:
            raise InputError(f"{path} is no file that is read ({FORMATS}): convert it or rename it")
        return [path]
    if path.is_dir():
        found = list(_walk(path))
    elif glob.has_magic(data):
        matched = sorted(map(Path, glob.glob(str(path), recursive=True)))
        found = [(p, "") for p in matched if p.is_file()]
    else:
        return []
    others: dict[str, list[Path]] = defaultdict(list)
    for file, why in found:
        if why or kind_of(file) is None:
            others[why or "".join(file.suffixes[-2:]) or "without a suffix"].append(file)
    if others:
        counts = ", ".join(f"{len(some)} {why} ({some[0].name})" for why, some in sorted(others.items()))
        say_once(f"not read in {data}: {counts}; text is read from {FORMATS}")
    return sorted(file for file, why in found if not why and kind_of(file))


def _walk(root: Path) -> Iterator[tuple[Path, str]]:
    """Everything below a folder, and why it is not looked at where it is not."""
    for folder, below, names in os.walk(root):
        for name in sorted(below):
            if name.startswith("."):
                yield Path(folder, name), "hidden"
            elif Path(folder, name).is_symlink():
                yield Path(folder, name), "linked folder"
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in sorted(names):
            why = "hidden" if name.startswith(".") else "about a dataset" if name in _ABOUT_DATA else ""
            yield Path(folder, name), why


def open_bytes(path: Path) -> IO[bytes]:
    """A file, unpacked where its name says that it is compressed.

    Raises:
        InputError: the package that unpacks it is missing.
        OSError: it cannot be opened.
    """
    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zstd}
    return openers.get(path.suffix.lower(), open)(path, "rb")


def _open_zstd(path: Path, mode: str) -> Any:
    if sys.version_info >= (3, 14):
        from compression import zstd

        longest = {zstd.DecompressionParameter.window_log_max: 31}  # of `zstd --long=31`
        return zstd.open(path, mode, options=longest)
    try:
        import zstandard
    except ImportError:
        raise InputError(f"reading {path} needs zstandard: pip install 'ndm-fast[data]'") from None
    unpacker = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    return unpacker.stream_reader(path.open(mode), read_across_frames=True)


@contextmanager
def open_text(path: Path, encoding: str, bad_text: str) -> Iterator[io.TextIOWrapper]:
    """The text of a file, line ends as ``\\n``.

    Args:
        encoding: as from :func:`encoding_of`.
        bad_text: ``error``, ``replace``, or ``skip``, which leaves half a character where bytes are wrong.

    Raises:
        InputError: while it is read: it is damaged, or its bytes are not of the encoding.
    """
    errors = {"error": "strict", "skip": SKIP_MARK, "replace": "replace"}[bad_text]
    with readable(path):
        try:
            with open_bytes(path) as file, io.TextIOWrapper(file, encoding=encoding, errors=errors) as text:
                yield text
        except UnicodeDecodeError as error:
            where = first_bad_byte(path, encoding)
            raise not_of(path, encoding, error.start if where is None else where) from None


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns what a file that cannot be read or unpacked raises into an ``InputError``."""
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise InputError(f"cannot read {path} ({error}): check the file, or take it away") from None
    except Exception as error:
        if type(error).__name__ != "ZstdError":  # of either package
            raise
        raise InputError(f"cannot read {path} ({error}): check the file, or take it away") from None


def encoding_of(path: Path, asked: str) -> str:
    """The encoding of a file: that of its byte-order mark; else the one asked for, or, for auto, found.

    Raises:
        InputError: it looks like UTF-16 without a mark; the detector is missing; it cannot be read.
    """
    with readable(path), open_bytes(path) as file:
        head = file.read(_HEAD)
    for mark, name in _MARKS:
        if head.startswith(mark):
            return name
    wide = _sixteen_bits(head)
    if asked == "auto":
        return wide or _detected(path)
    if wide and codecs.lookup(asked).name == "utf-8":
        raise InputError(f"{path} looks like UTF-16 without a mark: pass --encoding {wide}, or auto")
    return asked


def _sixteen_bits(head: bytes) -> str | None:
    """UTF-16 without a mark is valid UTF-8, with a zero after or before each Latin letter."""
    pairs = len(head) // 2
    first, second = head[0 : 2 * pairs : 2].count(0), head[1 : 2 * pairs : 2].count(0)
    if pairs < 2 or max(first, second) < 0.4 * pairs or min(first, second) > 0.1 * pairs:
        return None
    return "utf-16-le" if second > first else "utf-16-be"


def _detected(path: Path) -> str:
    bad, _ = _decode(path, "utf-8", _DETECTED_BYTES)
    if bad is None:
        return "utf-8"
    start = max(0, bad - _SAMPLE // 2)
    with readable(path), open_bytes(path) as file:
        file.seek(start)
        sample = file.read(_SAMPLE)
    if start:
        sample = sample[sample.find(b"\n") + 1 :]  # not from the middle of a character
    best = _detector()(sample, cp_exclusion=list(_WIDE)).best()
    if best is None:
        return "utf-8"
    say_once(f"{path} is read as {best.encoding}, as detected, and others like it")
    return best.encoding


def _detector() -> Any:
    try:
        from charset_normalizer import from_bytes
    except ImportError:
        raise InputError(
            "--encoding auto needs charset-normalizer: pip install 'ndm-fast[data]', or name the encoding"
        ) from None
    return from_bytes


def check_encoding(name: str) -> None:
    """Refuse an encoding that Python does not know, or ``auto`` without its package."""
    if name == "auto":
        _detector()
        return
    try:
        "".encode(name)
    except (LookupError, ValueError):
        raise InputError(
            f"encoding is {name!r}: give a name that Python knows, as utf-8, cp1252, shift_jis, or auto"
        ) from None


def first_bad_byte(path: Path, encoding: str) -> int | None:
    """Place of the first byte of a file that its encoding does not allow."""
    return _decode(path, encoding)[0]


def _decode(path: Path, encoding: str, most: int = sys.maxsize) -> tuple[int | None, int]:
    """Place of the first bad byte among the first ``most`` or so, and how many bytes were decoded."""
    decoder = codecs.getincrementaldecoder(encoding.removesuffix("-sig"))()
    done = 0
    with readable(path), open_bytes(path) as file:
        while done < most:
            part = file.read(_CHUNK)
            try:
                decoder.decode(part, final=not part)
            except UnicodeDecodeError as error:
                return done + len(part) - len(error.object) + error.start, done
            if not part:
                break
            done += len(part)
    return None, done


def check_decodes(encodings: Mapping[Path, str]) -> None:
    """Refuse text whose bytes are not of its encoding; looks at the first gibibyte.

    Raises:
        InputError: names the first such file, the place, and how many more there are.
    """
    left = _CHECKED_BYTES
    bad: list[tuple[Path, int]] = []
    for path, encoding in encodings.items():
        place, done = _decode(path, encoding, left)
        left -= done
        if place is not None:
            bad.append((path, place))
        if left <= 0:
            break
    if bad:
        path, place = bad[0]
        raise not_of(path, encodings[path], place, len(bad) - 1)


def not_of(path: Path, encoding: str, place: int, more: int = 0) -> InputError:
    """The error for text that its encoding does not allow."""
    others = f", nor are {more} more files" if more else ""
    return InputError(
        f"{path} is not {encoding.upper()} (byte {place:,}){others}: pass --encoding with its name or auto, "
        "or --bad-text skip or replace"
    )
