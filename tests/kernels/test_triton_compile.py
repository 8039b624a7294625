"""Every shipped Triton configuration, compiled ahead of time: no spills, shared memory within the limit.

In a process of its own: in this one the kernels belong to the interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ndm_fast.ops import backends

pytestmark = [
    pytest.mark.skipif(not backends.has_triton_installed(), reason="triton is not installed"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="triton's assembler runs on Linux"),
]


@pytest.mark.timeout(600)  # a minute and a half on busy cores
@pytest.mark.parametrize("arch", [80, 90])
def test_compiles_without_spills(arch: int, tmp_path: Path) -> None:
    path = tmp_path / "usage.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "ndm_fast.kernels.resources", "--arch", str(arch), "--json", str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())
    assert len(rows) > 15
    assert [row for row in rows if row["stack"] > 0] == []
    assert [row for row in rows if row["shared"] > row["limit"]] == []
    sweeps = {row["tensor_core"] for row in rows if row["kernel"].startswith("sweep")}
    assert sweeps == {"mma.sync" if arch == 80 else "wgmma"}
    halves = [row for row in rows if "fp16x3" in row["kernel"] and not row["kernel"].startswith("units")]
    assert {row["tensor_core"] for row in halves} == sweeps
    # fp64 on the matrix units; summed over an axis it went through shared memory, ten times slower.
    assert {row["tensor_core"] for row in rows if row["kernel"].startswith("rerank")} == {"mma.sync"}
