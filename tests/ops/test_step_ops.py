"""Gradient and update of a step: the compiled ops against fp64, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ndm_fast import ops
from ndm_fast.errors import InputError
from ndm_fast.geometry import objective, reference
from ndm_fast.geometry.orthogonal import random_rotation
from ndm_fast.ops import gradient, nearest
from ndm_fast.ops.cpu import extension

compiled = pytest.mark.skipif(not extension.available(), reason=str(extension.why_unavailable()))
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BETAS = (0.9, 0.999)


def _rows(count: int, width: int, generator: torch.Generator, heavy: bool = False) -> Tensor:
    rows = torch.randn(count, width, generator=generator)
    if heavy:
        rows[:, 0] *= 1000
        rows[::7] *= 30
    return rows


def _check_gradient(
    queries: Tensor, keys: Tensor, index: Tensor, widths: list[int], counted: Tensor | None = None
) -> objective.Objective:
    generator = torch.Generator().manual_seed(len(widths))
    rotation = random_rotation(sum(widths), generator)
    found = ops.loss_and_gradient(queries, keys, index, rotation, widths, counted=counted, backend="cpu")
    exact = objective.loss_and_gradient(queries, keys, index, rotation.double(), widths, "euclidean", counted)
    torch.testing.assert_close(found.by_subspace.double(), exact.by_subspace, rtol=1e-5, atol=1e-7)
    # Every entry is a sum over queries whose terms are bounded by the differences.
    largest = (queries.float() - keys[index].float()).abs().amax()
    assert (found.gradient - exact.gradient).abs().max() <= 1e-5 * largest / len(widths)
    return found


@compiled
@given(
    widths=st.lists(st.integers(1, 75), min_size=1, max_size=5),
    queries=st.integers(1, 140),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
    masked=st.booleans(),
)
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_gradient_of_random_shapes(
    isa: str, widths: list[int], queries: int, dtype: torch.dtype, seed: int, masked: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k = (_rows(n, sum(widths), generator).to(dtype) for n in (queries, 50))
    index = torch.randint(50, (len(widths), queries), generator=generator)
    counted = torch.rand(index.shape, generator=generator) > 0.3 if masked else None
    _check_gradient(q, k, index, widths, counted)


@compiled
def test_gradient_of_a_heavy_tailed_stream_with_ties(isa: str) -> None:
    widths, generator = [33, 16, 7], torch.Generator().manual_seed(1)
    q, k = _rows(130, 56, generator, heavy=True), _rows(300, 56, generator, heavy=True)
    k[:20] = q[:20]  # distance zero
    index = torch.randint(300, (3, 130), generator=generator)
    index[:, :20] = torch.arange(20)
    assert _check_gradient(q, k, index, widths).gradient.isfinite().all()


@compiled
def test_gradient_takes_strided_rows_and_slices(isa: str) -> None:
    generator = torch.Generator().manual_seed(2)
    q, k = _rows(60, 48, generator)[::2, :24], _rows(80, 48, generator)[1::2, 24:]
    index = torch.randint(40, (3, 90), generator=generator)[:, 30:60]
    _check_gradient(q, k, index, [10, 8, 6], torch.rand(3, 90, generator=generator)[:, 30:60] > 0.5)


@compiled
def test_gradient_does_not_depend_on_the_number_of_threads(isa: str) -> None:
    generator = torch.Generator().manual_seed(3)
    q, k, rotation = _rows(70, 60, generator), _rows(90, 60, generator), random_rotation(60, generator)
    index = torch.randint(90, (5, 70), generator=generator)
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


@compiled
def test_nan_stays_nan(isa: str) -> None:
    generator = torch.Generator().manual_seed(4)
    q, k, rotation = _rows(9, 8, generator), _rows(9, 8, generator), random_rotation(8, generator)
    q[3, 2] = torch.nan
    found = ops.loss_and_gradient(q, k, torch.zeros(2, 9, dtype=torch.int64), rotation, [5, 3])
    assert found.by_subspace.isnan().all()
    assert found.gradient.isnan().any()


@compiled
def test_gradient_refuses_what_would_read_outside() -> None:
    q = torch.randn(4, 6)
    rotation, index = torch.eye(6), torch.zeros(2, 4, dtype=torch.int64)

    def refused(message: str, **changed: Tensor) -> None:
        given = {"queries": q, "keys": q, "index": index, "rotation": rotation, **changed}
        with pytest.raises(ValueError, match=message):
            ops.loss_and_gradient(**given, widths=[4, 2], backend="cpu")

    refused("row 4 of 4", index=index + 4)
    refused("row -1 of 4", index=index - 1)
    refused("index is", index=index[:, :3])
    refused("index is", index=index.int())
    refused("counted is", counted=torch.ones(2, 3, dtype=torch.bool))
    refused("keys has shape", keys=q[:, :5])
    refused("keys has no rows", keys=q[:0])
    refused("queries has no rows", queries=q[:0], index=index[:, :0])


@compiled
@pytest.mark.parametrize("width", [1, 7, 16, 63, 64, 100, 130])
def test_update_is_adams_and_skew(isa: str, width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    first, second = torch.zeros(width, width), torch.zeros(width, width)
    exact = [first.double(), second.double()]
    for product in torch.randn(3, width, width, generator=generator) * 100:
        arguments = (1e-3, 1e-8, BETAS)
        update = ops.lie_update(product, first, second, *arguments, backend="cpu")
        expected = reference.lie_update(product.double(), *exact, *arguments)
        torch.testing.assert_close(update.double(), expected, rtol=1e-4, atol=1e-8)
        torch.testing.assert_close(first.double(), exact[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(second.double(), exact[1], rtol=1e-5, atol=1e-5)
        assert torch.equal(update, -update.T)
    again = ops.lie_update(None, first, second, *arguments, backend="cpu")
    assert torch.equal(again, update)
    half = ops.lie_update(None, first, second, *arguments, half=True, backend="cpu")
    assert torch.equal(half, update.bfloat16())


@compiled
def test_update_keeps_nan_and_refuses_other_layouts(isa: str) -> None:
    first, second = torch.zeros(20, 20), torch.zeros(20, 20)
    product = torch.randn(20, 20)
    product[3, 4] = torch.nan
    update = ops.lie_update(product, first, second, 1e-3, 1e-8, BETAS, half=True)
    assert update.isnan().sum() == 2
    for wrong in (first.double(), torch.zeros(20, 40)[:, ::2], torch.zeros(20, 19), torch.zeros(0, 0)):
        with pytest.raises(ValueError, match="give"):
            ops.lie_update(None, wrong, second, 1e-3, 1e-8, BETAS, backend="cpu")


def test_without_a_compiled_backend_the_torch_code_runs() -> None:
    generator = torch.Generator().manual_seed(5)
    q, k, rotation = _rows(9, 8, generator), _rows(9, 8, generator), random_rotation(8, generator)
    index = torch.randint(9, (2, 9), generator=generator)
    for metric in ("euclidean", "cosine"):
        found = ops.loss_and_gradient(q, k, index, rotation, [5, 3], metric, backend="reference")
        expected = objective.loss_and_gradient(q, k, index, rotation, [5, 3], metric)
        assert torch.equal(found.gradient, expected.gradient)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("backend", ["reference", "triton", pytest.param("cpu", marks=compiled)])
def test_neighbors_without_distances(backend: str, metric: str, precision: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    generator = torch.Generator().manual_seed(7)
    rows, rotation = _rows(140, 24, generator).half(), random_rotation(24, generator)
    given = (rows[:9], rows[9:], rotation, [17, 7])
    index = ops.nearest_index(*given, metric, precision, backend=backend)
    oracle = reference.nearest_neighbors(*given, metric=metric).distance
    true = reference.distance_to(*given, index, metric=metric)
    assert bool((true <= oracle * (1 + (1e-2 if precision == "bf16" else 1e-4))).all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": "dot"}, "take euclidean or cosine"),
        ({"precision": "fp8"}, "take fp32 or bf16"),
        ({"widths": [5, 4]}, "the widths sum to 9"),
        ({"keys": torch.zeros(0, 8)}, "keys has no rows"),
    ],
    ids=str,
)
def test_neighbors_refuse_by_name(change: dict[str, object], message: str) -> None:
    given = {
        "queries": torch.ones(2, 8),
        "keys": torch.ones(3, 8),
        "rotation": torch.eye(8),
        "widths": [5, 3],
    }
    with pytest.raises(InputError, match=message):
        ops.nearest_index(**{**given, **change})


@pytest.mark.parametrize("half", [False, True])
def test_triton_runs_where_it_is_named(half: bool) -> None:
    pytest.importorskip("triton")
    generator = torch.Generator().manual_seed(6)
    q, k, rotation = _rows(9, 8, generator), _rows(9, 8, generator), random_rotation(8, generator)
    index = torch.randint(9, (2, 9), generator=generator)
    found = ops.loss_and_gradient(q, k, index, rotation, [5, 3], backend="triton")
    expected = objective.loss_and_gradient(q, k, index, rotation, [5, 3], "euclidean")
    torch.testing.assert_close(found.gradient, expected.gradient, rtol=1e-4, atol=1e-6)
    product, factors = torch.randn(8, 8, generator=generator), torch.tensor([1e-3, 1e-8])
    for scale, guard in (factors.tolist(), factors):
        moments, same = torch.zeros(2, 8, 8), torch.zeros(2, 8, 8)
        update = ops.lie_update(product, *moments, scale, guard, BETAS, half=half, backend="triton")
        plain = ops.lie_update(product, *same, scale, guard, BETAS, half=half, backend="reference")
        torch.testing.assert_close(update.float(), plain.float(), rtol=1e-2 if half else 1e-4, atol=1e-9)
        torch.testing.assert_close(moments, same)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=compiled)])
def test_library_ops_pass_opcheck(backend: str) -> None:
    q, index = torch.randn(9, 8), torch.zeros(2, 9, dtype=torch.int64)
    torch.library.opcheck(
        gradient._loss_and_gradient, (q, q, index, torch.eye(8), [5, 3], "euclidean", None, backend)
    )
    torch.library.opcheck(nearest._nearest_index, (q, q, torch.eye(8), [5, 3], "euclidean", "fp32", backend))
    moments = torch.zeros(8, 8), torch.ones(8, 8)
    for product, half in ((torch.randn(8, 8), False), (None, True)):
        torch.library.opcheck(
            torch.ops.ndm_fast.lie_update.default, (product, *moments, 1e-3, 1e-8, list(BETAS), half, backend)
        )
