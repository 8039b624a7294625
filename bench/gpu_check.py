"""Check and time every GPU path on this machine: one command, under 8 minutes, no network.

    python bench/gpu_check.py --out gpu.json
    python bench/gpu_check.py --interpret --out small.json    # tiny, on a CPU: its times mean nothing

Builds ``ndm_fast._cuda`` where nvcc is, checks each path against the fp64 oracle on fresh random data (the
seed is recorded), and times only what passed, at the shapes of design section 4. Needs torch and triton.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if "--interpret" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

SHAPES = {"gpt2": (768, 32), "qwen2.5-1.5b": (1536, 64), "gemma-2-2b": (2304, 72)}
QUERIES = (128, 4096)
KEYS = 409_600
BUDGET = 430.0
"""Seconds after which no further timing is begun."""
CHECK_BUDGET = 280.0
"""Seconds after which what has not been checked counts as failed."""
STARTED = time.monotonic()
Run = Callable[[], object]


def prepare(interpret: bool) -> str:
    """Build the CUDA extension, make ``ndm_fast.kernels`` importable from a checkout; what the build said."""
    built = "not built: interpreted"
    if not interpret:
        major, minor = torch.cuda.get_device_capability()
        environment = {**os.environ, "NDM_FAST_CUDA_ARCHS": f"{major}{minor}"}
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
    from functools import partial

    from ndm_fast import cuda, triton_ops

    nearest = triton_ops.nearest_neighbors
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


def rotation_of(width: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(width, width, dtype=torch.float64))[0].float()


def check_cases(small: bool) -> dict[str, tuple[torch.Tensor, torch.Tensor, list[int], str]]:
    """Name -> queries, keys, widths, metric; fresh data at every call. Few widths: each is compiled."""
    q, k = (2, 140) if small else (200, 20_000)

    def normal(rows: int, width: int) -> torch.Tensor:
        return torch.randn(rows, width)

    def heavy(rows: int, width: int) -> torch.Tensor:
        data = torch.randn(rows, width) * torch.exp(torch.randn(rows, 1)) + torch.randn(width)
        data[:, 0] *= 30
        data[::17] *= 20
        return data

    cases = {
        "normal": (normal(q, 96), normal(k, 96), [32] * 3, "euclidean"),
        "heavy-tailed": (heavy(q, 96), heavy(k, 96), [64, 32], "euclidean"),
        "cosine": (heavy(q, 72), heavy(k, 72), [72], "cosine"),
        "odd widths": (normal(q, 67), normal(k - 1, 67), [31, 5, 31], "euclidean"),
        "one query, one key": (normal(1, 36), normal(1, 36), [31, 5], "euclidean"),
        "tile edge": (normal(q, 32), normal(129, 32), [32], "euclidean"),
        "ties": (normal(q, 32), normal(20, 32).repeat(7, 1), [32], "euclidean"),
    }
    offset = normal(k, 96) + 100
    cases["queries among keys, off centre"] = (offset[::7][:q].clone(), offset, [64, 32], "euclidean")
    if not small:
        cases["wide"] = (normal(64, 432), normal(5000, 432), [216, 216], "euclidean")
    return cases


def check(search: Callable, name: str, case: tuple, dtype: torch.dtype, device: str) -> str | None:
    """What is wrong with a search on a case, or None: the contract of design section 3."""
    from ndm_fast import reference

    queries, keys, widths, metric = case
    rotation = rotation_of(sum(widths))
    queries, keys = queries.to(dtype), keys.to(dtype)
    rotated = "rotated" in name
    given = (queries.to(device), keys.to(device), rotation.to(device), widths)
    found = search(*given, metric=metric)
    again = search(*given, metric=metric)
    if not (torch.equal(found.distance, again.distance) and torch.equal(found.index, again.index)):
        return "two runs differ"
    index, distance = found.index.cpu(), found.distance.cpu().double()
    if bool((index < 0).any()) or bool((index >= len(keys)).any()) or bool(distance.isnan().any()):
        return "an output was not written"
    options = {"metric": metric, "keys_rotated": rotated}
    # In fp64 on the card: the oracle, too, has to be quick.
    best = reference.nearest_neighbors(*given, **options).distance.cpu()
    true = reference.distance_to(*given, found.index, **options).cpu()
    floor = 1e-12 if metric == "cosine" else 1e-9 * float(best.max())
    if bool(((distance - true).abs() > 1e-5 * true + floor).any()):
        return f"distance is off by {float(((distance - true).abs() / (true + floor)).max()):.1e}"
    excess = ((true - best) / (best + floor)).clamp_min(0)
    if "bf16" not in name and float(excess.max()) > 2e-6:
        return f"a neighbour is {float(excess.max()):.1e} farther than the nearest"
    if float((excess > 1e-2).double().mean()) > 1e-3 or float(excess.mean()) > 1e-3:
        return (
            f"mean excess {float(excess.mean()):.1e}, {float((excess > 1e-2).double().mean()):.2%} over 1 %"
        )
    return None


def check_ksg(device: str, small: bool) -> str | None:
    """What is wrong with the KSG kernels, or None."""
    from ndm_fast import reference, triton_ops

    queries, keys = (torch.randn(n, 40) for n in ((3, 70) if small else (130, 3001)))
    variances, pairs = torch.tensor([12.0, 20.0, 8.0]), torch.tensor([[0, 1], [2, 1], [1, 1]])
    arguments = (queries, keys, rotation_of(40), [12, 20, 8], variances, pairs)
    given = [x.to(device) if isinstance(x, torch.Tensor) else x for x in arguments]
    radius = triton_ops.ksg_radius(*given)
    counts = triton_ops.ksg_counts(*given, radius).cpu()
    radius = radius.cpu().double()
    if not torch.allclose(radius, reference.ksg_radius(*arguments), rtol=1e-5, atol=1e-6):
        return "radius"
    low, high = (reference.ksg_counts(*arguments, radius * f) for f in (1 - 1e-5, 1 + 1e-5))
    if not bool(((counts >= low) & (counts <= high)).all()) or bool(counts[2].any()):
        return "counts"
    return None


def run_checks(searches: dict[str, Callable], device: str, small: bool) -> tuple[dict, list[str]]:
    """Failures by path and case, and the names of the paths without any."""
    failures = {}
    for name, search in searches.items():
        for case_name, case in check_cases(small).items():
            types = (torch.float16, torch.float32, torch.bfloat16)
            for dtype in types if case_name == "heavy-tailed" and not small else types[:1]:
                try:
                    if time.monotonic() - STARTED > CHECK_BUDGET:
                        raise TimeoutError("not checked, out of time")
                    wrong = check(search, name, case, dtype, device)
                except Exception as error:
                    wrong = f"{type(error).__name__}: {error}"[:500]
                if wrong:
                    failures[f"{name} / {case_name} / {dtype}"] = wrong
        print(f"checked {name}, {time.monotonic() - STARTED:.0f} s", flush=True)
    if wrong := check_ksg(device, small):
        failures["triton ksg"] = wrong
    return failures, [n for n in searches if not any(f.startswith(f"{n} / ") for f in failures)]


def milliseconds(run: Run, device: str, seconds: float = 1.0) -> list[float]:
    """Times of up to 30 runs, in about a second, after two to warm up."""
    times: list[float] = []
    began = time.monotonic()
    for turn in range(32):
        if device == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            stop.record()
            stop.synchronize()
            took = start.elapsed_time(stop)
        else:
            before = time.perf_counter()
            run()
            took = (time.perf_counter() - before) * 1e3
        if turn > 1:
            times.append(took)
        if times and time.monotonic() - began > seconds:
            break
    return times


def ceilings(device: str, small: bool) -> dict[str, float]:
    """This card's bf16 and fp16 rate in TFLOP/s on random data, and its copy bandwidth in GB/s."""
    size = 256 if small else 8192
    found = {}
    for dtype in (torch.bfloat16, torch.float16):
        left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        rate = 2 * size**3 / 1e9
        found[str(dtype)[6:]] = rate / statistics.median(milliseconds(lambda a=left, b=right: a @ b, device))
    source = torch.randn(1 << (16 if small else 30), device=device)
    target = torch.empty_like(source)
    moved = 2 * source.numel() * 4 / 1e6
    found["copy_gbs"] = moved / statistics.median(milliseconds(lambda: target.copy_(source), device))
    return found


