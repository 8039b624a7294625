"""Peak memory of one search beyond its arguments, measured in a fresh process.

In a process that has run before, freed memory stays resident and the growth reads as nothing; and the
allocator is told to give freed memory back.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from registry import Shape

_PLAIN = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


def extra_memory(shape: Shape, precision: str) -> float:
    """MB; it needs Linux, for ``/proc``."""
    command = [sys.executable, __file__, precision, *(str(int(number)) for number in shape)]
    environment = {**os.environ, **_PLAIN}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout)


def _resident(field: str) -> int:
    """A memory figure of this process, KB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def main() -> None:
    from bench_nearest import Search

    precision, *numbers = sys.argv[1:]
    search = Search(Shape(*map(int, numbers)), precision)
    Search(Shape(64, 32, 16, 128), precision).run()  # what BLAS and the thread pool keep is not ours
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    search.run()
    print(round((_resident("VmHWM") - before) / 1024, 1))


if __name__ == "__main__":
    main()
