"""What machines can do, and how much of it each part of a run gets: the data behind ``ndm-fast plan``."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ndm_fast.errors import InputError
from ndm_fast.ops.backends import has_fast_bf16
from ndm_fast.ops.product import product

GB = 1e9


@dataclass(frozen=True)
class Machine:
    """A roofline: peak rates of dense matrix products, memory and its bandwidth."""

    name: str
    half: float
    """FLOP/s in bf16 with fp32 sums, no sparsity."""
    single: float
    """FLOP/s in fp32."""
    bandwidth: float
    """bytes/s."""
    memory: float
    """bytes."""
    library: float | None = None
    """FLOP/s in fp32 of torch's own products, which the model runs on; None where they are all there are."""

    @property
    def is_gpu(self) -> bool:
        """Whether kernels, not BLAS and our C++, do the work."""
        return self.name != "cpu"


# As the makers state them, from memory; memory in 10^9 bytes.
GPUS: dict[str, Machine] = {
    machine.name: machine
    for machine in (
        Machine("H200", 989e12, 67e12, 4.8e12, 141 * GB),
        Machine("H100", 989e12, 67e12, 3.35e12, 80 * GB),
        Machine("A100", 312e12, 19.5e12, 2.04e12, 80 * GB),
        Machine("L40S", 362e12, 91.6e12, 0.864e12, 48 * GB),
        Machine("4090", 165e12, 82.6e12, 1.01e12, 24 * GB),
    )
}


@dataclass(frozen=True)
class Efficiencies:
    """Shares of a machine's peak that the parts of a run reach, and where the numbers come from."""

    forward: float
    """The model's forward pass, of the peak in its dtype."""
    rotate: float
    """Rotation of the keys; GPUs: half precision."""
    sweep: float
    """Search over rotated keys in fp32 (GPUs: in half precision)."""
    sweep_half: float
    """The same with the bf16 proposal pass, of the same peak."""
    exact: float
    """Distances measured from raw rows, in evaluations."""
    gradient: float
    """Gathering neighbors and the gradient's products, fp32."""
    product: float
    """Products of d^3 in the update."""
    elementwise: float
    """Adam, of the bandwidth."""
    pair: float
    """FLOP that one (pair of subspaces, query, key) of the MI estimate takes as long as."""
    step: float
    """Seconds of a step beside the work above: Python, launches, small tensors."""
    source: str


CPU_EFFICIENCY = Efficiencies(
    forward=0.70,
    rotate=0.95,
    sweep=0.95,
    sweep_half=1.65,
    exact=0.11,
    gradient=0.55,
    product=0.95,
    elementwise=0.6,
    pair=31.0,
    step=3e-4,
    source="a Zen 5, bench/results/plan-avx512bf16.json and train-avx512bf16.json",
)


GPU_EFFICIENCY = Efficiencies(
    forward=0.5,
    rotate=0.75,
    sweep=0.40,
    sweep_half=0.40,
    exact=0.05,
    gradient=0.2,
    product=0.6,
    elementwise=0.66,
    pair=31.0,
    step=5e-5,
    source="an H200, docs/kernels-gpu.md; forward pass, evaluations and merging are guesses",
)


def machine_of(device: str) -> Machine:
    """A GPU by name, or this computer's CPU, measured in half a second.

    Raises:
        InputError: unknown name.
    """
    if device == "cpu":
        return _this_cpu()
    found = {name.lower(): gpu for name, gpu in GPUS.items()}.get(device.lower())
    if found is None:
        raise InputError(f"unknown device {device!r}: take cpu or one of {', '.join(GPUS)}")
    return found


def _this_cpu() -> Machine:
    single = _product_rate(torch.float32, product)
    half = _product_rate(torch.bfloat16, torch.mm) if has_fast_bf16(torch.device("cpu")) else single
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return Machine("cpu", half, single, _copy_rate(), memory, _product_rate(torch.float32, torch.mm))


def _product_rate(dtype: torch.dtype, product: Callable[[Tensor, Tensor], Tensor], size: int = 1536) -> float:
    """FLOP/s of a matrix product."""
    left = torch.ones(size, size, dtype=dtype)
    return 2 * size**3 / _median_seconds(lambda: product(left, left))


def _copy_rate(elements: int = 1 << 24) -> float:
    """bytes/s read and written by a copy that does not fit the cache."""
    source, target = torch.ones(elements), torch.empty(elements)
    return 8 * elements / _median_seconds(lambda: target.copy_(source))


def _median_seconds(work: Callable[[], object], repeats: int = 5) -> float:
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
