"""Times of ``check.py``: single calls, this card's ceilings, and searches beside those of others."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from contenders import contenders
from contracts import rotation_of
from jobs import Item, Row

SHAPES = {"gemma-2-2b": (2304, 72), "gpt2": (768, 32), "qwen2.5-1.5b": (1536, 64)}
KEYS = 409_600
ONCE = os.environ.get("NDM_FAST_CHECK_ONCE") == "1"
"""Call everything once, to compile it: the processes beside would disturb a time."""
SWEEPS = 4
"""Sweeps in one CUDA graph, each with its own minima."""
REPLAYED = 20
"""Calls of a single kernel in one CUDA graph, or launches would hide its time."""
Run = Callable[[], object]


def milliseconds(run: Run, device: str, warm: int = 2, seconds: float = 0.3) -> list[float]:
    """Times of up to 30 runs, in about so many seconds, after some to warm up; of one on a CPU, or once."""
    began = time.monotonic()
    if device != "cuda" or ONCE:
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        return [1e3 * (time.monotonic() - began)]
    times: list[float] = []
    for turn in range(warm + 30):
        if turn == warm:
            began = time.monotonic()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        if turn >= warm:
            times.append(start.elapsed_time(stop))
        if times and time.monotonic() - began > seconds:
            break
    return times


def measure(
    name: str,
    run: Run,
    work: float,
    read: float,
    device: str,
    parts: int = 1,
    *,
    warm: int = 2,
    **more: Any,
) -> Row:
    """Median and spread, rates and memory of one contender.

    Of one of the equal ``parts`` of what ``run`` does; ``work`` (FLOP) and ``read`` (bytes) are a part's too.
    """
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = [took / parts for took in milliseconds(run, device, warm)]
    peak = torch.cuda.max_memory_allocated() - before if device == "cuda" else 0
    middle = statistics.median(times)
    found: Row = {"name": name, "ms": middle, "spread_ms": [min(times), max(times)], "runs": len(times)}
    found |= {"tflops": work / middle / 1e9, "gbs": read / middle / 1e6, "extra_mb": peak / 2**20}
    if "scores" in more:  # distances of a query and a key in a subspace
        found["scores_per_s"] = 1e3 * more.pop("scores") / middle
    return found | more


def graphed(run: Run, times: int = 1) -> Run:
    """So many calls in one CUDA graph, which is captured at the first."""
    replay: list[Run] = []

    def call() -> None:
        if not replay:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                run()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(times):
                    run()
            replay.append(graph.replay)
        replay[0]()

    return call


def ceilings(device: str, small: bool) -> Iterator[Item]:
    """This card's rates in TFLOP/s on random data, and its copy bandwidth in GB/s."""
    size = 256 if small else 8192

    def product(dtype: torch.dtype) -> list[Row]:
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        return [measure(str(dtype)[6:], lambda: left @ right, 2.0 * size**3, 0.0, device)]

    def copy() -> list[Row]:
        source = torch.randn(1 << (16 if small else 30), device=device)
        target = torch.empty_like(source)
        return [measure("copy", lambda: target.copy_(source), 0.0, 8.0 * source.numel(), device)]

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        yield str(dtype)[6:], lambda dtype=dtype: product(dtype)
    yield "copy", copy


