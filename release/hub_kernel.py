"""Write the Triton kernels as a repository for Hugging Face's ``kernels``: ``hub_kernel.py FOLDER``.

The repository has both forms that library knows: what its builder builds from (``build.toml``,
``torch-ext/``) and what its loader reads (``build/torch-cuda/``). Pure Triton needs no compiler, so this
script writes both.

Files travel as they are, except that the modules of ``ndm_fast/geometry`` name each other by relative
imports: one process may load several versions of a kernel, under other names. Which modules travel follows
from what they import, beginning with ``release/ndm_kernels/__init__.py``.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parents[1]
TEMPLATE = ROOT / "release" / "ndm_kernels"
HOMES = {"geometry": ROOT / "ndm_fast" / "geometry", "kernels": ROOT / "kernels"}
"""Packages of the repository, and where they are in this tree."""

DATA = ("kernels/tuning.json",)
NAME = re.search(r'^name = "(.+)"$', (TEMPLATE / "build.toml").read_text(), re.MULTILINE)[1]  # type: ignore[index]
VERSION = int(re.search(r"^version = (\d+)", (TEMPLATE / "build.toml").read_text(), re.MULTILINE)[1])  # type: ignore[index]
MODULE = NAME.replace("-", "_")


def build(folder: Path, backend: str = "cuda") -> None:
    """Write the repository into a folder that is not there yet.

    Args:
        backend: of the loader's form. Triton's interpreter runs as ``"cpu"``, for tests.
    """
    files = sources()
    _write(folder / "torch-ext" / MODULE, files)
    for name, copy in (("build.toml", "build.toml"), ("CARD.md", "CARD.md"), ("CARD.md", "README.md")):
        shutil.copy(TEMPLATE / name, folder / copy)
    files[f"{MODULE}/__init__.py"] = (TEMPLATE / "compatible.py").read_bytes()
    variant = folder / "build" / f"torch-{backend}"
    _write(variant, files)
    (variant / "metadata.json").write_text(json.dumps(metadata(files, backend), indent=2) + "\n")


def metadata(files: dict[str, bytes], backend: str) -> dict[str, object]:
    """What the loader wants to know; the name of the module is that of its content."""
    digests = {name: hashlib.sha256(content).digest() for name, content in sorted(files.items())}
    unique = hashlib.sha256(b"".join(digests.values())).hexdigest()[:7]
    return {
        "name": NAME,
        "id": f"_{MODULE}_{backend}_{unique}",
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {
            "algorithm": "sha256",
            "files": {name: base64.b64encode(digest).decode() for name, digest in digests.items()},
        },
    }


def sources() -> dict[str, bytes]:
    """Content by path in the repository, of all that its ``__init__.py`` needs."""
    found = {"__init__.py": (TEMPLATE / "__init__.py").read_bytes()}
    found |= {name: _place(name).read_bytes() for name in DATA}
    waiting = ["__init__.py"]
    while waiting:
        path = waiting.pop()
        for name in _imported(path, found[path]):
            if name not in found:
                found[name] = _relative(_place(name))
                waiting.append(name)
    return found


def _place(path: str) -> Path:
    home, _, rest = path.partition("/")
    return HOMES[home] / rest


def _relative(file: Path) -> bytes:
    text = file.read_text(encoding="utf-8")
    if file.parent == HOMES["geometry"]:
        text = re.sub(r"^from ndm_fast\.geometry\.", "from .", text, flags=re.MULTILINE)
    return text.encode()


def _imported(path: str, content: bytes) -> Iterator[str]:
    """Files of the repository that a module imports, also those that Python runs on the way."""
    package = PurePosixPath(path).parent.parts
    for node in ast.walk(ast.parse(content)):
        if isinstance(node, ast.Import):
            outside = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            outside = [node.module or ""]
        elif isinstance(node, ast.ImportFrom):
            base = (*package[: len(package) + 1 - node.level], *(node.module or "").split("."))
            yield from _files_of([part for part in base if part], [alias.name for alias in node.names])
            continue
        else:
            continue
        if any(name.split(".")[0] == "ndm_fast" for name in outside):
            sys.exit(f"{path} imports {outside[0]} by name: import it relatively, or keep it out of kernels/")


def _files_of(base: list[str], names: list[str]) -> Iterator[str]:
    yield f"{base[0]}/__init__.py"
    for parts in (base, *([*base, name] for name in names)):
        file = "/".join(parts) + ".py"
        if len(parts) > 1 and _place(file).is_file():
            yield file


def _write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    target = parser.parse_args().folder
    if target.exists():
        sys.exit(f"{target} exists: name a new folder")
    build(target)
    print(f"{target}: {NAME} for `kernels`, {sum(1 for _ in (target / 'torch-ext').rglob('*.py'))} modules")
