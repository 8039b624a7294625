"""Check and time every GPU path on this machine: one command, under 8 minutes, no network.

    python bench/gpu/check.py --out gpu.json
    python bench/gpu/check.py --interpret --out small.json    # tiny, on a CPU: its times mean nothing
    python bench/gpu/check.py --only tune --out tiles.json    # jobs whose name has this word

Builds ``ndm_fast._cuda`` where nvcc is. Each path is checked against the fp64 oracle on fresh random data
(the seed is recorded) in a process of its own, all beside each other; meanwhile what is timed later is
compiled. Times then come one process after the other. The result is written after each row. Needs torch and
triton.
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
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if "--interpret" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
sys.path.insert(0, str(ROOT))

import floors
import jobs
from jobs import Item, Job, Row

BUDGET = 460.0
"""Seconds after which nothing is begun and what still runs is ended."""
SEARCHES = {
    **{f"triton split {kind}": ("triton", "split", kind) for kind in ("fp32", "bf16")},
    **{f"triton fused {kind}": ("triton", "fused", kind) for kind in ("fp32", "bf16")},
    "triton rotated": ("triton", None, "rotated"),
    **{f"cuda split {kind}": ("cuda", "split", kind) for kind in ("fp32", "bf16")},
    "cuda rotated": ("cuda", None, "rotated"),
}  # fmt: skip
GRADIENTS = ("gradient fp16x3", "gradient ieee", "gradient tf32x3")
MODELS = ("gemma-2-2b", "gpt2", "qwen2.5-1.5b")
PREDICTED = Path(__file__).with_name("predicted.json")


def import_package() -> None:
    """Make ``ndm_fast.kernels`` importable from a checkout."""
    import ndm_fast

    if importlib.util.find_spec("ndm_fast.kernels") is None:
        folder = Path(tempfile.mkdtemp())
        (folder / "kernels").symlink_to(ROOT / "kernels")
        ndm_fast.__path__.append(str(folder))


def build() -> Row:
    """Build the extensions for this card."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    wanted = "1" if shutil.which("nvcc") or os.environ.get("CUDA_HOME") else "0"
    environment = {**os.environ, "NDM_FAST_CUDA": wanted, "NDM_FAST_CUDA_ARCHS": f"{major}{minor}"}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    began = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    said = done.stdout[-2000:] + done.stderr[-2000:]
    return {"name": "build", "seconds": time.monotonic() - began, "status": done.returncode, "said": said}


def search_of(name: str) -> Callable:
    """The search of a path, with the arguments of ``kernels.search.nearest_neighbors``."""
    backend, form, kind = SEARCHES[name]
    options: dict = {"keys_rotated": True} if kind == "rotated" else {"precision": kind}
    if backend == "triton":
        from ndm_fast.kernels import search

        return partial(search.nearest_neighbors, form=form, **options)
    import torch

    from ndm_fast.ops import cuda

    why_not = cuda.why_unavailable(torch.device("cuda"))
    if why_not:
        raise RuntimeError(why_not)
    return partial(cuda.nearest_neighbors, **options)


def items(name: str, device: str, small: bool) -> Iterator[Item]:
    """The items of a job, in its process."""
    import contracts
    import step
    import timing

    kind, _, rest = name.partition(" ")
    model, _, what = rest.partition(" ")
    if kind == "check" and rest in SEARCHES:
        yield from contracts.check_path(rest, search_of(rest), device, small)
    elif kind == "check" and rest.startswith("gradient"):
        yield from contracts.check_gradients(what, device, small)
    elif rest == "triton index":
        yield from contracts.check_indexes(device, small)
    elif rest == "others":
        yield from contracts.check_others(device, small)
    elif rest == "steps":
        yield contracts.case_item("training steps", partial(step.check_steps, device, small))
        yield contracts.case_item("training steps in a graph", partial(step.check_graph, device, small))
    elif kind == "ceilings":
        yield from timing.ceilings(device, small)
    elif what == "steps":
        yield from step.time_steps(model, device, small)
    elif kind == "time":
        paths = [each for each in SEARCHES if not small or each.startswith("triton split")]
        found = lambda: {each: search_of(each) for each in paths}  # noqa: E731
        yield from timing.searches(model, int(what[1:]), found, device, small)
    elif kind == "tune" and what == "gradient":
        yield from step.time_shapes(model, device, small)
    elif kind == "tune":
        yield from timing.sweeps(model, int(what[1:]), device, small)
    else:
        raise ValueError(f"no job is called {name!r}")


