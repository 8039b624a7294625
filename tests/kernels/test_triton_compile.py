"""Every shipped Triton launch, compiled ahead of time and held to golden numbers of its hot loop.

In a process of its own: in this one the kernels belong to the interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ndm_fast.ops import backends

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "data" / "kernel-loops.json"
OTHER = os.environ.get("NDM_FAST_OTHER_TRITON")
"""A folder with another triton, whose golden numbers are checked too (docs/kernels-gpu.md)."""
MOST_STACK = {80: 0, 86: 0, 90: 32, 100: 104, 120: 24}
"""Bytes of stack that some launches have today (docs/kernels-gpu.md); more is a fault."""
TRITONS = [None, *([OTHER] if OTHER else [])]

pytestmark = [
    pytest.mark.skipif(not backends.has_triton_installed(), reason="triton is not installed"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="triton's assembler runs on Linux"),
]


def python(*arguments: str, triton: str | None = None) -> None:
    """Run python without the interpreter of kernels, and with another triton."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if triton:
        environment["PYTHONPATH"] = os.pathsep.join([triton, environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def compiled(path: Path, *arguments: str, triton: str | None = None) -> dict[str, Any]:
    """What the lint says of the shipped launches."""
    python("-m", "ndm_fast.kernels.lint", "--json", str(path), *arguments, triton=triton)
    return json.loads(path.read_text())


def check_limits(rows: list[dict[str, Any]]) -> None:
    """Shared memory fits, and products are on the matrix units that the architecture has."""
    assert [row for row in rows if row["shared"] > row["limit"] or row["blocks"] < 1] == []
    assert [row for row in rows if row["undefined"]] == []
    kinds = {80: "mma.sync", 86: "mma.sync", 90: "wgmma", 120: "mma.sync"}
    for row in rows:
        kernel = row["label"].split(": ")[1]
        wanted = kinds.get(row["arch"])
        if wanted and (kernel.startswith(("sweep", "stream")) or "fp16x3: gradient" in row["label"]):
            assert row["tensor_core"] == wanted, row
        # fp64 on the matrix units; summed over an axis it went through shared memory, ten times slower.
        if kernel == "rerank" and row["arch"] in (80, 90):
            assert row["tensor_core"] == "mma.sync", row


@pytest.mark.timeout(600)  # half a minute on an idle core
@pytest.mark.parametrize("triton", TRITONS)
@pytest.mark.parametrize("arch", [80, 90])
def test_hot_loops_are_as_they_were(arch: int, triton: str | None, tmp_path: Path) -> None:
    from ndm_fast.kernels import lint

    found = compiled(tmp_path / "found.json", "--arch", str(arch), triton=triton)
    rows = found["rows"]
    assert len(rows) > 30
    check_limits(rows)
    golden = json.loads(GOLDEN.read_text()).get(found["triton"])
    if golden is None:
        pytest.skip(f"there are no golden numbers of triton {found['triton']}: docs/kernels-gpu.md")
    golden = golden[f"sm_{arch}"]
    assert {row["label"] for row in rows} == set(golden)
    assert {row["label"]: wrong for row in rows if (wrong := lint.worse(row, golden[row["label"]]))} == {}


MOST_COMPILED = {"resolve_kernel": 3, "rerank_kernel": 2, "distances_kernel": 3, "units_kernel": 4}
"""How often a run of merges may compile a kernel; others once. Distances differ by how many queries fit."""


def test_merged_widths_share_what_is_compiled(tmp_path: Path) -> None:
    """The sweep is compiled for each way to cover a width, the search in raw rows by powers of two."""
    path = tmp_path / "found.json"
    python(str(ROOT / "bench" / "gpu" / "widths.py"), "--json", str(path))
    for rows in json.loads(path.read_text()).values():
        for op in rows[0]["new"]:
            found = Counter(each["kernel"] for row in rows for each in row["new"][op])
            swept = sum(found.pop(name, 0) for name in ("sweep_kernel", "stream_kernel"))
            assert swept <= len(rows)
            most = MOST_COMPILED | ({"resolve_kernel": 9} if op == "search Q128 fp32" else {})
            assert {name: times for name, times in found.items() if times > most.get(name, 1)} == {}, op


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("arch", [80, 86, 90, 100, 120])
def test_everything_compiles(arch: int, tmp_path: Path) -> None:
    """Whatever a caller may ask for, in every alignment."""
    rows = compiled(tmp_path / "found.json", "--arch", str(arch), "--every")["rows"]
    assert len(rows) > 100
    check_limits(rows)
    assert {row["label"]: row["stack"] for row in rows if row["stack"] > MOST_STACK[arch]} == {}


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("arch", [80, 86, 90, 100, 120])
def test_all_that_the_check_launches_compiles(arch: int) -> None:
    python(str(ROOT / "bench" / "gpu" / "launches.py"), "--arch", str(arch))


LOOP = """
        /*0010*/                   STS [R1], R2 ;             /* 0x0 */
        /*0020*/                   DEPBAR.LE SB0, 0x2 ;       /* 0x0 */
        /*0030*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ; /* 0x0 */
        /*0040*/                   FENCE.VIEW.ASYNC.S ;       /* 0x0 */
        /*0050*/                   WARPGROUP.ARRIVE ;         /* 0x0 */
        /*0060*/                   HGMMA.64x64x16.F32 R24, R56, gdesc[UR12], RZ, !UPT ; /* 0x0 */
        /*0070*/                   HGMMA.64x64x16.F32 R24, R60, gdesc[UR16], R24, gsb0 ; /* 0x0 */
        /*0080*/                   DEPBAR.LE SB0, 0x0 ;       /* 0x0 */
        /*0090*/                   LDGSTS.E.BYPASS.128 [R83], desc[UR10][R72.64], P2 ; /* 0x0 */
        /*00a0*/              @!P2 BRA 0x20 ;                 /* 0x0 */
        /*00b0*/                   FADD R1, R1, R2 ;          /* 0x0 */
        /*00c0*/              @!P1 BRA 0xb0 ;                 /* 0x0 */
        /*00d0*/               @P3 BRA 0x10 ;                 /* 0x0 */
        /*00e0*/                   BRA 0xe0 ;                 /* 0x0 */
"""


def test_the_hot_loop_is_the_inner_one_with_products() -> None:
    from ndm_fast.kernels import lint

    assert lint.hot_loop(LOOP) == lint.Loop(9, 2, 1, 0, 2, 0)
    assert lint.hot_loop("/*0010*/   EXIT ;").instructions == 0
    without = LOOP.replace("HGMMA", "FFMA")
    assert lint.hot_loop(without) == lint.Loop(13, 0, 1, 1, 2, 0)


def test_a_copy_of_the_turn_before_needs_a_fence() -> None:
    from ndm_fast.kernels import lint

    assert lint.hot_loop(LOOP.replace("FENCE.VIEW.ASYNC.S", "NOP")).unfenced == 1
    assert lint.hot_loop(LOOP.replace("FENCE.VIEW.ASYNC.S", "STS [R1], R2")).unfenced == 1
    hoisted = LOOP.replace("FENCE.VIEW.ASYNC.S", "NOP").replace("LDGSTS.E.BYPASS.128", "LDG.E.128")
    assert lint.hot_loop(hoisted).unfenced == 0


@pytest.mark.parametrize(
    ("name", "value", "wrong"),
    [
        ("instructions", 210, False),
        ("instructions", 211, True),
        ("registers", 106, True),
        ("registers", 90, False),
        ("barriers", 3, True),
        ("shared_stores", 2, True),
        ("unfenced", 1, True),
        ("stack", 8, True),
        ("undefined", 1, True),
        ("wait", 0, True),
        ("wait", None, True),
        ("wait", 2, False),
        ("blocks", 1, True),
    ],
)
def test_what_is_worse(name: str, value: int | None, wrong: bool) -> None:
    from ndm_fast.kernels import lint

    golden = {"instructions": 200, "registers": 100, "barriers": 2, "shared_stores": 1, "unfenced": 0,
              "stack": 0, "undefined": 0, "wait": 1, "blocks": 2}  # fmt: skip
    assert lint.worse(golden, golden) == []
    found = lint.worse({**golden, name: value}, golden)
    assert [each.split()[0] for each in found] == ([name] if wrong else [])


@pytest.mark.parametrize(
    ("arch", "registers", "warps", "shared", "blocks"),
    [(90, 118, 8, 61952, 2), (90, 114, 8, 33280, 2), (90, 32, 4, 0, 16), (86, 32, 4, 40_000, 2)],
)
def test_blocks_of_a_multiprocessor(arch: int, registers: int, warps: int, shared: int, blocks: int) -> None:
    """The first two as the H200's runtime had them (bench/results/gpu-h200-*.json)."""
    from ndm_fast.kernels import resources

    assert resources.blocks_together(arch, registers, warps, shared) == blocks


HOISTED = """
        /*0010*/                   UIADD3 UR42, UP0, UR42, 0x20, URZ ; /* 0x0 */
        /*0020*/                   ULDC.64 UR6, c[0x0][0x250] ;        /* 0x0 */
        /*0030*/              @!P3 BRA 0x60 ;                          /* 0x0 */
        /*0040*/                   UMOV UR46, UR7 ;                    /* 0x0 */
        /*0050*/                   UMOV UR47, 0x40000040 ;             /* 0x0 */
        /*0060*/                   HGMMA.64x16x16.F32 R56, R64, gdesc[UR44].tnspB, RZ, !UPT ; /* 0x0 */
        /*0070*/               @P1 BRA 0x40 ;                          /* 0x0 */
        /*0080*/                   UMOV UR8, UR9 ;                     /* 0x0 */
        /*0090*/                   EXIT ;                              /* 0x0 */
        /*00a0*/                   UMOV UR10, UR11 ;                   /* 0x0 */
"""
"""As ptxas 12.8.93 made it of the gradient. What cannot be reached, or some way wrote, does not count."""


def test_registers_that_nothing_has_written() -> None:
    from ndm_fast.kernels.uniform import undefined

    assert undefined(HOISTED) == ["0x0010 UIADD3 UR42, UP0, UR42, 0x20, URZ", "0x0080 UMOV UR8, UR9"]
    assert undefined("") == []
    # Of two operands in shared memory both addresses are read, of one in registers the right one's alone.
    both = HOISTED.replace("R64, gdesc[UR44].tnspB", "gdesc[UR44].tnspB")
    assert [each.split()[0] for each in undefined(both)] == ["0x0010", "0x0060", "0x0080"]
    assert len(undefined(HOISTED.replace("UMOV UR47", "UMOV UR48"))) == 3
