"""Triton kernels of the training step against fp64 torch: on a GPU, else through Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ndm_fast.errors import InputError
from ndm_fast.geometry import objective
from ndm_fast.geometry.objective import Objective
from ndm_fast.kernels import gradient, lie_update
from ndm_fast.ops import backends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.skipif(not backends.has_triton_installed(), reason="triton is not installed"),
    pytest.mark.usefixtures("one_thread"),
]
TYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def nearly_rotation(width: int) -> Tensor:
    """[d, d] a few percent off orthogonal, as between the repairs of the lazy rotation; always the same."""
    one, two = torch.randn(2, width, width, generator=torch.Generator().manual_seed(width))
    return torch.linalg.qr(one)[0] + 0.03 * two / width**0.5


def heavy_tailed(rows: int, width: int) -> Tensor:
    """Like a residual stream: one coordinate at 1e3, a first token now and then, scales of their own."""
    data = torch.randn(rows, width) * torch.exp(torch.randn(rows, 1)) + 5 * torch.randn(width)
    data[:, 0] *= 1000
    data[::5] *= 30
    return data


def check(
    queries: Tensor,
    keys: Tensor,
    index: Tensor,
    widths: list[int],
    counted: Tensor | None = None,
    **options,
) -> Objective:
    """Every entry within what fp32 may be off: by 2e-7 of what is added up for it, and by the direction of r,
    which is off by the rounding of the projection over the distance. tf32x3 has three bits less."""
    unit = 1.6e-6 if "products" in options else 2e-7
    rotation = nearly_rotation(sum(widths))
    data = [rows.to(DEVICE) for rows in (queries, keys, index, rotation)]
    here = None if counted is None else counted.to(DEVICE)
    found = gradient.loss_and_gradient(*data, widths, "euclidean", here, **options)
    found = Objective(*(each.cpu() for each in found))
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
    return found


def case(
    rows, widths: list[int], queries: int = 7, keys: int = 40
) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Queries, keys and neighbors drawn at random."""
    index = torch.randint(keys, (len(widths), queries))
    return rows(queries, sum(widths)), rows(keys, sum(widths)), index, widths


@pytest.mark.parametrize("queries", [1, 7, 33, 70])
@pytest.mark.parametrize("rows", [torch.randn, heavy_tailed], ids=["normal", "heavy-tailed"])
def test_matches_fp64(rows, queries: int) -> None:
    check(*case(rows, [32, 32, 32], queries))


@pytest.mark.parametrize(
    "widths", [[1], [33, 7, 1], [72, 72], [7, 33], [150, 16, 16, 1], [64, 64, 20]], ids=str
)
def test_any_widths(widths: list[int]) -> None:
    check(*case(heavy_tailed, widths))


@pytest.mark.parametrize("queries", TYPES, ids=str)
@pytest.mark.parametrize("keys", TYPES, ids=str)
def test_any_types(queries: torch.dtype, keys: torch.dtype) -> None:
    rows, others, index, widths = case(torch.randn, [33, 16])
    check(rows.to(queries), others.to(keys), index, widths)


def test_rows_may_be_strided() -> None:
    rows, keys, index, widths = case(heavy_tailed, [33, 16], queries=14)
    spread = torch.full((2 * len(keys), 60), torch.nan, dtype=torch.bfloat16)
    spread[::2, 5:54] = keys.bfloat16()
    half = index[:, :7]
    found = check(rows[::2], spread[::2, 5:54], half, widths)
    again = check(rows[::2].clone(), keys.bfloat16(), half.T.contiguous().T, widths)
    assert torch.equal(found.gradient, again.gradient)


def test_products_on_the_matrix_units() -> None:
    check(*case(heavy_tailed, [33, 16]), products="tf32x3")


def test_shape_does_not_matter() -> None:
    from ndm_fast.kernels import tuning

    data = case(heavy_tailed, [72, 33], queries=70)
    for shape in tuning.GRADIENT_CANDIDATES[::3]:
        check(*data, shape=shape)


def test_only_neighbors_that_count_contribute() -> None:
    rows, keys, index, widths = case(heavy_tailed, [33, 16, 16])
    counted = torch.rand(index.shape) < 0.5
    counted[1] = False
    found = check(rows, keys, index, widths, counted)
    assert not found.by_subspace[1].any()
    assert not found.gradient[:, 33:49].any()
    # Numbers of rows that another rank has may lie outside of the keys here.
    index[~counted] = 1 << 40
    data = [each.to(DEVICE) for each in (rows, keys, index, nearly_rotation(65))]
    again = gradient.loss_and_gradient(*data, widths, "euclidean", counted.to(DEVICE))
    assert torch.equal(again.gradient.cpu(), found.gradient)


def test_a_query_equal_to_its_neighbor_has_no_gradient() -> None:
    _, keys, index, widths = case(heavy_tailed, [33, 16])
    index[:] = torch.arange(7)
    found = check(keys[:7].clone(), keys, index, widths)
    assert not found.by_subspace.any()
    assert not found.gradient.any()
    index[:, 3:] = 20
    check(keys[:7].clone(), keys, index, widths)


