"""The extensions of ``ndm_fast``, built for this machine's card: a row of ``check.py``."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from jobs import Row

ROOT = Path(__file__).resolve().parents[2]


def build(limit: float) -> Row:
    """Build them, in so many seconds at most; the row says why where that fails."""
    began = time.monotonic()
    try:
        status, said = _build(limit)
    except Exception as error:
        return {"name": "build", "seconds": time.monotonic() - began, "failed": f"not built: {error}"[:500]}
    row: Row = {"name": "build", "seconds": time.monotonic() - began, "status": status, "said": said[-4000:]}
    if status:
        why = "killed: it hung" if status == -signal.SIGKILL else f"it ended with {status}"
        row["failed"] = f"not built: {why}: {' '.join(said.split())[-300:]}"
    return row


def _build(limit: float) -> tuple[int, str]:
    import torch

    major, minor = torch.cuda.get_device_capability()
    wanted = "1" if shutil.which("nvcc") or os.environ.get("CUDA_HOME") else "0"
    environment = {**os.environ, "NDM_FAST_CUDA": wanted, "NDM_FAST_CUDA_ARCHS": f"{major}{minor}"}
    return ended([sys.executable, "setup.py", "build_ext", "--inplace"], limit, cwd=ROOT, env=environment)


def ended(command: list[str], limit: float, **options: object) -> tuple[int, str]:
    """Exit status and output of a command that is killed, with what it started, after some seconds."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        start_new_session=True, **options,
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=max(1.0, limit))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
    return process.returncode, said
