"""What a run will cost, before it is started: FLOPs, time, memory, disk (cost model of docs/method.md)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ndm_fast.activations.documents import DOCSTRINGS
from ndm_fast.activations.sites import site_width, weight_site
from ndm_fast.config import RunConfig, TrainConfig
from ndm_fast.run.hardware import CPU_EFFICIENCY, GPU_EFFICIENCY, Efficiencies, Machine
from ndm_fast.train.rotation.lazy import MOST_DRIFT, step_drift
from ndm_fast.train.rotation.lie import restores_every_step

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


_PROCESS_BYTES = 0.6e9
"""Python, torch and transformers, before anything is loaded."""


_GPU_COPY_BYTES = 1.3e9
"""What a search on a GPU holds at once at most: rotated keys and minima (``ndm_fast.kernels.launch``)."""


_EXP_PRODUCTS = 45.0
"""Products of d^3 a step: about five in a matrix exponential, and five of (2 d)^3 in its derivative."""


_LAZY_READ, _LAZY_RESTORE = 5.0, 6.0
"""Half-precision products that take as long as making a lazy matrix orthogonal: when it is read for a search,
and between reads."""


_UPDATE_PASSES = 20
"""Times that a [d, d] fp32 matrix is read or written in a step, beside the products."""


_TOKEN_SECONDS = 1e-5
"""Tokenising and packing, in the process itself."""


_DOCSTRINGS_SECONDS = 3.0
"""Reading Python's own sources, once."""


@dataclass(frozen=True)
class ModelShape:
    """What harvesting costs, from a model's config alone."""

    width: int
    parameters: int
    """All of the model's."""
    run_parameters: int
    """Those of the blocks that a forward pass to the site multiplies with."""


@dataclass(frozen=True)
class Part:
    """One kind of work of a run."""

    name: str
    flops: float
    seconds: float


@dataclass(frozen=True)
class Plan:
    """A run's predicted cost."""

    parts: tuple[Part, ...]
    memory: dict[str, float]
    """Bytes at the peak, by what holds them."""
    disk: float
    """Bytes in the run folder."""
    rows: int
    """Activations harvested."""
    advice: tuple[str, ...]
    """Settings to change, where the run does not fit."""

    @property
    def seconds(self) -> float:
        """All parts, one after the other."""
        return sum(part.seconds for part in self.parts)

    @property
    def peak(self) -> float:
        """Bytes."""
        return sum(self.memory.values())


def model_shape(name: str, site: str, **options: Any) -> ModelShape:
    """Reads a config and builds the model without memory for its weights.

    Args:
        name, options: as for ``ndm_fast.activations.models.load_config``.
        site: any name of ``ndm_fast.activations.sites``.

    Raises:
        InputError: no such config, or no such site.
    """
    from ndm_fast.activations.models import empty_model

    model = empty_model(name, **options)
    found = weight_site(model, site)
    below = _parameters_to(model, found.module)
    return ModelShape(site_width(model, found), sum(p.numel() for p in model.parameters()), below)


def _parameters_to(model: Any, module: str) -> int:
    """Weights of matrices in order, up to the site's module; embeddings are looked up, not multiplied."""
    total, inside = 0, False
    for path, child in model.named_modules():
        reached = path == module or path.startswith(f"{module}.")
        if inside and not reached:
            break
        inside = inside or reached
        if not isinstance(child, torch.nn.Embedding):
            total += sum(p.numel() for p in child.parameters(recurse=False) if p.ndim == 2)
    return total


