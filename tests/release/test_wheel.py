"""What a wheel is made of, and what it is tied to. `make wheel` builds one, `make try-wheel` installs it."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
import yaml

from ndm_fast.ops.cpu import extension

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PARTS = ("csrc/cpu", "csrc/cuda", "kernels", "ndm_fast")
ABOUT = ("LICENSE", "MANIFEST.in", "README.md", "CHANGELOG.md", "pyproject.toml", "setup.py")
MADE = ("*.so", "__pycache__", "*.egg-info")


def files_of(folder: Path) -> set[str]:
    """What belongs to the parts of a wheel: without what is built, and without a checkout's links."""
    found = (path for part in PARTS for path in (folder / part).rglob("*"))
    return {
        str(path.relative_to(folder))
        for path in found
        if path.is_file()
        and not any(path.match(made) or any(parent.match(made) for parent in path.parents) for made in MADE)
        and (folder / "ndm_fast" / "kernels") not in path.parents
    }


def test_the_source_distribution_holds_every_source_and_no_more(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ABOUT:
        shutil.copy(ROOT / name, tree / name)
    ignored = shutil.ignore_patterns(*MADE, "kernels")
    for name in ("csrc", "ndm_fast", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    shutil.copytree(ROOT / "kernels", tree / "kernels", ignore=shutil.ignore_patterns(*MADE))
    command = "from setuptools import build_meta; print(build_meta.build_sdist('.'))"
    done = subprocess.run(
        [sys.executable, "-c", command], cwd=tree, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    with tarfile.open(tree / done.stdout.splitlines()[-1]) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    made = {name for name in names if name.startswith("ndm_fast.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    assert names - made == files_of(ROOT) | set(ABOUT)


def test_a_wheel_holds_every_package_and_its_data() -> None:
    setup = PROJECT["tool"]["setuptools"]
    homes = {"ndm_fast": "ndm_fast", **setup["package-dir"]}
    place_of = {
        package: homes.get(package) or package.replace(".", "/", 1).replace(".", "/")
        for package in setup["packages"]
    }
    carried = set(_matched(place_of, setup["package-data"]))
    assert carried == {name for name in files_of(ROOT) if not name.startswith("csrc/")}


def _matched(places: dict[str, str], data: dict[str, list[str]]) -> Iterable[str]:
    for package, place in places.items():
        for pattern in ["*.py", *data.get(package, [])]:
            for path in (ROOT / place).glob(pattern):
                yield str(path.relative_to(ROOT))


@pytest.mark.skipif(not extension.available(), reason="the extension is not built")
def test_the_extension_is_tied_to_no_torch() -> None:
    """It loads where there is none. So a wheel fits every torch that the package takes."""
    spec = importlib.util.find_spec("ndm_fast._C")
    assert spec is not None
    code = f"""
import importlib.util, sys
assert importlib.util.find_spec("torch") is None
spec = importlib.util.spec_from_file_location("_C", {spec.origin!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.isa("portable"))
"""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.stdout == "portable\n", done.stderr


def test_a_wheel_for_another_python_or_machine_falls_back_and_says_so(tmp_path: Path) -> None:
    """As where a file was copied by hand: pip itself refuses a wheel with another tag."""
    package = tmp_path / "ndm_fast"
    shutil.copytree(ROOT / "ndm_fast", package, ignore=shutil.ignore_patterns(*MADE))
    (package / "_C.cpython-38-x86_64-linux-gnu.so").write_bytes(b"of another Python")
    # Not by a .pth file, which would find the extension of an editable installation.
    seen = [
        str(tmp_path),
        *map(sysconfig.get_path, ("purelib", "platlib")),
        str(Path(torch.__file__).parents[1]),
    ]
    code = f"""
import sys
sys.path += {seen!r}
import torch, ndm_fast
from ndm_fast.ops import backends
rows = torch.randn(30, 8)
found = ndm_fast.nearest_neighbors(rows[:4], rows[4:], torch.eye(8), [4, 4])
assert found.distance.shape == (2, 4)
print(backends.choose("cpu"))
"""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "name='reference'" in done.stdout
    assert "ndm_fast._C is not built" in done.stdout


def test_nothing_but_a_person_starts_the_publishing() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "wheels.yml").read_text())
    triggers = workflow[True]  # YAML reads `on` so
    assert set(triggers) == {"workflow_dispatch"}
    assert triggers["workflow_dispatch"]["inputs"]["publish"]["default"] is False
    assert workflow["jobs"]["publish"]["if"] == "${{ inputs.publish }}"
    assert workflow["permissions"] == {}


def test_wheels_are_named_for_the_pythons_that_the_package_takes() -> None:
    built = PROJECT["tool"]["cibuildwheel"]["build"].split()
    oldest = PROJECT["project"]["requires-python"].removeprefix(">=3.")
    assert built == [f"cp3{minor}-*" for minor in range(int(oldest), int(oldest) + len(built))]
