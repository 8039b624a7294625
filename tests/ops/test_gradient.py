"""The contract of loss and gradient for given neighbors, on every backend, against fp64 torch."""

from __future__ import annotations

import pytest
import torch
from gradient_contract import assert_close, case, heavy_tailed, nearly_rotation
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_backend import Backend
from torch import Tensor

from ndm_fast import ops
from ndm_fast.errors import InputError
from ndm_fast.geometry import objective
from ndm_fast.geometry.objective import Objective
from ndm_fast.ops.cpu import extension

pytestmark = pytest.mark.usefixtures("one_thread")

TYPES = (torch.float32, torch.float16, torch.bfloat16)


def find(
    backend: Backend,
    queries: Tensor,
    keys: Tensor,
    index: Tensor,
    rotation: Tensor,
    widths: list[int],
    metric: str = "euclidean",
    counted: Tensor | None = None,
) -> Objective:
    """What the backend gives, on the CPU."""
    data = backend.on(queries, keys, index, rotation)
    here = None if counted is None else counted.to(backend.device)
    found = ops.loss_and_gradient(*data, widths, metric, here, backend=backend.name)
    return Objective(*(each.cpu() for each in found))


def check(
    backend: Backend,
    queries: Tensor,
    keys: Tensor,
    index: Tensor,
    widths: list[int],
    counted: Tensor | None = None,
) -> Objective:
    found = find(backend, queries, keys, index, nearly_rotation(sum(widths)), widths, counted=counted)
    unit = 2e-7 if backend.device == "cpu" else 1.6e-6  # products on a card's matrix units
    assert_close(found, queries, keys, index, widths, counted, unit)
    return found


@pytest.mark.parametrize("queries", [1, 7, 33, 70])
@pytest.mark.parametrize("rows", [torch.randn, heavy_tailed], ids=["normal", "heavy-tailed"])
def test_matches_fp64(backend: Backend, rows, queries: int) -> None:
    check(backend, *case(rows, [32, 32, 32], queries))


@pytest.mark.parametrize(
    "widths", [[1], [33, 7, 1], [72, 72], [7, 33], [150, 16, 16, 1], [64, 64, 20]], ids=str
)
def test_any_widths(backend: Backend, widths: list[int]) -> None:
    check(backend, *case(heavy_tailed, widths))


@pytest.mark.parametrize("queries", TYPES, ids=str)
@pytest.mark.parametrize("keys", TYPES, ids=str)
def test_any_types(backend: Backend, queries: torch.dtype, keys: torch.dtype) -> None:
    rows, others, index, widths = case(torch.randn, [33, 16])
    check(backend, rows.to(queries), others.to(keys), index, widths)


@given(
    widths=st.lists(st.integers(1, 75), min_size=1, max_size=5),
    queries=st.integers(1, 140),
    dtype=st.sampled_from(TYPES),
    seed=st.integers(0, 99),
    masked=st.booleans(),
)
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_shapes(
    backend: Backend, widths: list[int], queries: int, dtype: torch.dtype, seed: int, masked: bool
) -> None:
    torch.manual_seed(seed)
    widths, queries = widths[: backend.few(5, 2)], min(queries, backend.few(140, 20))
    q, k = (torch.randn(n, sum(widths)).to(dtype) for n in (queries, 50))
    index = torch.randint(50, (len(widths), queries))
    counted = torch.rand(index.shape) > 0.3 if masked else None
    check(backend, q, k, index, widths, counted)


def test_rows_may_be_strided(backend: Backend) -> None:
    rows, keys, index, widths = case(heavy_tailed, [33, 16], queries=14)
    spread = torch.full((2 * len(keys), 60), torch.nan, dtype=torch.bfloat16)
    spread[::2, 5:54] = keys.bfloat16()
    half = index[:, :7]
    found = check(backend, rows[::2], spread[::2, 5:54], half, widths)
    again = check(backend, rows[::2].clone(), keys.bfloat16(), half.T.contiguous().T, widths)
    assert torch.equal(found.gradient, again.gradient)


def test_takes_slices_of_index_and_counted(backend: Backend) -> None:
    q, k = torch.randn(60, 48)[::2, :24], torch.randn(80, 48)[1::2, 24:]
    index = torch.randint(40, (3, 90))[:, 30:60]
    check(backend, q, k, index, [10, 8, 6], torch.rand(3, 90)[:, 30:60] > 0.5)


