"""Registers, shared memory and spills of a compiled kernel, and how many blocks of it a multiprocessor holds.

``lint.py`` prints them for every shipped launch.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from triton.backends import nvidia
from triton.compiler import CompiledKernel

from . import tuning

_REGISTERS = 65536
_THREADS = {80: 2048, 90: 2048, 100: 2048}
"""A multiprocessor holds at most so many; others 1536 (CUDA C++ guide, technical specifications)."""
_MOST_BLOCKS = {86: 16, 89: 24, 120: 24}
"""Others 32."""


class Usage(NamedTuple):
    """What a block of a compiled kernel takes."""

    registers: int
    stack: int
    """Bytes of local memory for a thread: spills, or arrays that did not fit in registers."""
    shared: int
    """Bytes."""
    limit: int
    """Bytes a block may use."""
    warps: int
    blocks: int
    """That fit on a multiprocessor together."""
    tensor_core: str
    """Matrix instruction it uses, or ``-``."""


def disassembled(compiled: CompiledKernel) -> str:
    """What ``cuobjdump`` says of a compiled kernel: resources and assembly."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
        command = [str(tool), "--dump-resource-usage", "--dump-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def usage_of(compiled: CompiledKernel, arch: int, report: str) -> Usage:
    """From what :func:`disassembled` says, for a compute capability such as 90."""
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    code = compiled.asm["ptx"]
    instruction = next((i for i in ("wgmma", "tcgen05", "mma.sync") if i in code), "-")
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    return Usage(
        usage["REG"],
        usage["STACK"] + usage["LOCAL"],
        shared,
        tuning.SHARED_MEMORY[tuning.architecture(arch)] * 1024,
        warps,
        blocks_together(arch, usage["REG"], warps, shared),
        instruction,
    )


def blocks_together(arch: int, registers: int, warps: int, shared: int) -> int:
    """Blocks that a multiprocessor holds: by registers, threads and shared memory, 1 KB of it reserved."""
    row = tuning.architecture(arch)
    each = 32 * -(-registers // 8) * 8 * warps
    memory = (tuning.SHARED_MEMORY[row] + 1) * 1024
    fits = (_REGISTERS // each, _THREADS.get(row, 1536) // (32 * warps), memory // (shared + 1024))
    return min(*fits, _MOST_BLOCKS.get(row, 32))
