"""What makes the distances of a search differentiable, and looks at its values first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ndm_fast.geometry.distance_gradient import Form, distance_gradients
from ndm_fast.geometry.precision import without_autocast
from ndm_fast.ops import checks
from ndm_fast.ops.library import Gradient, Run


def distance_type(queries: Tensor, keys: Tensor, rotation: Tensor) -> torch.dtype:
    """fp32, or fp64 where one of them is, which backend ``reference`` takes."""
    double = torch.float64 in (queries.dtype, keys.dtype, rotation.dtype)
    return torch.float64 if double else torch.float32


def with_finite(run: Run, given: dict[str, Any]) -> Any:
    """Runs a search; ``check_finite`` says whether to look for NaN and Inf before."""
    if given.pop("check_finite"):
        checks.check_finite(given["queries"], given["keys"], given["rotation"])
    return run(**given)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    queries, keys, rotation, ctx.widths, *form = inputs[:7]
    ctx.form, ctx.arguments = Form(*form), len(inputs)
    ctx.save_for_backward(queries, keys, rotation, output[1])


def _backward(ctx: Any, distance: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    queries, keys, rotation, index = ctx.saved_tensors
    shape = (*index.shape[:2], index.shape[2] if index.ndim == 3 else 1)
    found = without_autocast(
        lambda: distance_gradients(
            distance.reshape(shape),
            *(queries, keys, rotation, ctx.widths),
            index.reshape(shape),
            form=ctx.form,
            wanted=ctx.needs_input_grad[:3],
        )
    )
    gradients = (
        None if gradient is None else gradient.to(given.dtype)
        for gradient, given in zip(found, (queries, keys, rotation), strict=True)
    )
    return *gradients, *[None] * (ctx.arguments - 3)


DISTANCES = Gradient(_keep, _backward)
"""Of a search whose first arguments are queries, keys, rotation, widths and those of ``Form``, and whose
outputs are distances and an index. Which key is nearest carries no gradient (docs/method.md)."""
