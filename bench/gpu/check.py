"""Check and time every GPU path on this machine: one command, under 8 minutes, no network.

    python bench/gpu/check.py --out gpu.json
    python bench/gpu/check.py --interpret --out small.json    # tiny, on a CPU: its times mean nothing
    python bench/gpu/check.py --tune --out tiles.json         # times every tile of the sweep, nothing else

Builds ``ndm_fast._cuda`` where nvcc is, checks each path against the fp64 oracle on fresh random data (the
seed is recorded), and times only what passed, at the shapes of the published runs. Needs torch and triton.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if "--interpret" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
sys.path.insert(0, str(ROOT))

import torch
from contracts import (
    GRADIENT_UNITS,
    check,
    check_cases,
    check_gradient,
    check_index,
    check_ksg,
    check_products,
    check_update,
    gradient_cases,
)
from step import check_graph, check_steps, time_shapes, time_steps
from timing import QUERIES, SHAPES, STARTED, ceilings, time_shape

CHECK_BUDGET = 280.0
"""Seconds after which what has not been checked counts as failed."""
Check = Callable[[], str | None]


def prepare(interpret: bool) -> str:
    """Build the CUDA extension, make ``ndm_fast.kernels`` importable from a checkout; what the build said."""
    built = "not built: interpreted"
    if not interpret:
        major, minor = torch.cuda.get_device_capability()
        wanted = "1" if shutil.which("nvcc") or os.environ.get("CUDA_HOME") else "0"
        environment = {**os.environ, "NDM_FAST_CUDA": wanted, "NDM_FAST_CUDA_ARCHS": f"{major}{minor}"}
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        built = done.stdout[-2000:] + done.stderr[-2000:]
    import ndm_fast

    if importlib.util.find_spec("ndm_fast.kernels") is None:
        folder = Path(tempfile.mkdtemp())
        (folder / "kernels").symlink_to(ROOT / "kernels")
        ndm_fast.__path__.append(str(folder))
    return built


def paths(interpret: bool) -> dict[str, Callable]:
    """Name -> search with the arguments of ``triton_ops.nearest_neighbors``, for each path that can run."""
    from ndm_fast.kernels import search
    from ndm_fast.ops import cuda

    nearest = search.nearest_neighbors
    found: dict[str, Callable] = {
        f"triton {form} {precision}": partial(nearest, form=form, precision=precision)
        for form in ("split", "fused")
        for precision in ("fp32", "bf16")
    }
    found["triton rotated"] = partial(nearest, keys_rotated=True)
    if not interpret and cuda.why_unavailable(torch.device("cuda")) is None:
        found |= {f"cuda split {p}": partial(cuda.nearest_neighbors, precision=p) for p in ("fp32", "bf16")}
        found["cuda rotated"] = partial(cuda.nearest_neighbors, keys_rotated=True)
    return found


def checks(searches: dict[str, Callable], device: str, small: bool) -> Iterator[tuple[str, Check]]:
    """Names and what finds out what is wrong: every path, case and type, fresh data each time."""
    types = (torch.float16, torch.float32, torch.bfloat16)
    for name, search in searches.items():
        for case_name, case in check_cases(small).items():
            for dtype in types if case_name == "heavy-tailed" and not small else types[:1]:
                label = f"{name} / {case_name} / {dtype}"
                yield label, partial(check, search, name, case, dtype, device)
    for case_name, case in check_cases(small).items():
        for dtype in types if case_name == "heavy-tailed" and not small else types[:1]:
            label = f"triton index / {case_name} / {dtype}"
            yield label, partial(check_index, case, dtype, device)
    yield "fp32 products", partial(check_products, device)
    yield "triton ksg", partial(check_ksg, device, small)
    for products in GRADIENT_UNITS:
        for case_name, case in gradient_cases(small).items():
            for dtype in types if case_name == "merged" else types[:1]:
                label = f"gradient {products} / {case_name} / {dtype}"
                yield label, partial(check_gradient, case, dtype, products, device)
    yield "lie update", partial(check_update, device, small)
    yield "training steps", partial(check_steps, device, small)
    yield "training steps in a graph", partial(check_graph, device, small)


def run_checks(searches: dict[str, Callable], device: str, small: bool) -> dict[str, str]:
    """Failures by path and case."""
    failures = {}
    path = ""
    for name, find in checks(searches, device, small):
        if name.split(" / ")[0] != path:
            path = name.split(" / ")[0]
            print(f"{time.monotonic() - STARTED:4.0f} s, checking {path}", flush=True)
        try:
            if device == "cuda" and time.monotonic() - STARTED > CHECK_BUDGET:
                raise TimeoutError("not checked, out of time")
            wrong = find()
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"[:500]
        if wrong:
            failures[name] = wrong
    return failures


def machine(device: str) -> dict[str, object]:
    """Hardware, versions and commit."""
    import triton

    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    versions = {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}
    card = torch.cuda.get_device_name() if device == "cuda" else "none: interpreted"
    capability = torch.cuda.get_device_capability() if device == "cuda" else None
    return {"card": card, "capability": capability, "cuda": torch.version.cuda, "commit": commit, **versions}


def tune(path: Path) -> None:
    """Times of all tiles of the sweep at the widths of the shapes, to the path; and a table."""
    from ndm_fast.kernels import autotune, tuning

    os.environ[tuning.CACHE_VARIABLE] = str(path.with_suffix(".cache.json"))
    result: dict = {"machine": machine("cuda"), "rows": []}
    for d, width in SHAPES.values():
        for tiles, ms in autotune.tune([width] * (d // width), max(QUERIES), 65536).items():
            result["rows"].append({"width": width, **tiles._asdict(), "ms": ms})
            print(result["rows"][-1], flush=True)
        save(path, result)


def save(path: Path, result: dict) -> None:
    """What is known so far, should the machine be taken away."""
    result["seconds"] = time.monotonic() - STARTED
    path.write_text(json.dumps(result, indent=1) + "\n")


def show(result: dict) -> None:
    """The short table."""
    print(f"\n{result['machine']['card']}, peaks {result['ceilings']}")
    for row in result["rows"]:
        if "ms" in row:
            print(
                f"{row['model']:13} Q {row['Q']:5} {row['name']:32} {row['ms']:9.3f} ms {row['tflops']:7.1f} "
                f"TFLOP/s {row['share_of_bf16_peak']:6.1%} of peak {row['gbs']:7.0f} GB/s "
                f"{row['extra_mb']:6.0f} MB"
            )
        else:
            print(f"{row['model']:13} Q {row['Q']:5} {row['name']:32} {row.get('failed') or row['skipped']}")
    for name, wrong in result["failures"].items():
        print(f"WRONG {name}: {wrong}")
    print(f"{len(result['failures'])} failures; {result['seconds']:.0f} s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    parser.add_argument("--interpret", action="store_true", help="tiny, on the CPU: tests this script")
    parser.add_argument("--tune", action="store_true", help="time the choices of kernels/tuning.py, no more")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "little"))
    arguments = parser.parse_args()
    small = arguments.interpret
    if not small and not torch.cuda.is_available():
        sys.exit("gpu_check: no CUDA device is visible to torch; --interpret tests this script without one")
    device = "cpu" if small else "cuda"
    torch.manual_seed(arguments.seed)
    built = prepare(small)
    if arguments.tune:
        tune(arguments.out)
        return 0
    searches = paths(small)
    failures = run_checks(searches, device, small)
    broken = {name.split(" / ")[0] for name in failures}
    right = {name: search for name, search in searches.items() if name not in broken}
    limits = ceilings(device, small)
    result = {"machine": machine(device), "seed": arguments.seed, "build": built, "ceilings": limits}
    result |= {"failures": failures, "rows": []}
    for model in list(SHAPES)[:1] if small else SHAPES:
        for n in QUERIES[:1] if small else QUERIES:
            result["rows"] += time_shape(model, n, right, limits, device, small, broken)
            save(arguments.out, result)
        result["rows"] += time_steps(model, limits, device, small, broken)
        save(arguments.out, result)
    if "gradient ieee" not in broken:  # last: only worth what time is left
        for model in list(SHAPES)[:1] if small else SHAPES:
            result["rows"] += time_shapes(model, limits, device, small)
    save(arguments.out, result)
    show(result)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
