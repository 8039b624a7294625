"""What no sweep may have, whatever the golden numbers were: rules over ``tests/data/kernel-loops.json``.

``test_triton_compile.py`` holds the compiled kernels to those numbers; here the numbers are held to rules, so
that something bad is not recorded as golden. sm_90, where training is meant to run.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

LOOPS = json.loads((Path(__file__).resolve().parents[1] / "data" / "kernel-loops.json").read_text())
CURRENT = max(LOOPS, key=lambda version: tuple(map(int, re.findall(r"\d+", version))))
"""The newest triton of the file."""
EXCEPT = {
    ("wait", "width 432 Q4096: sweep"): "a third block of queries, 64 KB, does not fit beside the 192 KB",
    ("blocks", "width 432 Q4096: sweep"): "its keys and two blocks of queries take 192 KB of 227",
    ("wait", "width 768 Q128: sweep_wide"): "read in pieces of the columns; a third stage has not been tried",
}
"""(Rule, launch) -> why it does not hold there."""
RULES = {
    "wait": lambda row: (row["wait"] or 0) >= 1,
    "blocks": lambda row: row["blocks"] >= 2,
    "unfenced": lambda row: row["unfenced"] == 0,
}
"""A copy is still under way at the first wait. Two blocks share a multiprocessor, so that one's reduction
hides behind the other's products. A fence stands between a write to shared memory and what multiplies it."""


def sweeps(version: str) -> dict[str, dict[str, Any]]:
    """Launches of sweeps and streams."""
    rows = LOOPS[version]["sm_90"]
    return {label: row for label, row in rows.items() if re.search(r": (sweep|stream)", label)}


def broken(version: str, rule: str) -> set[str]:
    return {label for label, row in sweeps(version).items() if not RULES[rule](row)}


@pytest.mark.parametrize("rule", ["wait", "blocks"])
@pytest.mark.parametrize("version", sorted(LOOPS))
def test_copies_are_under_way_and_blocks_share(version: str, rule: str) -> None:
    assert len(sweeps(version)) >= 5
    assert broken(version, rule) - {label for name, label in EXCEPT if name == rule} == set()


def test_products_are_fenced() -> None:
    """Triton 3.6 leaves fences out (docs/kernels-gpu.md); the current one has to have them."""
    assert broken(CURRENT, "unfenced") == set()


@pytest.mark.parametrize(("rule", "label"), EXCEPT)
def test_exceptions_are_needed(rule: str, label: str) -> None:
    """One that holds by now, or whose launch is gone, is struck out."""
    if label in sweeps(CURRENT):
        assert any(label in broken(version, rule) for version in LOOPS), EXCEPT[rule, label]