def test_nan_stays_nan() -> None:
    rows, keys, index, widths = case(torch.randn, [33, 16])
    keys[index[1, 2], 5] = torch.nan
    index[0] = torch.where(index[0] == index[1, 2], (index[1, 2] + 1) % 40, index[0])
    rotation = nearly_rotation(49)
    found = gradient.loss_and_gradient(
        *(each.to(DEVICE) for each in (rows, keys, index, rotation)), widths, "euclidean"
    )
    expected = objective.loss_and_gradient(rows, keys, index, rotation, widths, "euclidean")
    for one, two in zip(found, expected, strict=True):
        assert torch.equal(one.isnan().cpu(), two.isnan())
    assert found.by_subspace.isnan().tolist() == [False, True]
    assert bool(found.gradient[5, 33:].isnan().all())


def test_cosine_is_the_torch_code() -> None:
    rows, keys, index, widths = case(torch.randn, [33, 16])
    arguments = (rows, keys, index, nearly_rotation(49), widths, "cosine")
    for one, two in zip(
        gradient.loss_and_gradient(*arguments), objective.loss_and_gradient(*arguments), strict=True
    ):
        assert torch.equal(one, two)


def test_writes_every_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs start as NaN; none may survive."""
    for name in ("empty", "empty_like"):
        made = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, made=made, **k: made(*a, **k).fill_(torch.nan))
    check(*case(torch.randn, [33, 7, 1], queries=33))
    update = lie_update.lie_update(*moments(33), 0.9, 0.999)
    assert bool(update.isfinite().all())


def moments(width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A product, moments such as earlier steps leave, and factors."""
    product, first, second = torch.randn(3, width, width, device=DEVICE) * 1e-3
    first, second = first - first.T, (second * second.T) ** 2
    return product, first, second, torch.tensor([3e-3, 1e-7], device=DEVICE)


def update_of(first: Tensor, second: Tensor, factors: Tensor) -> Tensor:
    """[d, d] fp64."""
    scale, guard = factors.double()
    return -scale * first.double() / (second.double().sqrt() + guard)


@pytest.mark.parametrize("width", [1, 7, 33, 72, 100])
@pytest.mark.parametrize("half", [False, pytest.param(True, id="bf16")])
def test_update_matches_fp64(width: int, half: bool) -> None:
    product, first, second, factors = moments(width)
    product[0] *= 1e3
    tangent = (product - product.T).double()
    moment, square = 0.9 * first.double() + 0.1 * tangent, 0.999 * second.double() + 0.001 * tangent**2
    update = lie_update.lie_update(product, first, second, factors, 0.9, 0.999, half)
    assert update.dtype == (torch.bfloat16 if half else torch.float32)
    # The two terms of the first moment may cancel.
    torch.testing.assert_close(first.double(), moment, rtol=1e-6, atol=1e-7 * float(tangent.abs().max()))
    torch.testing.assert_close(second.double(), square, rtol=1e-6, atol=0)
    # bf16 keeps 8 bits, of which Triton's interpreter truncates.
    expected = update_of(first, second, factors)
    torch.testing.assert_close(update.double(), expected, rtol=8e-3 if half else 1e-6, atol=0)
    for skew in (update, first):
        assert torch.equal(skew, -skew.T)
    assert torch.equal(second, second.T)


def test_update_takes_a_product_in_bf16() -> None:
    product, *rest = moments(40)
    other = [each.clone() for each in rest]
    given = lie_update.lie_update(product.bfloat16(), *rest, 0.9, 0.999)
    assert torch.equal(given, lie_update.lie_update(product.bfloat16().float(), *other, 0.9, 0.999))


def test_factors_may_be_numbers_or_single_elements() -> None:
    product, first, second, factors = moments(40)
    given = [
        lie_update.lie_update(product, first.clone(), second.clone(), each, 0.9, 0.999)
        for each in (factors, factors.unbind(), tuple(factors.tolist()))
    ]
    assert torch.equal(given[0], given[1])
    assert torch.equal(given[0], given[2])


def test_without_a_product_the_moments_stay() -> None:
    _, first, second, factors = moments(40)
    before = first.clone(), second.clone()
    update = lie_update.lie_update(None, first, second, factors, 0.9, 0.999)
    assert torch.equal(first, before[0])
    assert torch.equal(second, before[1])
    torch.testing.assert_close(update.double(), update_of(first, second, factors), rtol=1e-6, atol=0)


def test_update_keeps_nan() -> None:
    product, first, second, factors = moments(40)
    product[3, 35] = torch.nan
    update = lie_update.lie_update(product, first, second, factors, 0.9, 0.999)
    assert update.isnan().nonzero().tolist() == [[3, 35], [35, 3]]


def test_update_refuses_moments_it_cannot_change() -> None:
    product, first, second, factors = moments(8)
    with pytest.raises(InputError, match="first is changed in place"):
        lie_update.lie_update(product, first.T, second, factors, 0.9, 0.999)
    with pytest.raises(InputError, match="second is changed in place"):
        lie_update.lie_update(product, first, second.double(), factors, 0.9, 0.999)