def baselines(queries, keys, rotation, width: int) -> dict[str, Run]:
    """Others at the same task: the published scheme, and the products alone in cuBLAS (the floor)."""
    half, count = rotation.to(keys.dtype), rotation.shape[0] // width
    block = 16384

    def nearest_of(part: torch.Tensor) -> torch.Tensor:
        turned_queries, turned = (
            (rows.float() @ rotation).unflatten(1, (count, width)).transpose(0, 1) for rows in (queries, part)
        )
        return torch.cdist(turned_queries, turned).min(2).values

    compiled = torch.compile(nearest_of)

    def published(step: Callable) -> None:
        best = torch.full((count, len(queries)), torch.inf, device=keys.device)
        for part in keys.split(block):
            best = torch.minimum(best, step(part))

    def floor() -> None:
        turned_queries = (queries @ half).unflatten(1, (count, width)).transpose(0, 1)
        for part in keys.split(block):
            turned = (part @ half).unflatten(1, (count, width)).permute(1, 2, 0)
            torch.bmm(turned_queries, turned)

    found: dict[str, Run] = {"cuBLAS products alone": floor}
    if len(queries) <= 128:
        found["published scheme, eager"] = lambda: published(nearest_of)
        if keys.is_cuda:
            found["published scheme, torch.compile"] = lambda: published(compiled)
    return found | installed_libraries(queries, keys, rotation, width)


