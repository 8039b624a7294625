"""What ``setup.py`` compiles, and how, with a compiler that only writes down what it is asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

pytest.importorskip("setuptools")
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="CUDA is built on Linux only")

ROOT = Path(__file__).parents[1]
COMPILER = """#!/bin/sh
echo "begin $0 $*" >> "$CALLS"
while [ $# -gt 0 ]; do [ "$1" = -o ] && touch "$2"; shift; done
sleep 0.05
echo "end" >> "$CALLS"
"""
Build = tuple[subprocess.CompletedProcess[str], list[str]]


def build(folder: Path, *, nvcc: str = COMPILER, **variables: str) -> Build:
    """What setup.py said and did, and the calls of the compilers, in order."""
    home = folder / "cuda"
    (home / "bin").mkdir(parents=True)
    for path, content in ((folder / "c++", COMPILER), (home / "bin" / "nvcc", nvcc)):
        path.write_text(content)
        path.chmod(0o755)
    calls = folder / "calls"
    calls.touch()
    mine = dict.fromkeys(("CC", "CXX", "LDSHARED", "LDCXXSHARED"), str(folder / "c++"))
    clean = {name: value for name, value in os.environ.items() if not name.startswith("NDM_FAST_")}
    given = {"CUDA_HOME": str(home), "CALLS": str(calls), "MAX_JOBS": "2"}
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", f"--build-temp={folder}/o", f"--build-lib={folder}/lib"],
        cwd=ROOT,
        env={**clean, **mine, **given, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    return done, calls.read_text().splitlines()


def test_names_every_file_and_compiles_two_at_once(tmp_path: Path) -> None:
    done, calls = build(tmp_path)
    assert done.returncode == 0, done.stderr
    sources = sorted(f"csrc/cpu/{path.name}" for path in (ROOT / "csrc" / "cpu").glob("*.cpp"))
    named = [line.removeprefix("compiling ") for line in done.stdout.splitlines() if "compiling" in line]
    assert sorted(named) == sources
    assert any(a.startswith("begin") and b.startswith("begin") for a, b in pairwise(calls))
    flags = {source: call for source in sources for call in calls if f"-c {source} " in call}
    assert sorted(flags) == sources
    assert [source for source in sources if "-mavx512bf16" in flags[source]] == [
        "csrc/cpu/kernels_avx512bf16.cpp"
    ]
    assert not [call for call in calls if "nvcc" in call]  # CUDA only where it is asked for


def test_cuda_on_request(tmp_path: Path) -> None:
    done, calls = build(tmp_path, NDM_FAST_CUDA="1", NDM_FAST_CUDA_ARCHS="90")
    assert done.returncode == 0, done.stderr
    assert {path.name.split(".")[0] for path in (tmp_path / "lib" / "ndm_fast").iterdir()} == {"_C", "_cuda"}
    asked = [call for call in calls if "bin/nvcc" in call]
    assert len(asked) == 2
    assert all("code=sm_90" in call and "sm_80" not in call for call in asked)


def test_cuda_that_fails_is_an_error_and_the_cpu_has_its_extension(tmp_path: Path) -> None:
    done, _ = build(tmp_path, nvcc="#!/bin/sh\nexit 3\n", NDM_FAST_CUDA="1")
    assert done.returncode != 0
    assert "exit status 3" in done.stderr
    assert [path.name.split(".")[0] for path in (tmp_path / "lib" / "ndm_fast").iterdir()] == ["_C"]


@pytest.mark.parametrize(("value", "cause"), [("1", "needs nvcc"), ("yes", "give 1")])
def test_says_what_a_request_lacks(value: str, cause: str, tmp_path: Path) -> None:
    done, calls = build(tmp_path, NDM_FAST_CUDA=value, CUDA_HOME="/nowhere")
    assert done.returncode == 1
    assert cause in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not calls
