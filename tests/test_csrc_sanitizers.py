"""The C++ kernels under address and undefined-behaviour sanitizers, on every instruction set of this CPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "csrc" / "sanitize.sh"


def test_kernels_under_sanitizers(tmp_path: Path) -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("the sanitizer build is for Linux")
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None:
        pytest.skip("no C++ compiler: install g++ or clang++ to run the sanitizer build")
    # Without the interpreter's preloads, which would come before the sanitizer's runtime.
    environment = {**os.environ, "CXX": compiler, "LD_PRELOAD": ""}
    done = subprocess.run(
        ["sh", str(SCRIPT), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=environment,
    )
    if "cannot find -lasan" in done.stderr or "libclang_rt.asan" in done.stderr:
        pytest.skip(f"{compiler} has no sanitizer libraries")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "ran portable" in done.stdout