def installed_libraries(queries, keys, rotation, width: int) -> dict[str, Run]:
    """faiss-gpu, cuVS and KeOps where they are, over contiguous rotated rows of one subspace only."""
    found: dict[str, Run] = {}
    if not keys.is_cuda or len(queries) > 128:
        return found
    rows = [(x @ rotation[:, :width].to(x.dtype)).float().contiguous() for x in (queries, keys)]
    if importlib.util.find_spec("faiss"):
        import faiss

        if hasattr(faiss, "StandardGpuResources"):
            import faiss.contrib.torch_utils

            resources = faiss.StandardGpuResources()
            found["faiss-gpu, one subspace"] = lambda: faiss.knn_gpu(resources, *rows, 1)
    if importlib.util.find_spec("cuvs"):
        from cuvs.neighbors import brute_force

        index = brute_force.build(rows[1])
        found["cuVS, one subspace"] = lambda: brute_force.search(index, rows[0], 1)
    if importlib.util.find_spec("pykeops"):
        from pykeops.torch import LazyTensor

        left, right = LazyTensor(rows[0][:, None]), LazyTensor(rows[1][None])
        found["KeOps, one subspace"] = lambda: ((left - right) ** 2).sum(2).argmin(1)
    return found


def measure(name: str, run: Run, work: float, read: float, limits: dict[str, float], device: str) -> dict:
    """Median and spread, rate, shares of the ceilings and memory of one contender."""
    if time.monotonic() - STARTED > BUDGET:
        return {"name": name, "skipped": "out of time"}
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    try:
        times = milliseconds(run, device)
    except Exception as error:
        return {"name": name, "failed": f"{type(error).__name__}: {error}"[:500]}
    peak = torch.cuda.max_memory_allocated() - before if device == "cuda" else 0
    middle = statistics.median(times)
    return {
        "name": name,
        "ms": middle,
        "spread_ms": [min(times), max(times)],
        "tflops": work / middle / 1e9,
        "share_of_bf16_peak": work / middle / 1e9 / limits["bfloat16"],
        "gbs": read / middle / 1e6,
        "extra_mb": peak / 2**20,
    }


def time_shape(model: str, n: int, searches: dict[str, Callable], limits: dict, device: str, small: bool):
    """Rows of one shape: every path that passed, and the others."""
    d, width = (48, 16) if small else SHAPES[model]
    n, k = (4, 200) if small else (n, KEYS)
    rotation = rotation_of(d).to(device)
    queries, keys = (torch.randn(rows, d, device=device).half() for rows in (n, k))
    widths = [width] * (d // width)
    rotate, search = 2.0 * k * d * d, 2.0 * n * k * d
    rotated = keys @ rotation.half()
    rows = []
    for name, path in searches.items():
        given = rotated if "rotated" in name else keys
        work = search if "rotated" in name else rotate + search
        run = lambda p=path, g=given: p(queries, g, rotation, widths)  # noqa: E731
        rows.append(measure(name, run, work, given.numel() * 2, limits, device))
    for name, run in baselines(queries, keys, rotation, width).items():
        rows.append(measure(name, run, rotate + search, keys.numel() * 2, limits, device))
    return [{"model": model, "Q": n, "K": k, "d": d, "width": width, **row} for row in rows]


def machine(device: str) -> dict[str, object]:
    """Hardware, versions and commit."""
    import triton

    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    versions = {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}
    card = torch.cuda.get_device_name() if device == "cuda" else "none: interpreted"
    capability = torch.cuda.get_device_capability() if device == "cuda" else None
    return {"card": card, "capability": capability, "cuda": torch.version.cuda, "commit": commit, **versions}


def show(result: dict) -> None:
    """The short table."""
    print(f"\n{result['machine']['card']}, peaks {result['ceilings']}")
    for row in result["rows"]:
        if "ms" in row:
            print(
                f"{row['model']:13} Q {row['Q']:5} {row['name']:32} {row['ms']:9.3f} ms {row['tflops']:7.1f} "
                f"TFLOP/s {row['share_of_bf16_peak']:6.1%} of peak {row['extra_mb']:8.0f} MB"
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
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "little"))
    arguments = parser.parse_args()
    small = arguments.interpret
    if not small and not torch.cuda.is_available():
        sys.exit("gpu_check: no CUDA device is visible to torch; --interpret tests this script without one")
    device = "cpu" if small else "cuda"
    torch.manual_seed(arguments.seed)
    built = prepare(small)
    searches = paths(small)
    failures, passed = run_checks(searches, device, small)
    limits = ceilings(device, small)
    result = {"machine": machine(device), "seed": arguments.seed, "build": built, "ceilings": limits}
    result |= {"failures": failures, "rows": []}
    for model in list(SHAPES)[:1] if small else SHAPES:
        for n in QUERIES[:1] if small else QUERIES:
            right = {name: searches[name] for name in passed}
            result["rows"] += time_shape(model, n, right, limits, device, small)
            result["seconds"] = time.monotonic() - STARTED
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    show(result)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