def test_only_neighbors_that_count_contribute(backend: Backend) -> None:
    rows, keys, index, widths = case(heavy_tailed, [33, 16, 16])
    counted = torch.rand(index.shape) < 0.5
    counted[1] = False
    found = check(backend, rows, keys, index, widths, counted)
    assert not found.by_subspace[1].any()
    assert not found.gradient[:, 33:49].any()
    moved = torch.where(counted, index, (index + 1) % 40)
    again = find(backend, rows, keys, moved, nearly_rotation(65), widths, counted=counted)
    assert torch.equal(again.gradient, found.gradient)


def test_a_query_equal_to_its_neighbor_has_no_gradient(backend: Backend) -> None:
    _, keys, index, widths = case(heavy_tailed, [33, 16])
    index[:] = torch.arange(7)
    found = check(backend, keys[:7].clone(), keys, index, widths)
    assert not found.by_subspace.any()
    assert not found.gradient.any()
    index[:, 3:] = 20
    assert check(backend, keys[:7].clone(), keys, index, widths).gradient.isfinite().all()


def test_nan_stays_nan(backend: Backend) -> None:
    rows, keys, index, widths = case(torch.randn, [33, 16])
    keys[index[1, 2], 5] = torch.nan
    index[0] = torch.where(index[0] == index[1, 2], (index[1, 2] + 1) % 40, index[0])
    rotation = nearly_rotation(49)
    found = find(backend, rows, keys, index, rotation, widths)
    expected = objective.loss_and_gradient(rows, keys, index, rotation, widths, "euclidean")
    assert torch.equal(found.by_subspace.isnan(), expected.by_subspace.isnan())
    assert found.by_subspace.isnan().tolist() == [False, True]
    assert bool(found.gradient[5, 33:].isnan().all())
    assert not found.gradient[:, :33].isnan().any()


def test_cosine_is_the_torch_code(backend: Backend) -> None:
    rows, keys, index, widths = case(torch.randn, [33, 16])
    counted = torch.rand(index.shape) < 0.5
    for here in (None, counted):
        found = find(backend, rows, keys, index, nearly_rotation(49), widths, "cosine", here)
        arguments = (rows, keys, index, nearly_rotation(49), widths, "cosine", here)
        for one, two in zip(found, objective.loss_and_gradient(*arguments), strict=True):
            torch.testing.assert_close(one, two)


def test_writes_every_output(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs start as NaN; none may survive."""
    for name in ("empty", "empty_like"):
        made = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, made=made, **k: made(*a, **k).fill_(torch.nan))
    check(backend, *case(torch.randn, [33, 7, 1], queries=33))


@pytest.mark.parametrize("row", [-(2**63), -1, 64, 70, 100_000, 10**9, 2**62])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_a_row_that_is_not_there_is_refused(backend: Backend, metric: str, row: int) -> None:
    index = torch.zeros(2, 4, dtype=torch.int64)
    index[1, 2] = row
    with pytest.raises(InputError, match=f"index names row {row} of 64 keys"):
        find(backend, torch.randn(4, 8), torch.randn(64, 8), index, torch.eye(8), [5, 3], metric)


def test_the_index_is_read_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a step on a GPU does not wait."""
    given = (
        torch.randn(4, 8),
        torch.randn(64, 8),
        torch.zeros(2, 4, dtype=torch.int64),
        torch.eye(8),
        [5, 3],
    )
    monkeypatch.setattr(torch, "aminmax", None)
    ops.loss_and_gradient(*given, backend="reference", check_index=False)
    with pytest.raises(TypeError):
        ops.loss_and_gradient(*given, backend="reference")


@pytest.mark.skipif(not extension.available(), reason=str(extension.why_unavailable()))
def test_the_compiled_op_looks_at_the_index_itself() -> None:
    index = torch.full((2, 4), 64)
    with pytest.raises(ValueError, match="row 64 of 64"):
        ops.loss_and_gradient(
            *(torch.randn(4, 8), torch.randn(64, 8), index, torch.eye(8), [5, 3]),
            backend="cpu",
            check_index=False,
        )


def test_does_not_depend_on_the_number_of_threads(isa: str) -> None:
    q, k, rotation = torch.randn(70, 60), torch.randn(90, 60), nearly_rotation(60)
    index = torch.randint(90, (5, 70))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(ops.loss_and_gradient(q, k, index, rotation, [12] * 5, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert torch.equal(other.gradient, found[0].gradient)
        assert torch.equal(other.by_subspace, found[0].by_subspace)
