"""What only Triton's kernels have: products on the matrix units, tiles, pieces, parts of the depth."""

from __future__ import annotations

import pytest
import torch
from gradient_contract import assert_close, case, heavy_tailed, nearly_rotation
from torch import Tensor

from ndm_fast import ops
from ndm_fast.geometry import objective
from ndm_fast.geometry.objective import Objective

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("one_thread")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
UNITS = {"fp16x3": 1.6e-6, "tf32x3": 1.6e-6, "ieee": 2e-7}
"""What an entry may be off by, over what is added up for it: a card's matrix units may lose three bits."""


def find(data: tuple[Tensor, Tensor, Tensor, list[int]], **options: object) -> Objective:
    """What the kernels give, on the CPU."""
    from ndm_fast.kernels import gradient

    *rows, widths = data
    given = [each.to(DEVICE) for each in (*rows, nearly_rotation(sum(widths)))]
    return Objective(
        *(each.cpu() for each in gradient.loss_and_gradient(*given, widths, "euclidean", **options))
    )


def in_half(rows: int, width: int) -> Tensor:
    """Heavy-tailed, up to the ends of fp16, where differences leave its range."""
    data = heavy_tailed(rows, width)
    data[:, 1] = torch.randn(rows).sign() * 6e4
    return data.clamp(-6e4, 6e4).half()


@pytest.mark.parametrize("products", UNITS)
@pytest.mark.parametrize("widths", [[150, 33, 7, 1], [72, 72], [768]], ids=str)
@pytest.mark.parametrize("rows", [in_half, heavy_tailed], ids=["fp16", "fp32"])
def test_products(rows, widths: list[int], products: str) -> None:
    data = case(rows, widths, queries=5)
    assert_close(find(data, products=products), *data, unit=UNITS[products])


@pytest.mark.parametrize("products", UNITS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_nan_and_no_distance(dtype: torch.dtype, products: str) -> None:
    rows, keys, index, widths = case(torch.randn, [33, 16])
    rows, keys = rows.to(dtype), keys.to(dtype)
    index[:] = torch.arange(7)
    rows[:] = keys[:7]
    found = find((rows, keys, index, widths), products=products)
    assert not found.by_subspace.any()
    assert not found.gradient.any()
    keys[20, 5] = torch.nan
    index[1, 2] = 20
    found = find((rows, keys, index, widths), products=products)
    assert found.by_subspace.isnan().tolist() == [False, True]
    assert bool(found.gradient[5, 33:].isnan().all())
    assert not found.gradient[:, :33].any()


@pytest.mark.parametrize("products", UNITS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("floors", [[0.0, 0.0], [1e-3, 2.0]], ids=str)
def test_logarithms(dtype: torch.dtype, floors: list[float], products: str) -> None:
    rows, keys, index, widths = case(heavy_tailed, [33, 16], queries=33)
    rows, keys, floor = rows.clamp(-6e4, 6e4).to(dtype), keys.clamp(-6e4, 6e4).to(dtype), torch.tensor(floors)
    rows[3] = keys[index[0, 3]]
    counted = torch.rand(index.shape) < 0.7
    found = find(
        (rows, keys, index, widths), products=products, log_floor=floor.to(DEVICE), counted=counted.to(DEVICE)
    )
    exact = objective.loss_and_gradient(
        *(
            rows.double(),
            keys,
            index,
            nearly_rotation(49).double(),
            widths,
            "euclidean",
            counted,
            floor.double(),
        )
    )
    for one, two in zip(found, exact, strict=True):
        assert float((one - two).abs().max()) <= 2e-5 * float(two.abs().max())


def test_small_numbers_in_half_precision() -> None:
    """Differences of fp16 rows are good to 2^-24, whatever the rows' scale."""
    rows, keys, index, widths = case(torch.randn, [72], queries=33)
    rows, keys = (1e-4 * rows).half(), (1e-4 * keys).half()
    found = find((rows, keys, index, widths)).gradient
    exact = objective.loss_and_gradient(
        *(rows.double(), keys, index, nearly_rotation(72).double(), widths, "euclidean")
    ).gradient
    assert float((found - exact).abs().max()) <= 2**-24


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
def test_a_rotation_that_fp16_cannot_hold_shows() -> None:
    rows, keys, index, widths = case(torch.randn, [33])
    from ndm_fast.kernels import gradient

    given = [each.to(DEVICE) for each in (rows, keys, index, 1100 * torch.eye(33))]
    found = gradient.loss_and_gradient(*given, widths, "euclidean", products="fp16x3")
    assert bool(found.by_subspace.isnan().all())


def test_shape_of_the_tiles_does_not_matter() -> None:
    from ndm_fast.kernels import gradient_tuning

    data = case(heavy_tailed, [72, 33], queries=140)
    for shape in [*gradient_tuning.CANDIDATES[::3], gradient_tuning.shape_of(90, "ieee")]:
        assert_close(find(data, shape=shape), *data, unit=UNITS["fp16x3"])


def test_neighbors_that_do_not_count_are_not_read() -> None:
    rows, keys, index, widths = case(heavy_tailed, [33, 16, 16])
    counted = (torch.rand(index.shape) < 0.5).to(DEVICE)
    data = [each.to(DEVICE) for each in (rows, keys, index, nearly_rotation(65))]
    found = ops.loss_and_gradient(*data, widths, counted=counted, backend="triton")
    data[2][~counted] = 1 << 40
    again = ops.loss_and_gradient(*data, widths, counted=counted, backend="triton", check_index=False)
    assert torch.equal(again.gradient, found.gradient)