def make_plan(config: RunConfig, shape: ModelShape, machine: Machine) -> Plan:
    """Predicts a run of one site of ``config`` on a machine."""
    train, efficiency = config.train, GPU_EFFICIENCY if machine.is_gpu else CPU_EFFICIENCY
    pool = train.rows_held
    generations = math.ceil(train.max_steps * train.queries / max(1, pool - train.keys))
    rows = train.heldout_queries + train.heldout_keys + generations * pool
    memory = _memory(config, shape, machine, pool)
    disk = 4 * shape.width**2 * 4.0 + 1e6  # rotation and moments, the partition, logs
    parts = (
        _harvest(config, shape, machine, efficiency, rows),
        *loop_parts(train, shape.width, machine),
        _evaluations(config, shape.width, machine, efficiency),
        _merges(config, shape.width, machine, efficiency),
    )
    return Plan(parts, memory, disk, rows, _advice(config, shape, machine, memory, pool))


def _harvest(
    config: RunConfig, shape: ModelShape, machine: Machine, efficiency: Efficiencies, rows: int
) -> Part:
    flops = 2.0 * shape.run_parameters * rows
    peak = (machine.library or machine.single) if config.harvest.dtype == "float32" else machine.half
    text = rows * _TOKEN_SECONDS
    if config.harvest.data == DOCSTRINGS:
        text += _DOCSTRINGS_SECONDS
    return Part("harvest", flops, text + flops / (peak * efficiency.forward))


def loop_parts(train: TrainConfig, d: int, machine: Machine) -> tuple[Part, ...]:
    """Search, gradient and update of all steps, for activations of width ``d``."""
    efficiency = GPU_EFFICIENCY if machine.is_gpu else CPU_EFFICIENCY
    steps, K, Q = train.max_steps, train.keys, train.queries
    rotate = 2.0 * d**2 * (K / train.search_every + Q)
    sweep = 2.0 * Q * K * d
    search_peak = machine.half if machine.is_gpu else machine.single
    swept = efficiency.sweep_half if train.precision == "bf16" else efficiency.sweep
    search = rotate / (search_peak * efficiency.rotate) + sweep / (search_peak * swept)
    gradient = 4.0 * Q * d**2
    products = _products(train, d) * 2.0 * d**3
    peak = machine.half if train.rotation == "lazy" else machine.single
    update = efficiency.step + products / (peak * efficiency.product)
    update += _UPDATE_PASSES * 4 * d**2 / (machine.bandwidth * efficiency.elementwise)
    return (
        Part("search", steps * (rotate + sweep), steps * search),
        Part("gradient", steps * gradient, steps * gradient / (machine.single * efficiency.gradient)),
        Part("update", steps * products, steps * update),
    )


def _products(train: TrainConfig, d: int) -> float:
    """Products of d^3 in the update of a step, over the rates of the schedule."""
    if train.rotation == "exp":
        return _EXP_PRODUCTS
    rates = [train.lr] if train.schedule == "constant" else [train.lr * part / 6 for part in (1, 3, 5)]
    if train.rotation == "lie":
        return sum(5.0 if restores_every_step(rate, d) else 3.25 for rate in rates) / len(rates)
    total = 0.0
    for second_order, drift in (step_drift(rate, d) for rate in rates):
        total += 2.0 + second_order + _LAZY_RESTORE * min(1.0, drift / MOST_DRIFT)
    return total / len(rates) + _LAZY_READ / train.search_every


def _evaluations(config: RunConfig, d: int, machine: Machine, efficiency: Efficiencies) -> Part:
    """Held-out distances, exact."""
    train = config.train
    count = 1 + math.ceil(train.max_steps / config.run.eval_every)
    K, Q = train.heldout_keys, train.heldout_queries
    rotate, sweep, exact = 2.0 * (K + Q) * d**2, 2.0 * Q * K * d, 2.0 * Q * d**2
    seconds = rotate / efficiency.rotate + sweep / efficiency.sweep + exact / efficiency.exact
    peak = machine.half if machine.is_gpu else machine.single
    return Part("evaluate", count * (rotate + sweep + exact), count * seconds / peak)


