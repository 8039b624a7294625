"""Every public op is one graph of ``torch.compile``, its checks included, and says the same errors there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle_inputs import rotation_of
from torch import Tensor

from ndm_fast import ops
from ndm_fast.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_compiler")

WIDTHS = [5, 3]


@pytest.fixture
def fresh_compiler() -> None:
    torch.compiler.reset()


def rows(queries: int = 6, keys: int = 40) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(queries)
    drawn = torch.randn(queries + keys, 8, generator=generator)
    torch.manual_seed(0)
    return {"queries": drawn[:queries], "keys": drawn[queries:], "rotation": rotation_of(8)}


def pairwise() -> dict[str, Tensor]:
    return {"variances": torch.tensor([5.0, 3.0]), "pairs": torch.tensor([[0, 1]])}


def moments() -> dict[str, Tensor]:
    return {"product": rows()["rotation"], "first": torch.zeros(8, 8), "second": torch.ones(8, 8)}


def neighbors(queries: int) -> dict[str, Tensor]:
    return {
        "index": torch.arange(2 * queries).view(2, -1),
        "counted": torch.arange(2 * queries).view(2, -1) > 2,
    }


def of_rows(op: Callable[..., Any], more: Callable[[int], dict[str, Any]]) -> tuple[Any, Any]:
    return (lambda **given: op(**given, widths=WIDTHS)), lambda queries: {**rows(queries), **more(queries)}


def update(**given: Any) -> Any:
    return ops.lie_update(**given, betas=(0.9, 0.999)), given["first"], given["second"]


CASES: dict[str, tuple[Callable[..., Any], Callable[[int], dict[str, Any]]]] = {
    "nearest_neighbors": of_rows(ops.nearest_neighbors, lambda queries: {}),
    "k_nearest_neighbors": of_rows(
        ops.k_nearest_neighbors, lambda queries: {"k": 3, "exclude": torch.arange(queries)}
    ),
    "nearest_index": of_rows(ops.nearest_index, lambda queries: {}),
    "loss_and_gradient": of_rows(ops.loss_and_gradient, neighbors),
    "ksg_radius": of_rows(ops.ksg_radius, lambda queries: pairwise()),
    "ksg_counts": of_rows(ops.ksg_counts, lambda queries: {**pairwise(), "radius": torch.ones(1, queries)}),
    "ksg_radius_and_counts": of_rows(ops.ksg_radius_and_counts, lambda queries: pairwise()),
    "lie_update": (update, lambda queries: {**moments(), "scale": 1e-3, "guard": 1e-8}),
    "lie_update, factors on the device": (
        update,
        lambda queries: {**moments(), "scale": torch.tensor(1e-3), "guard": torch.tensor(1e-8)},
    ),
}


def test_every_public_op_is_here() -> None:
    assert {name.partition(",")[0] for name in CASES} == set(ops.__all__)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", CASES)
def test_is_one_graph(name: str, dynamic: bool) -> None:
    op, case = CASES[name]
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for queries in (6, 9):  # the second shape is traced anew, or is the same graph where sizes are dynamic
        torch.testing.assert_close(compiled(**case(queries)), op(**case(queries)))


@pytest.mark.parametrize("name", ["nearest_neighbors", "k_nearest_neighbors"])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_gradients_are_in_the_graph(name: str, metric: str, dynamic: bool) -> None:
    op, case = CASES[name]

    def loss(**given: Any) -> Tensor:
        return op(**given, metric=metric).distance.mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for queries in (6, 9):
        found = []
        for run in (loss, compiled):
            given = case(queries)
            inputs = [given[each].requires_grad_() for each in ("queries", "keys", "rotation")]
            found.append(torch.autograd.grad(run(**given), inputs))
        torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("nearest_neighbors", {"keys": torch.full((3, 8), torch.nan)}, "keys holds NaN or Inf"),
        ("k_nearest_neighbors", {"exclude": torch.full((6,), 40)}, "exclude names row 40 of 40 keys"),
        ("loss_and_gradient", {"index": torch.full((2, 6), 40)}, "index names row 40 of 40 keys"),
        ("ksg_radius", {"pairs": torch.tensor([[0, 2]])}, "pairs name subspaces outside"),
        ("ksg_counts", {"variances": torch.tensor([1.0, -1.0])}, "variances hold one below 0"),
    ],
)
def test_values_are_checked_in_the_graph(name: str, change: dict[str, Tensor], words: str) -> None:
    """Where tracing sees no values: by the op itself."""
    op, case = CASES[name]
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    for _ in range(2):  # traced, and from the cache
        with pytest.raises(InputError, match=words):
            compiled(**{**case(6), **change})
