"""The Triton kernels as a repository for Hugging Face's ``kernels``: its form, and loaded by that library.

That library is not in the environment of the other tests, since transformers acts on its presence:
``make hub-kernel`` runs this file beside it. Where there is no card, a ``cpu`` variant is loaded, and runs
under Triton's interpreter.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
BUILT = os.environ.get("NDM_FAST_HUB_KERNEL")
"""Where ``make hub-kernel`` has built; then the library must be there."""

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPS = ["ksg_counts", "ksg_radius", "lie_update", "loss_and_gradient", "nearest_index", "nearest_neighbors"]


def _builder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hub_kernel", ROOT / "release" / "hub_kernel.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository that can be loaded here."""
    folder = tmp_path_factory.mktemp("hub") / "ndm-kernels"
    _builder().build(folder, backend=DEVICE)
    return folder


def test_everything_that_travels_imports_by_relative_names(repository: Path) -> None:
    package = repository / "torch-ext" / "ndm_kernels"
    modules = sorted(package.rglob("*.py"))
    assert {"geometry/reference.py", "kernels/sweep.py", "kernels/stream.py"} <= {
        str(path.relative_to(package)) for path in modules
    }
    outside = set()
    for path in modules:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                outside |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                outside.add((node.module or "").split(".")[0])
    assert outside <= {*sys.stdlib_module_names, "torch", "triton"}


def test_what_is_for_developers_stays_at_home(repository: Path) -> None:
    names = {path.stem for path in (repository / "torch-ext").rglob("*.py")}
    assert not names & {"lint", "replay", "resources", "shipped", "autotune"}


def test_metadata_has_the_digest_of_every_file(repository: Path) -> None:
    variant = repository / "build" / f"torch-{DEVICE}"
    metadata = json.loads((variant / "metadata.json").read_text())
    assert metadata["id"].isidentifier()
    assert metadata["backend"] == {"type": DEVICE}
    files = {str(p.relative_to(variant)): p for p in variant.rglob("*") if p.is_file()}
    del files["metadata.json"]
    assert metadata["digest"]["files"] == {
        name: base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
        for name, path in files.items()
    }


def test_an_import_by_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builder = _builder()
    template = tmp_path / "template"
    template.mkdir()
    (template / "__init__.py").write_text("from ndm_fast.ops import nearest_neighbors\n")
    monkeypatch.setattr(builder, "TEMPLATE", template)
    with pytest.raises(SystemExit, match=r"__init__.py imports ndm_fast.ops by name"):
        builder.sources()


LOAD = """
import json, sys
from pathlib import Path
import torch
import kernels
from kernels import Metadata, get_loaded_kernels, get_local_kernel
from kernels._rust import Build, Digest, DigestAlgorithm

folder, backend = Path(sys.argv[1]), sys.argv[2]
build = Build.open(folder)
assert [str(each).lower() for each in build.general.backends] == ["cuda"], build
variant = folder / "build" / f"torch-{backend}"
metadata = Metadata.read_from_file(variant / "metadata.json")
metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
ndm = get_local_kernel(folder, backend=backend)
assert "ndm_fast" not in sys.modules
assert ndm.__name__ == get_loaded_kernels()[0].metadata.id == metadata.id

torch.manual_seed(0)
widths, device = [5, 3, 8], backend
rows = torch.randn(140, 16, device=device)
queries, keys = rows[:12], rows[12:]
rotation = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64, device=device)).Q
parts = [(queries.double() @ part, keys.double() @ part) for part in rotation.split(widths, dim=1)]
expected = torch.stack([torch.cdist(q, k).min(1).values for q, k in parts])
distance, index = ndm.nearest_neighbors(queries, keys, rotation.float(), widths)
torch.testing.assert_close(distance.double(), expected, rtol=1e-5, atol=0)
assert torch.equal(index, ndm.nearest_index(queries, keys, rotation.float(), widths, precision="fp32"))
found = ndm.loss_and_gradient(queries, keys, index, rotation.float(), widths, "euclidean")
torch.testing.assert_close(found.by_subspace.double(), expected.mean(1), rtol=1e-5, atol=0)
assert found.gradient.abs().sum() > 0
print(json.dumps({"version": kernels.__version__, "all": sorted(ndm.__all__)}))
"""


def _load(repository: Path, script: str, folder: Path) -> str:
    """Output of a script beside the library, in a folder where nothing else is called ``kernels``."""
    try:
        version("kernels")
    except PackageNotFoundError:
        if BUILT:
            pytest.fail("`kernels` is not installed, see `make hub-kernel`")
        pytest.skip("needs the package `kernels`: run `make hub-kernel`")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {} if DEVICE == "cuda" else {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(repository), DEVICE],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_library_loads_it_and_the_search_is_right(repository: Path, tmp_path: Path) -> None:
    told = json.loads(_load(repository, LOAD, tmp_path).splitlines()[-1])
    assert told["all"] == sorted(["Neighbors", *OPS])


COMPATIBLE = """
import sys
from pathlib import Path

sys.path.insert(0, str(Path(sys.argv[1]) / "build" / f"torch-{sys.argv[2]}"))
import ndm_kernels

print(*sorted(name for name in ndm_kernels.__all__ if callable(getattr(ndm_kernels, name))))
"""


def test_older_releases_find_it_in_a_folder_of_its_name(repository: Path, tmp_path: Path) -> None:
    assert _load(repository, COMPATIBLE, tmp_path).split() == sorted(["Neighbors", *OPS])


def test_what_make_has_built_is_this(tmp_path: Path) -> None:
    if not BUILT:
        pytest.skip("run by `make hub-kernel`")
    _builder().build(tmp_path / "again")
    again = {
        str(p.relative_to(tmp_path / "again")): p for p in (tmp_path / "again").rglob("*") if p.is_file()
    }
    built = {str(p.relative_to(BUILT)): p for p in Path(BUILT).rglob("*") if p.is_file()}
    assert {n: p.read_bytes() for n, p in again.items()} == {n: p.read_bytes() for n, p in built.items()}
