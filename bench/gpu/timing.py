"""Times of ``gpu_check.py``: single calls, this card's ceilings, and searches beside those of others."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable

import torch
from contracts import rotation_of

SHAPES = {"gpt2": (768, 32), "qwen2.5-1.5b": (1536, 64), "gemma-2-2b": (2304, 72)}
QUERIES = (128, 4096)
KEYS = 409_600
BUDGET = 430.0
"""Seconds after which no further timing is begun."""
STARTED = time.monotonic()
Run = Callable[[], object]


def milliseconds(run: Run, device: str, seconds: float = 1.0) -> list[float]:
    """Times of up to 30 runs, in about a second, after two to warm up; on a CPU of one, it means nothing."""
    began = time.monotonic()
    if device != "cuda":
        run()
        return [1e3 * (time.monotonic() - began)]
    times: list[float] = []
    for turn in range(32):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        if turn > 1:
            times.append(start.elapsed_time(stop))
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


def measure(
    name: str, run: Run, work: float, read: float, limits: dict[str, float], device: str, parts: int = 1
) -> dict:
    """Median and spread, rate, shares of the ceilings and memory of one contender.

    Of one of the equal ``parts`` of what ``run`` does; ``work`` (FLOP) and ``read`` (bytes) are a part's too.
    """
    if device == "cuda" and time.monotonic() - STARTED > BUDGET:
        return {"name": name, "skipped": "out of time"}
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    try:
        times = [took / parts for took in milliseconds(run, device)]
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


def time_shape(
    model: str,
    n: int,
    searches: dict[str, Callable],
    limits: dict,
    device: str,
    small: bool,
    broken: set[str],
):
    """Rows of one shape: every path that passed, and the others."""
    from ndm_fast.kernels.search import nearest_index

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
    if "triton index" not in broken:
        run = lambda: nearest_index(queries, keys, rotation, widths)  # noqa: E731
        rows.append(measure("triton index", run, rotate + search, keys.numel() * 2, limits, device))
    for name, run in baselines(queries, keys, rotation, width).items():
        rows.append(measure(name, run, rotate + search, keys.numel() * 2, limits, device))
    return [{"model": model, "Q": n, "K": k, "d": d, "width": width, **row} for row in rows]
