"""Tests that hang are named, with their stacks, wherever they hang, and the others still run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

CONFTEST = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import time_limits
time_limits.GRACE = 0.5
pytest_plugins = ["time_limits"]
"""

HUNG = """
import ctypes, multiprocessing, subprocess, sys, time
import pytest

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]

def block(library):
    lock = ctypes.create_string_buffer(64)
    library.pthread_mutex_init(lock, None)
    library.pthread_mutex_lock(lock)
    library.pthread_mutex_lock(lock)

@pytest.fixture
def waits_at_its_end():
    yield
    subprocess.run(SLEEP)

def test_waits():
    subprocess.run(SLEEP)

def test_blocks_in_c_with_the_gil_and_a_forked_child():
    multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,)).start()
    block(ctypes.PyDLL(None))

def test_fails_before_it_waits(waits_at_its_end):
    raise ValueError

def test_passes():
    pass
"""


def test_every_hang_is_named_and_ends(tmp_path):
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_hung.py").write_text(HUNG)
    command = ["-m", "pytest", "-n", "1", "--timeout", "1", "-ra", "-p", "no:cacheprovider", str(tmp_path)]
    wide = {**os.environ, "COLUMNS": "300"}
    done = subprocess.run(
        [sys.executable, *command], env=wide, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert re.search(r"^FAILED \S+::test_waits - Failed: Timeout", done.stdout, re.MULTILINE)
    for name in ("test_blocks_in_c_with_the_gil_and_a_forked_child", "test_fails_before_it_waits"):
        assert re.search(rf"^FAILED \S+::{name} - worker 'gw\d' crashed", done.stdout, re.MULTILINE)
    assert re.search(r" in block\n.* in test_blocks_in_c_with", done.stderr)
    assert re.search(r" in waits_at_its_end\n", done.stderr)
    assert " 1 passed" in done.stdout
