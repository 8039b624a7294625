"""The C++ kernels under address and undefined-behaviour sanitizers, on every instruction set of this CPU.

And those of csrc/cuda, built for this CPU.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "csrc" / "tests"


@pytest.fixture
def compiler() -> str:
    if not sys.platform.startswith("linux"):
        pytest.skip("the sanitizer build is for Linux")
    found = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    return found or pytest.skip("no C++ compiler: install g++ or clang++ to run the sanitizer build")


def run(compiler: str, *command: str, **environment: str) -> str:
    """What a script prints; without the interpreter's preloads, which come before the sanitizer's runtime."""
    environment = {**os.environ, "CXX": compiler, "LD_PRELOAD": "", **environment}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environment)
    if "cannot find -lasan" in done.stderr or "libclang_rt.asan" in done.stderr:
        pytest.skip(f"{compiler} has no sanitizer libraries")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.timeout(660)  # a minute and a half on busy cores
def test_kernels_under_sanitizers(compiler: str, tmp_path: Path) -> None:
    assert "ran portable" in run(compiler, "sh", str(SOURCES / "sanitize.sh"), str(tmp_path))


@pytest.mark.slow  # two minutes
def test_cuda_kernels_under_sanitizers(compiler: str, tmp_path: Path) -> None:
    """All blocks that torch hands out are surrounded by what must not be touched."""
    flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    built = run(compiler, "sh", str(SOURCES / "cuda_on_cpu.sh"), str(tmp_path), sys.executable, *flags)
    libraries = [
        run(compiler, compiler, f"-print-file-name=lib{name}.so").strip() for name in ("asan", "ubsan")
    ]
    if not all(Path(library).is_absolute() for library in libraries):
        pytest.skip(f"{compiler} has no sanitizer libraries to load before Python")
    tests = str(Path(__file__).parents[1] / "ops" / "test_gpu_search.py")
    out = run(
        compiler,
        *(sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", "-k", "cuda", tests),
        LD_PRELOAD=":".join(libraries),
        ASAN_OPTIONS="detect_leaks=0:detect_stack_use_after_return=0",
        NDM_FAST_TEST_CUDA_ON_CPU=built.strip(),
    )
    assert " passed" in out
    assert "skipped" not in out
