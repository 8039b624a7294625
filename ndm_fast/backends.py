"""Which backend runs an op, and why."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch

from ndm_fast import cpu, cuda, triton_ops
from ndm_fast.errors import InputError

logger = logging.getLogger("ndm_fast")

VARIABLE = "NDM_FAST_BACKEND"
"""Environment variable that names a backend for every op, unless the call names one."""

BACKENDS = ("reference", "cpu", "triton", "cuda")

VERIFIED: dict[str, tuple[int, ...]] = {"triton": (), "cuda": ()}
"""Compute capabilities, such as 90, on which ``bench/gpu_check.py`` passed; its records: bench/results."""


class Choice(NamedTuple):
    """A backend and the reason it was taken, in a few words."""

    name: str
    reason: str


def _reference_obstacle(device: torch.device) -> str | None:
    return None


def _cpu_obstacle(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"it runs on the CPU, the tensors are on {device.type}"
    return cpu.why_unavailable()


_OBSTACLES: dict[str, Callable[[torch.device], str | None]] = {
    "reference": _reference_obstacle,
    "cpu": _cpu_obstacle,
    "triton": triton_ops.why_unavailable,
    "cuda": cuda.why_unavailable,
}


def obstacle(name: str, device: torch.device | str) -> str | None:
    """Why a backend cannot run on a device, or None where it can."""
    if name not in _OBSTACLES:
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
        why_not_compiled = triton_ops.why_unavailable(torch.device(device))
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
        "backend %r has never been checked on sm_%d: run bench/gpu_check.py, or use backend 'reference'",
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
    if cpu.available():
        lines.append(f"{'instructions':20} {cpu.isa()}")
    return lines
