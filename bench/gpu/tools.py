"""NVIDIA's own tools over a small program of ours: compute-sanitizer, and Nsight Compute's counters.

    python bench/gpu/check.py --only sanitizer --out found.json
    python bench/gpu/check.py --only counters --out found.json

Each item runs this file under a tool, in a process of its own.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if "--interpret" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
sys.path.insert(0, str(ROOT))

import torch
from jobs import Item, Row

SANITIZERS = ("memcheck", "racecheck", "initcheck")
CASES = ("search", "gradient", "gradient fp16x3, one product", "gradient fp16x3, two products")
"""What is run under a sanitizer. In two products, of 64 and 16 columns, the gradient once broke."""
FOUND = 9
"""Exit status of compute-sanitizer where it finds something."""

COUNTERS = {
    "tensor_active_pct": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "issue_active_pct": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "l2_pct": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "lsu_wavefronts_pct": "l1tex__data_pipe_lsu_wavefronts.avg.pct_of_peak_sustained_elapsed",
    "barrier_stall_pct": "smsp__warp_issue_stalled_barrier_per_warp_active.pct",
}
"""What to read of a kernel: are the tensor cores busy, is the issue, does the second-level cache hold it up,
do loads and stores of shared memory, do warps wait at barriers."""
KERNELS = "sweep_kernel|stream_kernel|resolve_kernel|project_kernel|gradient_kernel"


def find_tool(name: str) -> str:
    """Path of a tool of the CUDA toolkit, from PATH or CUDA_HOME.

    Raises:
        RuntimeError: it is not there.
    """
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    places = [shutil.which(name), home / "bin" / name, home / name / name]
    for place in places:
        if place and os.access(place, os.X_OK) and Path(place).is_file():
            return str(place)
    raise RuntimeError(f"not run: {name} is neither on PATH nor under CUDA_HOME ({home})")


def sanitized(tool: str, small: bool) -> Iterator[Item]:
    """Every small case under one of compute-sanitizer's tools."""
    for case in CASES:
        name = f"{tool} of {case}"
        yield name, partial(_sanitize, name, tool, case, small)


def _sanitize(name: str, tool: str, case: str, small: bool) -> list[Row]:
    command = [find_tool("compute-sanitizer"), "--tool", tool, "--error-exitcode", str(FOUND)]
    # Each tensor an allocation of its own, or what lies beyond one is the next.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = _run([*command, *_program(case, small)], environment)
    if done.returncode:
        said = [line.strip("= \n") for line in done.stdout.splitlines() if line.startswith("=====")]
        said = [line for line in said if line and "COMPUTE-SANITIZER" not in line] or [done.stdout[-300:]]
        summary = [line for line in said if "SUMMARY" in line]
        said = [line for line in said if line not in summary]
        why = "found" if done.returncode == FOUND else f"ended with {done.returncode}"
        return [{"name": name, "failed": f"{tool} {why}: {' | '.join([*summary, *said[:4]])[:400]}"}]
    return [{"name": name, "right": True}]


def counted(model: str, small: bool) -> Iterator[Item]:
    """The five counters of the kernels of a model's searches and gradient, by ncu."""
    for what in ("Q4096", "Q128", "gradient"):
        yield f"counters {what}", partial(_count, model, what, small)


def _count(model: str, what: str, small: bool) -> list[Row]:
    command = [find_tool("ncu"), "--csv", "--page", "raw", "--clock-control", "none", "--print-units", "base"]
    command += ["--kernel-name", f"regex:{KERNELS}", "--metrics", ",".join(COUNTERS.values())]
    done = _run([*command, *_program(f"{model} {what}", small)], dict(os.environ))
    rows = [{"name": f"counters {what} {each.pop('kernel')}", "model": model, **each}
            for each in parsed(done.stdout.splitlines())]  # fmt: skip
    if done.returncode or not rows:
        raise RuntimeError(f"ncu ended with {done.returncode}: {' '.join(done.stdout.split())[-300:]}")
    return [{**row, "said": _shown(row)} for row in rows]


def _shown(row: Row) -> str:
    return ", ".join(f"{name} {row[name]:.1f}" for name in COUNTERS if name in row)


def parsed(lines: Sequence[str]) -> list[Row]:
    """Of ncu's CSV, in its form ``raw`` or ``details``: a row a kernel, means over its launches."""
    start = next((place for place, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    found: dict[str, dict[str, list[float]]] = {}
    for row in csv.DictReader(lines[start:]):
        kernel = (row.get("Kernel Name") or "").split("(")[0].strip()
        if not kernel:  # the line of units
            continue
        values = found.setdefault(kernel, {})
        named = {row["Metric Name"]: row["Metric Value"]} if "Metric Name" in row else row
        for name, metric in COUNTERS.items():
            number = _number(named.get(metric))
            if number is not None:
                values.setdefault(name, []).append(number)
    return [
        {"kernel": kernel, "launches": max(map(len, values.values()), default=0)}
        | {name: sum(numbers) / len(numbers) for name, numbers in values.items()}
        for kernel, values in found.items()
    ]


def _number(text: str | None) -> float | None:
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return None


def _program(case: str, small: bool) -> list[str]:
    return [sys.executable, __file__, "--case", case, *(["--interpret"] if small else [])]


def _run(command: Sequence[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", check=False,
    )  # fmt: skip


def small_case(case: str, device: str, small: bool) -> Callable[[], object]:
    """A call that is small enough for a tool that slows a card a hundredfold."""
    from contracts import gradient_cases, rotation_of

    from ndm_fast.kernels import gradient, search

    if case == "search":
        keys = torch.randn(300 if small else 3000, 96).half().to(device)
        rotation = rotation_of(96).to(device)
        few, many = keys[:2], keys[: 8 if small else 300]
        return lambda: [search.nearest_index(rows, keys, rotation, [32] * 3) for rows in (few, many)]
    products, _, columns = case.removeprefix("gradient").strip().partition(", ")
    queries, keys, index, widths = gradient_cases(small)["72"]
    given = [x.to(device) for x in (queries.half(), keys[:4000].half(), index % min(4000, len(keys)))]
    rotation = rotation_of(sum(widths)).to(device)
    options = {"columns": (64, 16)} if columns == "two products" else {}
    return lambda: gradient.loss_and_gradient(
        *given, rotation, widths, "euclidean", products=products or "ieee", **options
    )


def large_case(case: str, device: str, small: bool) -> Callable[[], object]:
    """A search among 65,536 keys or a gradient, of a model's shape."""
    import step
    import timing

    from ndm_fast.kernels import gradient, search

    model, what = case.split()
    if what == "gradient":
        work = step.make_work(model, device, small)
        return lambda: gradient.loss_and_gradient(*work.batch(0), work.rotation, work.widths, "euclidean")
    data = timing.Data(model, int(what[1:]), device, small)
    return lambda: search.nearest_index(data.queries, data.keys[:65536], data.rotation, data.widths)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", required=True, help="what to run once")
    parser.add_argument("--interpret", action="store_true", help="tiny, on the CPU")
    arguments = parser.parse_args()
    import check

    check.import_package()
    device = "cpu" if arguments.interpret else "cuda"
    case = small_case if arguments.case in CASES else large_case
    case(arguments.case, device, arguments.interpret)()
    if device == "cuda":
        torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