def _merges(config: RunConfig, d: int, machine: Machine, efficiency: Efficiencies) -> Part:
    """Mutual information of all pairs at every check; subspaces only become fewer, so an upper bound."""
    merge, train = config.merge, config.train
    if merge.merge_start is None or merge.merge_start >= train.max_steps:
        return Part("merge", 0.0, 0.0)
    checks = 1 + (train.max_steps - 1 - merge.merge_start) // merge.merge_interval
    subspaces = len(train.widths(d))
    elements = subspaces * (subspaces - 1) / 2 * merge.mi_queries * min(merge.mi_keys, train.keys)
    rotate = 2.0 * min(merge.mi_keys, train.keys) * d**2
    flops = checks * (rotate + efficiency.pair * elements)
    return Part("merge", flops, flops / machine.single)


def _memory(config: RunConfig, shape: ModelShape, machine: Machine, pool: int) -> dict[str, float]:
    """Bytes on the device that trains."""
    train, d = config.train, shape.width
    stored = _BYTES[train.pool_dtype]
    heldout = (train.heldout_queries + train.heldout_keys) * d * stored
    largest = max(train.keys, train.heldout_keys)
    if machine.is_gpu:
        copies = _GPU_COPY_BYTES
    else:
        copies = 4.0 * d * (largest + 2 * max(train.queries * train.search_every, train.heldout_queries))
    return {
        "process": 0.0 if machine.is_gpu else _PROCESS_BYTES,
        "model": float(shape.parameters * _BYTES[config.harvest.dtype]),
        "pool": float(pool * d * stored),
        "held-out rows": float(heldout),
        "search": copies,
        "optimiser": 8 * 4.0 * d**2,
    }


def _advice(
    config: RunConfig, shape: ModelShape, machine: Machine, memory: dict[str, float], pool: int
) -> tuple[str, ...]:
    over = sum(memory.values()) - machine.memory
    if over <= 0:
        return ()
    train, advice = config.train, []
    if config.harvest.dtype == "float32":
        advice.append(f"--dtype bfloat16 saves {memory['model'] / 2e9:.1f} GB")
    if train.pool_dtype == "float32":
        advice.append(f"--pool-dtype float16 saves {memory['pool'] / 2e9:.1f} GB")
    fitting = int(pool - over / (shape.width * _BYTES[train.pool_dtype]))
    least = train.keys + train.queries * train.search_every
    if fitting >= least:
        advice.append(f"--pool-rows {fitting // 1024 * 1024} fits as it is")
    else:
        advice.append(f"--pool-rows {least} is the least for these keys: lower --keys too")
    return tuple(advice)


def compared(plans: Mapping[str, Plan]) -> dict[str, dict[str, float]]:
    """Seconds, and bytes of memory at the peak, of each plan by the name of its preset."""
    return {name: {"seconds": plan.seconds, "memory": plan.peak} for name, plan in plans.items()}


def describe(plan: Plan, machine: Machine) -> str:
    """The plan in lines of text, for one site."""
    source = (GPU_EFFICIENCY if machine.is_gpu else CPU_EFFICIENCY).source
    lines = [f"{'':14} {'TFLOP':>12} {'seconds':>10}"]
    lines += [f"{part.name:14} {part.flops / 1e12:>12.2f} {part.seconds:>10.1f}" for part in plan.parts]
    lines.append(f"{'a site':14} {sum(p.flops for p in plan.parts) / 1e12:>12.2f} {plan.seconds:>10.1f}")
    held = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in plan.memory.items() if size)
    lines += [
        f"{plan.rows:,} activations; disk {plan.disk / 1e6:.0f} MB",
        f"memory {plan.peak / 1e9:.2f} GB of {machine.memory / 1e9:.0f}: {held}",
        f"{machine.name}: {machine.half / 1e12:.2f} TFLOP/s bf16, {machine.single / 1e12:.2f} fp32; "
        f"efficiencies from {source}",
    ]
    if plan.advice:
        lines += ["does not fit:", *(f"  {advice}" for advice in plan.advice)]
    return "\n".join(lines)
