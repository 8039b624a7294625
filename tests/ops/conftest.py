"""The backends on which the contract of an op is tested: all that can run here, on every instruction set."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import pytest
import torch
from filelock import FileLock
from op_backend import Backend

from ndm_fast.geometry import shadow
from ndm_fast.ops import backends
from ndm_fast.ops.cpu import extension

SCRIPT = Path(__file__).parents[2] / "csrc" / "tests" / "cuda_on_cpu.sh"


def _names() -> list[str]:
    names = ["reference"]
    for isa in ("avx512bf16", "avx512", "avx2", "portable"):
        with suppress(ValueError):
            names.append(f"cpu-{extension.extension().isa(isa)}")
    return [*names, "triton"]


@pytest.fixture(params=_names())
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """Every backend that has all ops; Triton on the GPU where there is one, else through its interpreter."""
    return _made_ready(request.param, monkeypatch)


def _made_ready(param: str, monkeypatch: pytest.MonkeyPatch) -> Backend:
    name, _, isa = param.partition("-")
    if isa:
        monkeypatch.setenv(extension.ISA_VARIABLE, isa)
        assert extension.isa() == isa
    if name == "triton" and not backends.has_triton_installed():
        pytest.skip("triton is not installed")
    on_gpu = name == "triton" and torch.cuda.is_available()
    return Backend(name, "cuda" if on_gpu else "cpu", name == "triton" and not on_gpu)


@pytest.fixture(scope="session")
def cuda_extension(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The CUDA kernels as built for the GPU, or else for this CPU (``csrc/tests/cuda_on_cpu.h``)."""
    from ndm_fast.ops import cuda

    if torch.cuda.is_available():
        return cuda._cuda or pytest.skip(str(cuda._OBSTACLE))
    given = os.environ.get("NDM_FAST_TEST_CUDA_ON_CPU")
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if not given and (compiler is None or not sys.platform.startswith("linux")):
        pytest.skip("needs Linux and a C++ compiler")
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "cuda_on_cpu"
    with FileLock(f"{folder}.lock"):
        folder.mkdir(exist_ok=True)
        built = Path(given) if given else next(folder.glob("_cuda*.so"), None)
        if built is None:
            command = ["sh", str(SCRIPT), str(folder), sys.executable]
            environment = {**os.environ, "CXX": str(compiler), "LD_PRELOAD": ""}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            built = Path(done.stdout.strip())
    spec = importlib.util.spec_from_file_location("cuda_on_cpu._cuda", built)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_SHADOWS = "-shadows"
"""Of a CPU backend: its search goes over shadows, whatever their cost."""


@pytest.fixture(params=[*_names(), *(f"{name}{_SHADOWS}" for name in _names() if "cpu" in name), "cuda"])
def search_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """Every backend that has the search: CUDA C++ too, built for this CPU where there is no GPU."""
    if request.param != "cuda":
        if request.param.endswith(_SHADOWS):
            for decision in ("pays", "turning_pays", "saved"):
                monkeypatch.setattr(shadow, decision, lambda *sizes: True)
        return _made_ready(request.param.removesuffix(_SHADOWS), monkeypatch)
    from ndm_fast.ops import cuda

    monkeypatch.setattr(cuda, "_cuda", request.getfixturevalue("cuda_extension"))
    monkeypatch.setitem(backends._OBSTACLES, "cuda", lambda device: None)
    on_gpu = torch.cuda.is_available()
    return Backend("cuda", "cuda" if on_gpu else "cpu", not on_gpu)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