def plan(small: bool) -> tuple[list[Job], list[Job]]:
    """Checks, which run beside each other, and timings, in order of what is wanted most."""
    checks = [f"check {name}" for name in SEARCHES if not small or not name.startswith("cuda")]
    checks += [f"check {name}" for name in ("triton index", *GRADIENTS, "others", "steps")]
    models = MODELS[1:2] if small else MODELS
    timings = ["ceilings", *(f"time {model} steps" for model in models)]
    timings += [f"time {model} Q{n}" for model in models for n in ((128,) if small else (4096, 128))]
    timings += [f"tune {model} {what}" for model in models for what in ("Q4096", "Q128", "gradient")]
    return [Job(name, 120) for name in checks], [Job(name, 45) for name in timings]


class Record:
    """The result, printed and written row by row."""

    def __init__(self, path: Path, head: Row) -> None:
        self.path, self.rows, self.lock, self.began = path, [], threading.Lock(), time.monotonic()
        self.head, self.ceilings = head, {}
        self.predicted = json.loads(PREDICTED.read_text()) if PREDICTED.exists() else {}

    def add(self, job: str, row: Row) -> None:
        """One row of a job."""
        with self.lock:
            row = {"job": job, **row}
            if job == "ceilings" and "ms" in row:
                self.ceilings[row["name"]] = row["tflops"] or row["gbs"]
            if "tflops" in row and "float16" in self.ceilings:
                row["share_of_fp16_peak"] = row["tflops"] / self.ceilings["float16"]
            predicted = self.predicted.get(f"{row.get('model')} Q{row.get('Q')} {row['name']}")
            if predicted is not None:
                row["predicted_ms"] = predicted
            floor = floors.of_row(row) if self.head["machine"]["capability"] == (9, 0) else None
            if floor is not None:
                row["floor_ms"] = floor
                if row["ms"] < floor:
                    row["failed"] = f"{row['ms']:.4f} ms cannot be: no card takes less than {floor:.4f}"
            self.rows.append(row)
            self._print(row)
            self.head["seconds"] = time.monotonic() - self.began
            whole = json.dumps({**self.head, "ceilings": self.ceilings, "rows": self.rows}, indent=1)
            self.path.with_suffix(".part").write_text(whole + "\n")
            self.path.with_suffix(".part").replace(self.path)

    def _print(self, row: Row) -> None:
        began = f"{time.monotonic() - self.began:4.0f} s {row['job']:28} {str(row['name'])[:44]:44}"
        if "failed" in row:
            print(f"{began} {row['failed']}", flush=True)
        elif "tflops" in row:
            rates = f"{row['tflops']:7.1f} TFLOP/s {row['gbs']:6.0f} GB/s"
            predicted = f" (predicted {row['predicted_ms']})" if "predicted_ms" in row else ""
            floor = f" (floor {row['floor_ms']:.3f})" if "floor_ms" in row else ""
            print(f"{began} {row['ms']:9.3f} ms {rates}{predicted}{floor}", flush=True)
        elif "ms" in row:
            print(f"{began} {row['ms']:9.3f} ms {row['calls']:5} calls", flush=True)
        elif "registers" in row and row["spills"]:
            print(f"{began} {row['registers']} registers, {row['spills']} spilled", flush=True)

    def write_tiles(self) -> None:
        """The fastest of what was tried, in the form of ``kernels/tuning.json``, beside the record."""
        from ndm_fast.kernels import autotune, tuning

        table: dict = {}
        tried = [row for row in self.rows if "choice" in row and "failed" not in row]
        for row in sorted(tried, key=lambda row: -row["ms"]):
            key = tuning.Key(**row["key"])
            table = autotune.added(table, row["kind"], key, row["choice"], row["ms"], self.path.name)
        if table:
            self.path.with_suffix(".tiles.json").write_text(json.dumps(table, indent=1) + "\n")

    def failures(self) -> list[Row]:
        """Rows that failed or were wrong."""
        return [row for row in self.rows if "failed" in row]


