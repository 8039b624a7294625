"""Matrix products in fp32 proper, whatever ``torch.set_float32_matmul_precision`` says."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def full_fp32() -> Iterator[None]:
    """fp32 products without tf32 on a GPU or bf16 on a CPU, whatever the program has chosen for its own."""
    before = [(products, name, getattr(products, name)) for products, name, _ in _exact()]
    for products, name, exact in _exact():
        setattr(products, name, exact)
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
