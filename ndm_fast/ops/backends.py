"""Which backend runs an op, and why."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from functools import lru_cache
from types import ModuleType
from typing import NamedTuple

import torch

from ndm_fast.errors import InputError
from ndm_fast.ops.cpu import extension

logger = logging.getLogger("ndm_fast")

VARIABLE = "NDM_FAST_BACKEND"
"""Environment variable that names a backend for every op, unless the call names one."""

BACKENDS = ("reference", "cpu", "triton", "cuda")

VERIFIED: dict[str, tuple[int, ...]] = {"triton": (90,), "cuda": (90,)}
"""Compute capabilities, such as 90, on which ``bench/gpu/check.py`` passed; its records: bench/results.

An H200; docs/kernels-gpu.md says what has changed since.
"""


def load(name: str) -> ModuleType:
    """A module of this package by its name there; what it needs is imported at the first call."""
    return importlib.import_module(f"ndm_fast.{name}")


def has_triton_installed() -> bool:
    """Whether triton is installed."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton's interpreter is asked for, which runs kernels on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_no_triton(device: torch.device) -> str | None:
    """Why the ops cannot run on a device, or None where they can."""
    if not has_triton_installed():
        return "triton is not installed: pip install triton"
    if device.type == "cuda" and torch.version.hip is None:
        old = torch.cuda.get_device_capability(device) < (8, 0)
        return "its kernels need compute capability 8.0" if old else None
    if device.type == "cpu" and interpreted():
        return None if can_interpret() else "set TRITON_INTERPRET=1 before triton is imported"
    return f"it runs on CUDA devices (and, slowly, on the CPU with TRITON_INTERPRET=1), not on {device.type}"


def can_interpret() -> bool:
    """Triton decides whether it compiles or interprets when it is imported."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(tl.sum, InterpretedFunction)


class Choice(NamedTuple):
    """A backend and the reason it was taken, in a few words."""

    name: str
    reason: str


def _reference_obstacle(device: torch.device) -> str | None:
    return None


def _cpu_obstacle(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"it runs on the CPU, the tensors are on {device.type}"
    return extension.why_unavailable()


def _cuda_obstacle(device: torch.device) -> str | None:
    found: str | None = load("ops.cuda").why_unavailable(device)
    return found


_OBSTACLES: dict[str, Callable[[torch.device], str | None]] = {
    "reference": _reference_obstacle,
    "cpu": _cpu_obstacle,
    "triton": why_no_triton,
    "cuda": _cuda_obstacle,
}


def obstacle(name: str, device: torch.device | str) -> str | None:
    """Why a backend cannot run on a device, or None where it can."""
    if name not in BACKENDS:  # a tuple, which takes what cannot be hashed
        raise InputError(f"unknown backend {name!r}: take one of auto, {', '.join(BACKENDS)}")
    return _OBSTACLES[name](torch.device(device))


def choose(device: torch.device | str, name: str | None = None) -> Choice:
    """The backend for tensors on a device.

    Args:
        name: a backend, ``"auto"``, or None for the value of ``NDM_FAST_BACKEND`` (``auto`` if unset).

    Raises:
        InputError: the named backend is unknown or cannot run; the message says why.
    """
    asked_by = "the call" if name else VARIABLE
    name = name or os.environ.get(VARIABLE) or "auto"
    if name != "auto":
        why_not = obstacle(name, device)
        if why_not:
            raise InputError(f"backend {name!r} cannot run: {why_not}; use backend 'auto' or 'reference'")
        return _taken(name, f"named by {asked_by}", torch.device(device))
    if torch.device(device).type == "cuda":
        why_not_compiled = why_no_triton(torch.device(device))
        if why_not_compiled is None:
            return _taken("triton", "runs on any CUDA card", torch.device(device))
    else:
        why_not_compiled = _cpu_obstacle(torch.device(device))
        if why_not_compiled is None:
            return Choice("cpu", "fastest that is proven on a CPU")
    return Choice("reference", f"no compiled backend: {why_not_compiled}")


def _taken(name: str, reason: str, device: torch.device) -> Choice:
    if name in VERIFIED and device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if 10 * major + minor not in VERIFIED[name]:
            _log_unverified(name, 10 * major + minor)
            reason += f"; never checked on sm_{10 * major + minor}"
    return Choice(name, reason)


@lru_cache
def _log_unverified(name: str, capability: int) -> None:
    """Once for each backend and architecture."""
    logger.warning(
        "backend %r has never been checked on sm_%d: run bench/gpu/check.py, or use backend 'reference'",
        name,
        capability,
    )


def describe() -> list[str]:
    """Lines for ``ndm-fast doctor``: every backend, whether it can run here, and what ``auto`` takes."""
    lines = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for name in BACKENDS:
            lines.append(f"{f'{name} on {device}':20} {obstacle(name, device) or 'can run'}")
        choice = choose(device)
        lines.append(f"{f'chosen on {device}':20} {choice.name}: {choice.reason}")
    if extension.available():
        lines.append(f"{'instructions':20} {extension.isa()}")
    return lines


def has_fast_bf16(device: torch.device) -> bool:
    """Whether products in bf16 are faster than in fp32 there: GPUs, and CPUs with AVX512-BF16."""
    if device.type != "cpu":
        return True
    return extension.available() and extension.isa() == "avx512bf16"


def has_triton(backend: str, device: torch.device) -> bool:
    """Whether the step runs on Triton's kernels; the CUDA C++ extension holds the search alone."""
    return backend in ("triton", "cuda") and why_no_triton(device) is None