def machine(device: str) -> Row:
    """Hardware, versions and commit."""
    import torch
    import triton

    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    versions = {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}
    card = torch.cuda.get_device_name() if device == "cuda" else "none: interpreted"
    capability = torch.cuda.get_device_capability() if device == "cuda" else None
    return {"card": card, "capability": capability, "cuda": torch.version.cuda, "commit": commit, **versions}


def child(name: str, device: str, small: bool, seed: int) -> int:
    """In a job's process."""
    import torch

    done = set(json.loads(sys.stdin.read()))
    torch.manual_seed(seed)
    import_package()
    still_works = torch.cuda.synchronize if device == "cuda" else lambda: None
    jobs.work(items(name, device, small), done, still_works)
    return 0


def run_all(arguments: argparse.Namespace, record: Record, small: bool) -> None:
    """Checks and compilation beside each other, then the timings."""
    deadline = record.began + arguments.budget
    command = [sys.executable, __file__, "--seed", str(arguments.seed), *(["--interpret"] if small else [])]
    checks, timings = plan(small)
    wanted = [word.strip() for word in (arguments.only or "").split(",")]
    checks, timings = (
        [job for job in each if job.name == "ceilings" or any(word in job.name for word in wanted)]
        for each in ([] if arguments.no_checks else checks, timings)
    )
    ready = threading.Event()

    def check(job: Job) -> None:
        if "cuda" in job.name:
            ready.wait()
        jobs.run(job, [*command, "--job", job.name], record.add, together)

    def compile_all(job: Job) -> None:
        if " Q" in job.name:
            ready.wait()
        jobs.run(job, [*command, "--job", job.name, "--once"], lambda *_: None, together)

    together = record.began + 0.45 * arguments.budget
    with ThreadPoolExecutor(arguments.beside) as pool:
        first = [] if small else [pool.submit(lambda: record.add("build", build()))]
        if first:
            first[0].add_done_callback(lambda _: ready.set())
        running = [pool.submit(check, job) for job in checks if "cuda" not in job.name]
        running += [pool.submit(compile_all, job) for job in timings[1:] if not small]
        running += [pool.submit(check, job) for job in checks if "cuda" in job.name]
        for each in first + running:
            each.result()
    for job in timings:
        jobs.run(job, [*command, "--job", job.name], record.add, deadline)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--interpret", action="store_true", help="tiny, on the CPU: tests this script")
    parser.add_argument(
        "--only", help="only jobs with one of these words, with commas between, in their name"
    )
    parser.add_argument("--no-checks", action="store_true", help="time only: they have passed before")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for everything")
    parser.add_argument("--beside", type=int, default=min(14, os.cpu_count() or 1), help="processes at once")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "little"))
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.once:
        os.environ["NDM_FAST_CHECK_ONCE"] = "1"
    import torch

    small = arguments.interpret
    device = "cpu" if small else "cuda"
    if arguments.job:
        return child(arguments.job, device, small, arguments.seed)
    if not arguments.out:
        parser.error("--out is needed: the JSON to write")
    if not small and not torch.cuda.is_available():
        sys.exit("check.py: no CUDA device is visible to torch; --interpret tests this script without one")
    import_package()  # the floors follow its tiles
    record = Record(arguments.out, {"machine": machine(device), "seed": arguments.seed})
    run_all(arguments, record, small)
    record.write_tiles()
    failures = record.failures()
    print(f"\n{record.head['machine']['card']}, ceilings {record.ceilings}")
    for row in failures:
        print(f"FAILED {row['job']} / {row['name']}: {row['failed']}")
    print(f"{len(failures)} failures; {time.monotonic() - record.began:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
