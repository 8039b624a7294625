"""Check and time every GPU path on this machine: one command, under 8 minutes, no network.

    python bench/gpu/check.py --out gpu.json
    python bench/gpu/check.py --interpret --out small.json    # tiny, on a CPU: its times mean nothing
    python bench/gpu/check.py --quick --out gpu.json          # the rows that matter most, in 190 seconds
    python bench/gpu/check.py --tune --out tiles.json         # only what is tried for kernels/tuning.json
    python bench/gpu/check.py --only steps --out steps.json   # jobs whose name has this word

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

import jobs
from building import build
from jobs import Item, Job
from record import Record, machine

BUDGET = 460.0
"""Seconds after which nothing is begun and what still runs is ended."""
QUICK = 190.0
SANITIZER_BUDGET = 110.0
"""Seconds from the start at which compute-sanitizer and the build are ended: timings do not wait for them."""
SEARCHES = {
    **{f"triton split {kind}": ("triton", "split", kind) for kind in ("fp32", "bf16")},
    **{f"triton fused {kind}": ("triton", "fused", kind) for kind in ("fp32", "bf16")},
    "triton rotated": ("triton", None, "rotated"),
    **{f"cuda split {kind}": ("cuda", "split", kind) for kind in ("fp32", "bf16")},
    "cuda rotated": ("cuda", None, "rotated"),
}  # fmt: skip
GRADIENTS = ("gradient fp16x3", "gradient ieee", "gradient tf32x3")
TWO_PRODUCTS = "gradient fp16x3 two products"
"""Assembled by nvcc's ptxas where that is: that of triton 3.6 makes wrong code of it."""
MODELS = ("gemma-2-2b", "gpt2", "qwen2.5-1.5b")


def import_package() -> None:
    """Make ``ndm_fast.kernels`` importable from a checkout."""
    import ndm_fast

    if importlib.util.find_spec("ndm_fast.kernels") is None:
        folder = Path(tempfile.mkdtemp())
        (folder / "kernels").symlink_to(ROOT / "kernels")
        ndm_fast.__path__.append(str(folder))


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
    import contenders
    import contracts
    import gradient_shapes
    import quick
    import real
    import step
    import timing
    import tools

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
    elif name == "check flash-kmeans":
        yield from contenders.check_flash_kmeans(device, small)
    elif name == "check activations":
        yield from real.checks(device, small)
    elif name == "time activations":
        yield from real.times(device, small)
    elif kind == "sanitizer":
        yield from tools.sanitized(rest, small)
    elif kind == "counters":
        yield from tools.counted(rest, small)
    elif kind == "quick":
        yield from quick.rows(rest, device, small)
    elif kind == "ceilings":
        yield from timing.ceilings(device, small)
    elif what == "steps":
        yield from step.time_steps(model, device, small)
    elif kind == "time":
        paths = [each for each in SEARCHES if not small or each.startswith("triton split")]
        found = lambda: {each: search_of(each) for each in paths}  # noqa: E731
        yield from timing.searches(model, int(what[1:]), found, device, small)
    elif kind == "tune" and what == "gradient":
        yield from gradient_shapes.time_shapes(model, device, small)
    elif kind == "tune":
        yield from timing.sweeps(model, int(what[1:]), device, small)
    else:
        raise ValueError(f"no job is called {name!r}")


def quick_plan(small: bool) -> tuple[list[Job], list[Job]]:
    """What matters most, in that order: for when a few minutes of a card are left."""
    models = MODELS[1:2] if small else MODELS
    alone = ["ceilings", *(f"quick {model}" for model in models)]
    alone += [
        f"tune {model} Q{count}" for count in ((128,) if small else (4096, 128)) for model in models[1:]
    ]
    return [Job(f"check {name}", 60) for name in ("triton index", "steps")], [Job(name, 30) for name in alone]


