"""What a model's name stands for, and one line for everything that goes wrong while it is loaded."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ndm_fast.activations.packaged import EMBEDDED_MODEL, GGUF_PACKAGES, embedded_folder, unpacked_folder
from ndm_fast.errors import InputError

_GGUF = ".gguf"


_ADAPTER_FILE = "adapter_config.json"


@dataclass(frozen=True)
class Source:
    """Where transformers finds a model."""

    name: str
    """As the user gave it."""
    place: str
    """Folder or hub name, first argument of ``from_pretrained``."""
    tokenizer_place: str
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of ``from_pretrained``."""
    adapter: str = ""
    """Folder of the PEFT adapter that changes the model at ``place``."""

    @property
    def is_gguf(self) -> bool:
        """Whether the weights come from a GGUF file."""
        return "gguf_file" in self.options


def locate(
    name: str,
    unpack: Callable[[Path, Path], None],
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Source:
    """What a model's name stands for.

    Args:
        name, revision, trust_remote_code: see ``models.load_model``.
        unpack: see ``packaged.unpacked_folder``.

    Raises:
        InputError: no name, a file that is not there or no GGUF, a package that is missing.
    """
    if not name:
        raise InputError("no model given: pass --model with a Hugging Face name or a folder")
    # False and not None, with which transformers would ask on the terminal.
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if revision is not None:
        options["revision"] = revision
    if name == EMBEDDED_MODEL:
        return Source(name, embedded_folder(), embedded_folder(), options)
    if name in GGUF_PACKAGES:
        folder = str(unpacked_folder(name, unpack))
        return Source(name, folder, folder, options)
    path = Path(name)
    if path.suffix.lower() == _GGUF:
        _check_gguf(path)
        return Source(name, str(path.parent), str(path.parent), {**options, "gguf_file": path.name})
    if (path / _ADAPTER_FILE).is_file() and not (path / "config.json").is_file():
        return _adapter(path, name, options)
    return Source(name, name, name, options)


def _adapter(path: Path, name: str, options: dict[str, Any]) -> Source:
    if importlib.util.find_spec("peft") is None:
        raise InputError(f"{name!r} is an adapter, which the package peft loads: pip install peft")
    try:
        base = json.loads((path / _ADAPTER_FILE).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = None
    if not base or not isinstance(base, str):
        raise InputError(
            f"the adapter {name!r} does not say which model it changes: set base_model_name_or_path in its "
            f"{_ADAPTER_FILE}"
        )
    own = any(path.glob("tokenizer*"))
    return Source(name, base, str(path) if own else base, options, adapter=str(path))


def _check_gguf(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"there is no file {path}: give the path of a .gguf file that exists")
    try:
        with path.open("rb") as file:
            mark = file.read(4)
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}): check its permissions") from None
    if mark != b"GGUF":
        raise InputError(f"{path} is no GGUF file, or its header is damaged: get it anew")
    missing = [package for package in ("gguf", "accelerate") if importlib.util.find_spec(package) is None]
    if missing:
        raise InputError(
            f"reading {path} needs the package {' and '.join(missing)}: pip install 'ndm-fast[gguf]'"
        )


@contextmanager
def loading(source: Source, quantized: str | None = None) -> Iterator[None]:
    """One line for all that loading a model raises; no progress bars where nothing is downloaded.

    Args:
        quantized: by what its weights are, if by anything.

    Raises:
        InputError: whatever transformers, a tokenizer, a reader of weights or a model's own code raised.
    """
    try:
        with _no_bars(local=source.is_gguf or Path(source.place).is_dir()):
            yield
    except InputError:
        raise
    except Exception as error:  # damaged files raise whatever the reader that stumbles over them raises
        raise InputError(f"cannot load model {source.name!r} {_reason(source, error, quantized)}") from None


def _reason(source: Source, error: Exception, quantized: str | None) -> str:
    """In brackets what went wrong, then what to do."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = lines[0] if lines else type(error).__name__
    if isinstance(error, KeyError | IndexError | AttributeError | AssertionError):
        said = f"{type(error).__name__}: {said}"
    if "trust_remote_code" in str(error):
        return (
            "(it comes with code of its own, which would run on this machine): read that code, then pass "
            "--trust-remote-code"
        )
    if isinstance(error, ImportError):
        return f"({said}): install the package that it names"
    if quantized:
        return (
            f"({said}), whose weights are quantized by {quantized}: take a device that this runs on, or the "
            "model's plain weights"
        )
    if source.is_gguf:
        return f"({said}): the file is damaged, or of a family that transformers does not read from GGUF"
    if source.name in GGUF_PACKAGES:
        return f"({said}): delete {source.place}, and it is unpacked anew"
    return f"({said}): check the name or folder, and the network or HF_TOKEN for a hub model"


@contextmanager
def _no_bars(local: bool) -> Iterator[None]:
    """Without transformers' progress bars where nothing is downloaded."""
    shown = logging.is_progress_bar_enabled()
    if local and shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if local and shown:
            logging.enable_progress_bar()
