"""Kernels of the gradient in two products, as several assemblers make them; no GPU is needed.

    PYTHONPATH=build/triton-3.6 python bench/gpu/assemblers.py [--ptxas /usr/local/cuda/bin/ptxas ...]

Of the same PTX: how many instructions read a uniform register that nothing has written. The first assembler
is triton's own; that of triton 3.6, ptxas 12.8.93, makes wrong code (docs/kernels-gpu.md).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import check
import torch

WIDTHS = {"72": [72, 72], "merged": [150, 33, 7, 1], "gemma-2-2b": [72] * 32}
QUERIES, KEYS = 128, 20_000


def assembled(ptx: str, ptxas: Path, folder: Path) -> str:
    """What cuobjdump says of PTX for sm_90a, as this assembler makes it."""
    from triton.backends import nvidia

    source, made = folder / "kernel.ptx", folder / "kernel.cubin"
    source.write_text(ptx)
    command = [str(ptxas), "--gpu-name=sm_90a", str(source), "-o", str(made)]
    subprocess.run(command, check=True, capture_output=True)
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    shown = subprocess.run([str(tool), "--dump-sass", str(made)], capture_output=True, text=True, check=True)
    return shown.stdout


def version(ptxas: Path) -> str:
    """Such as ``V12.8.93``."""
    said = subprocess.run([str(ptxas), "--version"], capture_output=True, text=True, check=True).stdout
    return next(word for word in said.split() if word.startswith("V1"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ptxas", type=Path, nargs="*", default=[], help="other assemblers")
    arguments = parser.parse_args()
    check.import_package()
    import contracts
    import triton
    from triton.backends import nvidia

    from ndm_fast.kernels import gradient, replay
    from ndm_fast.kernels.uniform import undefined

    assemblers = [Path(nvidia.__file__).parent / "bin" / "ptxas", *arguments.ptxas]
    print(f"PTX of triton {triton.__version__}; " + " ".join(version(each) for each in assemblers))
    with tempfile.TemporaryDirectory() as folder:
        for name, widths in WIDTHS.items():
            d, index = sum(widths), torch.empty(len(widths), QUERIES, dtype=torch.int64, device="meta")
            rows = (torch.empty(n, d, dtype=torch.float16, device="meta") for n in (QUERIES, KEYS))
            rotation = torch.empty(d, d, device="meta")
            with replay.recorded(90) as launches:
                gradient.loss_and_gradient(
                    *rows, index, rotation, widths, "euclidean",
                    products="fp16x3", columns=contracts.TWO_PRODUCTS,
                )  # fmt: skip
            for launch in launches:
                ptx = launch.compiled().asm["ptx"]
                counts = [len(undefined(assembled(ptx, each, Path(folder)))) for each in assemblers]
                print(f"{name:10} {launch.name:16} " + " ".join(f"{count:8}" for count in counts), flush=True)


if __name__ == "__main__":
    main()