def plan(small: bool) -> tuple[list[Job], list[Job]]:
    """Checks, which run beside each other, and what runs alone, in order of what is wanted most."""
    import tools

    checks = [f"check {name}" for name in SEARCHES if not small or not name.startswith("cuda")]
    checks += [f"check {name}" for name in ("triton index", *GRADIENTS, TWO_PRODUCTS, "others", "steps")]
    checks += ["check activations"]
    checks += ["check flash-kmeans"] if importlib.util.find_spec("flash_kmeans") and not small else []
    slow = [Job(f"sanitizer {tool}", 60) for tool in tools.SANITIZERS]
    models = MODELS[1:2] if small else MODELS
    counts = (128,) if small else (4096, 128)
    alone = ["ceilings", *(f"time {model} steps" for model in models)]
    alone += [f"time {model} Q{count}" for model in models for count in counts]
    # Of 72 columns the first two runs have told: last. 32 and 64 are from before minima coalesced.
    narrow, known = (models[1:], models[:1]) if len(models) > 1 else (models, [])
    alone += [f"tune {model} Q{count}" for model in narrow for count in counts]
    alone += ["time activations", f"tune {models[0]} gradient", f"counters {models[0]}"]
    alone += [f"tune {model} gradient" for model in models[1:]]
    alone += [f"tune {model} Q{count}" for model in known for count in counts]
    return [Job(name, 120) for name in checks] + slow, [Job(name, 45) for name in alone]


def needs_build(name: str) -> bool:
    """Whether a job calls the CUDA C++ extension."""
    return "cuda" in name or (name.startswith("time") and " Q" in name)


def environment_of(name: str) -> dict[str, str] | None:
    """What a job's process finds, where that is not what this one does."""
    ptxas = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "ptxas"
    if name == f"check {TWO_PRODUCTS}" and ptxas.is_file():
        return {**os.environ, "TRITON_PTXAS_PATH": str(ptxas)}
    return None


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
    checks, timings = (quick_plan if arguments.quick else plan)(small)
    wanted = [word.strip() for word in (arguments.only or "").split(",")]
    checks, timings = (
        [job for job in each if job.name == "ceilings" or any(word in job.name for word in wanted)]
        for each in ([] if arguments.no_checks else checks, timings)
    )
    ready = threading.Event()

    def check(job: Job) -> None:
        if needs_build(job.name):
            ready.wait()
        limit = together if job.name.startswith("check") else beside
        jobs.run(job, [*command, "--job", job.name], record.add, limit, environment_of(job.name))

    def compile_all(job: Job) -> None:
        if needs_build(job.name):
            ready.wait()
        jobs.run(job, [*command, "--job", job.name, "--once"], lambda *_: None, together)

    together = record.began + 0.45 * arguments.budget
    beside = min(together, record.began + SANITIZER_BUDGET)
    with ThreadPoolExecutor(arguments.beside) as pool:
        first = []
        if not small and any(needs_build(job.name) for job in (*checks, *timings)):
            first = [pool.submit(lambda: record.add("build", build(beside - time.monotonic())))]
            first[0].add_done_callback(lambda _: ready.set())
        else:
            ready.set()
        running = [pool.submit(check, job) for job in checks if not needs_build(job.name)]
        once = [job for job in timings[1:] if not job.name.startswith(("counters", "time activations"))]
        once.sort(key=lambda job: needs_build(job.name))  # or they would keep the others from a place
        running += [pool.submit(compile_all, job) for job in once if not small]
        running += [pool.submit(check, job) for job in checks if needs_build(job.name)]
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
    parser.add_argument(
        "--tune", dest="only", action="store_const", const="tune",
        help="only what is tried for kernels/tuning.json: as --only tune",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="within 190 seconds: what matters most")
    parser.add_argument("--no-checks", action="store_true", help="time only: they have passed before")
    parser.add_argument(
        "--budget", type=float, help=f"seconds for everything ({BUDGET:g}, {QUICK:g} if quick)"
    )
    parser.add_argument("--beside", type=int, default=min(16, os.cpu_count() or 1), help="processes at once")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "little"))
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.budget = arguments.budget or (QUICK if arguments.quick else BUDGET)
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
    print(f"\n{record.head['machine']['card']}, ceilings {record.ceilings}", *record.table(), sep="\n")
    for row in failures:
        print(f"FAILED {row['job']} / {row['name']}: {row['failed']}")
    print(f"{len(failures)} failures; {time.monotonic() - record.began:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
