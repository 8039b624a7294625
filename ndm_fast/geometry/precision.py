"""Matrix products in fp32 proper, whatever the program has chosen for its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

_AUTOCAST = ("cpu", "cuda")


def full_fp32() -> contextlib.AbstractContextManager[None]:
    """fp32 products without tf32 on a GPU or bf16 on a CPU, whatever the program has chosen for its own."""
    return _set(_exact())


def fp32_sums() -> contextlib.AbstractContextManager[None]:
    """Half-precision products whose parts a GPU adds up in fp32, not in half precision."""
    gpu = torch.backends.cuda.matmul
    names = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
    return _set([(gpu, name, False) for name in names])


def without_autocast(run: Callable[[], Any]) -> Any:
    """What it gives with products in the types of their factors, even under ``torch.autocast``."""
    on = [kind for kind in _AUTOCAST if torch.is_autocast_enabled(kind)]
    if not on:
        return run()
    with contextlib.ExitStack() as stack:
        for kind in on:
            stack.enter_context(torch.autocast(kind, enabled=False))
        return run()


@contextlib.contextmanager
def _set(choices: list[tuple[Any, str, str | bool]]) -> Iterator[None]:
    before = [(products, name, getattr(products, name)) for products, name, _ in choices]
    for products, name, value in choices:
        setattr(products, name, value)
    try:
        yield
    finally:
        for products, name, value in before:
            setattr(products, name, value)


def _exact() -> list[tuple[Any, str, str | bool]]:
    """Where a precision is set, and to what; torch 2.9 replaced a flag by a name."""
    gpu, cpu = torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)
    if not hasattr(gpu, "fp32_precision"):
        return [(gpu, "allow_tf32", False)]
    return [(products, "fp32_precision", "ieee") for products in (gpu, cpu) if products is not None]