class Data:
    """Rows of one shape, on the device: clustered, as activations are, each a centre and noise."""

    def __init__(self, model: str, queries: int, device: str, small: bool) -> None:
        d, self.width = (48, 16) if small else SHAPES[model]
        count, k = (queries and 64, 200) if small else (queries, KEYS)
        centres = torch.randn(64, d, device=device)
        self.queries, self.keys = (
            (centres[torch.randint(64, (n,), device=device)] + 0.3 * torch.randn(n, d, device=device)).half()
            for n in (count, k)
        )
        self.widths = [self.width] * (d // self.width)
        self.rotation = rotation_of(d).to(device)
        self.shape: Row = {"model": model, "Q": count, "K": k, "d": d, "width": self.width}


def searches(
    model: str, n: int, paths: Callable[[], dict[str, Callable]], device: str, small: bool
) -> Iterator[Item]:
    """Every path of a search at one shape, and others at the same task."""
    from ndm_fast.kernels.search import nearest_index

    data = Data(model, n, device, small)
    (count, d), k = data.queries.shape, len(data.keys)
    rotate, search = 2.0 * k * d * d, 2.0 * count * k * d
    rotated = data.keys @ data.rotation.half()
    runs: dict[str, tuple[Run, float, int]] = {}
    given = (data.queries, data.keys, data.rotation, data.widths)
    every = len(data.widths)
    runs["triton index"] = lambda: nearest_index(*given), rotate + search, every
    if device == "cuda":
        runs["triton index, in a graph"] = graphed(lambda: nearest_index(*given)), rotate + search, every
    for name, path in paths().items():
        turned = "rotated" in name
        rows = (data.queries, rotated if turned else data.keys, *given[2:])
        work = search + (0 if turned else rotate)
        runs[name] = (lambda path=path, rows=rows: path(*rows)), work, every
    for name, other in contenders(data).items():
        work = search * other.subspaces / every + (rotate if other.rotates else 0)
        runs[name] = other.run, work, other.subspaces
    for name, (run, work, subspaces) in runs.items():
        shape = {**data.shape, "scores": count * k * subspaces}
        yield name, lambda n=name, r=run, w=work, s=shape: [measure(n, r, w, 2.0 * k * d, device, **s)]
    if device == "cuda":
        yield "kernels", lambda: kernels(data.shape)
        yield "profile", lambda: profile(runs["triton index"][0], data.shape)


def profile(run: Run, shape: Row) -> list[Row]:
    """Where the time of a call goes on the device: the kernels that take the most."""
    for _ in range(4):
        run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    kinds = sorted(found.key_averages(), key=lambda each: -each.self_device_time_total)[:30]
    return [
        {"name": f"on device: {each.key}"[:110], "ms": each.self_device_time_total / 1e3, "calls": each.count}
        | shape
        for each in kinds
    ]


def kernels(shape: Row) -> list[Row]:
    """Registers, shared memory and blocks a multiprocessor of every Triton kernel this process launched."""
    from ndm_fast.kernels import gradient, ksg, lie_update, look, rerank, resolve, sweep

    rows: list[Row] = []
    for module in (sweep, look, resolve, rerank, gradient, ksg, lie_update):
        for name, kernel in vars(module).items():
            caches = getattr(kernel, "device_caches", None)
            for cache, *_ in caches.values() if caches else ():
                rows += [_usage(name, compiled) | shape for compiled in cache.values()]
    return rows


def _usage(name: str, compiled) -> Row:
    from ndm_fast.kernels.launch import capability
    from ndm_fast.kernels.resources import blocks_together

    compiled._init_handles()
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    card = capability(torch.device("cuda"))
    constants = {str(name): str(value) for name, value in compiled.src.constants.items()}
    return {
        "name": f"kernel {name}", "registers": compiled.n_regs, "spills": compiled.n_spills, "shared": shared,
        "warps": warps, "blocks_per_sm": blocks_together(card, compiled.n_regs, warps, shared),
        "constants": constants,
    }  # fmt: skip


def sweeps(model: str, n: int, device: str, small: bool) -> Iterator[Item]:
    """Sweep and search that decides, each alone, in every shape to try for ``kernels/tuning.json``."""
    from ndm_fast.kernels import autotune, search, tuning

    data = Data(model, n, device, small)
    one = autotune.timed(data.queries, data.keys[: 200 if small else 65536], data.rotation, data.widths)
    part, times = one.part, SWEEPS if device == "cuda" else 1
    shape = {**data.shape, "K": len(part.chunk.rows)}
    work = 2.0 * len(data.queries) * len(part.chunk.rows) * data.queries.shape[1]

    def row(name: str, kind: str, key: tuning.Key, choice: dict, call: Run) -> list[Row]:
        more = {**shape, "kind": kind, "key": key._asdict(), "choice": choice}
        done = graphed(call, SWEEPS) if device == "cuda" else call
        return [measure(name, done, work, 0.0, device, times, **more)]

    def time_sweep(name: str, choice: dict) -> list[Row]:
        tiles = tuning.Sweep(**choice)
        pack = search.packed(part, tiles)
        return row(name, "sweep", one.sweep_key, choice, lambda: search.sweep(part, tiles, pack))

    def time_resolve(name: str, choice: dict) -> list[Row]:
        with tuning.forced("resolve", choice):
            return row(name, "resolve", one.resolve_key(), choice, one.resolve())

    for kind, run, choices in (
        ("sweep", time_sweep, one.sweeps),
        ("resolve", time_resolve, autotune.RESOLVE_CANDIDATES),
    ):
        for choice in choices[:1] if small else choices:
            name = f"{kind} Q{len(data.queries)} {'x'.join(map(str, choice.values()))}"
            yield name, partial(run, name, choice)
    if device == "cuda":
        yield "kernels", lambda: kernels({"model": model})
