"""The contract of loss and gradient for given neighbors, and rows on which tests hold backends to it."""

from __future__ import annotations

import torch
from torch import Tensor

from ndm_fast.geometry import objective
from ndm_fast.geometry.objective import Objective


def nearly_rotation(width: int) -> Tensor:
    """[d, d] a few percent off orthogonal, as between the repairs of the lazy rotation; always the same."""
    one, two = torch.randn(2, width, width, generator=torch.Generator().manual_seed(width))
    return (torch.linalg.qr(one)[0] + 0.03 * two / width**0.5).contiguous()


def heavy_tailed(rows: int, width: int) -> Tensor:
    """Like a residual stream: one coordinate at 1e3, a first token now and then, scales of their own."""
    data = torch.randn(rows, width) * torch.exp(torch.randn(rows, 1)) + 5 * torch.randn(width)
    data[:, 0] *= 1000
    data[::5] *= 30
    return data


def case(
    rows, widths: list[int], queries: int = 7, keys: int = 40
) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Queries, keys and neighbors drawn at random."""
    index = torch.randint(keys, (len(widths), queries))
    return rows(queries, sum(widths)), rows(keys, sum(widths)), index, widths


def assert_close(
    found: Objective,
    queries: Tensor,
    keys: Tensor,
    index: Tensor,
    widths: list[int],
    counted: Tensor | None = None,
    unit: float = 2e-7,
) -> None:
    """Every entry is within what fp32 may be off: by 2e-7 of what is added up for it, and by the direction of
    r, which is off by the rounding of the projection over the distance."""
    rotation = nearly_rotation(sum(widths))
    exact = objective.loss_and_gradient(
        queries.double(), keys, index, rotation.double(), widths, "euclidean", counted
    )
    assert [each.dtype for each in found] == [torch.float32] * 2
    delta = queries.double() - keys[index].double()
    reach = delta.norm(dim=2)
    assert bool(((found.by_subspace - exact.by_subspace).abs() <= 1.5 * unit * reach.mean(1)).all())
    parts = rotation.double().split(widths, dim=1)
    distance = torch.stack([(each @ part).norm(dim=1) for each, part in zip(delta, parts, strict=True)])
    slack = torch.where(distance > 0, 1 + reach / distance.clamp_min(1e-30), 0)
    allowed = unit * (delta.abs() * slack[..., None]).mean(1) / len(widths)
    error = (found.gradient - exact.gradient).abs()
    for one, limit in zip(error.split(widths, dim=1), allowed, strict=True):
        assert bool((one <= limit[:, None]).all())
