"""The hot loops of the compiled kernels, counted, and held to golden numbers; no GPU is needed.

    python -m ndm_fast.kernels.lint [--arch 80 90] [--json PATH] [--every] [--record PATH]

A compiler's next version, or an innocent change, can put a barrier in a loop, wait for a copy that it has
just asked for, forget a fence, or take one register too many. No test of results sees that. Not with
TRITON_INTERPRET set, which makes kernels that cannot be compiled.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import triton

from . import shipped
from .resources import Usage, disassembled, usage_of
from .uniform import undefined

GROWTH = 1.05
"""By how much instructions and registers may exceed their golden numbers; all else may not get worse."""

_NOT_ABOVE = ("barriers", "shared_stores", "unfenced", "stack", "undefined")
_NOT_BELOW = ("wait", "blocks")
_NEAR = ("instructions", "registers")
_MATRIX = ("HGMMA", "HMMA", "DMMA", "UTCHMMA", "UTCQMMA", "OMMA", "QMMA")


class Loop(NamedTuple):
    """What one turn of a kernel's hot loop has."""

    instructions: int
    matrix: int
    """Products on the matrix units."""
    barriers: int
    """Of the block."""
    shared_stores: int
    wait: int | None
    """Groups of copies that may still be under way after the first wait for some; None: nothing waits."""
    unfenced: int
    """Groups of wgmma after a write to shared memory with no fence between: wgmma reads past the ordering of
    ordinary writes. Which memory it reads is not looked at, so a scratch for a reduction counts too."""


def hot_loop(assembly: str) -> Loop:
    """The loop with the most products on matrix units, of equal ones the shortest; without any, the longest.

    All zero for a kernel without a loop.

    Args:
        assembly: of ``cuobjdump -sass``.
    """
    code = [
        (int(at, 16), text.strip()) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;/]+);", assembly)
    ]
    loops = [[text for at, text in code if start <= at <= end] for start, end in _loops(code)]
    if not loops:
        return Loop(0, 0, 0, 0, None, 0)
    inner = [_count(loop) for loop in loops]
    most = max(loop.matrix for loop in inner)
    if most:
        return min((loop for loop in inner if loop.matrix == most), key=lambda loop: loop.instructions)
    return max(inner, key=lambda loop: loop.instructions)


def _loops(code: Sequence[tuple[int, str]]) -> Iterator[tuple[int, int]]:
    """First and last address of every jump back; the assembler ends a kernel with a jump to itself."""
    for at, text in code:
        jump = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        if jump and int(jump[1], 16) < at:
            yield int(jump[1], 16), at


def _count(body: Sequence[str]) -> Loop:
    names = [re.sub(r"^@!?U?P\w+\s+", "", text).split()[0] for text in body]
    waits = [
        int(depth, 16) for text in body for depth in re.findall(r"\bDEPBAR\.LE SB\d, (0x[0-9a-f]+)", text)
    ]
    return Loop(
        len(names),
        sum(name.startswith(_MATRIX) for name in names),
        sum(name.startswith("BAR.") for name in names),
        sum(name.startswith("STS") for name in names),
        waits[0] if waits else None,
        _unfenced(names),
    )


def _unfenced(names: Sequence[str]) -> int:
    """Two turns are walked, since a turn's last write may be the next one's operand; those of one count."""
    written, found, begun = False, 0, False
    for turn in range(2):
        for name in names:
            if name.startswith(("STS", "LDGSTS", "STSM")):
                written = True
            elif name.startswith("FENCE.VIEW.ASYNC"):
                written = False
            elif name.startswith("WARPGROUP.ARRIVE"):
                begun = True
            elif name.startswith("HGMMA") and begun:
                begun = False
                found += turn == 1 and written
    return found


class Row(NamedTuple):
    """A shipped launch as compiled."""

    arch: int
    label: str
    usage: Usage
    loop: Loop
    undefined: int
    """Instructions that read a uniform register which nothing has written (``uniform.py``)."""

    def numbers(self) -> dict[str, Any]:
        """What golden numbers are kept of."""
        known = {**self.usage._asdict(), **self.loop._asdict(), "undefined": self.undefined}
        return {name: known[name] for name in (*_NEAR, *_NOT_ABOVE, *_NOT_BELOW)}


def rows(arch: int, *, every: bool = False) -> Iterator[Row]:
    """Every shipped launch, compiled and counted."""
    for label, launch in shipped.launches(arch, every=every):
        compiled = launch.compiled()
        assembly = disassembled(compiled)
        yield Row(
            arch, label, usage_of(compiled, arch, assembly), hot_loop(assembly), len(undefined(assembly))
        )


def worse(found: dict[str, Any], golden: dict[str, Any]) -> list[str]:
    """In what way numbers are worse than golden ones."""
    wrong = [name for name in _NEAR if found[name] > GROWTH * golden[name]]
    wrong += [name for name in _NOT_ABOVE if found[name] > golden[name]]
    wrong += [name for name in _NOT_BELOW if golden[name] is not None and (found[name] or 0) < golden[name]]
    return [f"{name} {found[name]}, was {golden[name]}" for name in wrong]


def record(found: Sequence[Row], path: Path) -> None:
    """Make these the golden numbers of the triton that compiled them."""
    golden = json.loads(path.read_text()) if path.exists() else {}
    mine = golden.setdefault(triton.__version__, {})
    for arch in sorted({row.arch for row in found}):
        mine[f"sm_{arch}"] = {row.label: row.numbers() for row in found if row.arch == arch}
    lines = json.dumps(golden, indent=1, sort_keys=True)
    # A launch a line.
    lines = re.sub(r"\{[^{}]*\}", lambda each: re.sub(r"\s*\n\s*", " ", each[0]), lines)
    path.write_text(lines + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--every", action="store_true", help="also what training does not launch")
    parser.add_argument("--json", type=Path, help="write all numbers")
    parser.add_argument("--record", type=Path, help="the file of golden numbers, to be brought up to date")
    arguments = parser.parse_args()
    found = []
    for arch in arguments.arch:
        for row in rows(arch, every=arguments.every):
            found.append(row)
            print(f"sm_{arch} {row.label:36} {_line(row)}", flush=True)
    if arguments.json:
        whole = [
            {"arch": row.arch, "label": row.label, **row.usage._asdict(), **row.loop._asdict()}
            | {"undefined": row.undefined}
            for row in found
        ]
        arguments.json.write_text(json.dumps({"triton": triton.__version__, "rows": whole}, indent=1) + "\n")
    if arguments.record:
        record(found, arguments.record)


def _line(row: Row) -> str:
    usage, loop = row.usage, row.loop
    return (
        f"{usage.registers:4} registers {usage.stack:4} B stack {usage.shared:7} B shared "
        f"{usage.warps:2} warps {usage.blocks:2} blocks {usage.tensor_core:8} | loop: {loop.instructions:5} "
        f"{loop.matrix:3} products {loop.barriers:2} barriers {loop.shared_stores:3} stores, "
        f"waits {loop.wait}, {loop.unfenced} unfenced"
        + (f", {row.undefined} UNDEFINED" if row.undefined else "")
    )


if __name__ == "__main__":
    main()
