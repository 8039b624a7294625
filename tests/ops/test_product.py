"""The compiled fp32 product against fp64, on every instruction set, and what calls it against torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ndm_fast.geometry import centring
from ndm_fast.ops import product as dispatch
from ndm_fast.ops.cpu import extension
from ndm_fast.ops.cpu import product as compiled

pytestmark = pytest.mark.skipif(not extension.available(), reason="the extension is not built")

SHAPES = [(1, 1, 1), (5, 3, 7), (12, 192, 32), (13, 193, 33), (100, 400, 72), (1, 577, 130), (250, 7, 300)]
"""Rows, depth, columns: blocks of 12 rows, slabs of 192, panels of 32, and one more or less."""


def within(found: Tensor, exact: Tensor, size: Tensor, depth: int) -> None:
    """Each entry is off by a share of the sum of what was added up, 2^-24 for each addition at most."""
    assert found.dtype == torch.float32
    excess = (found.double() - exact).abs() - (depth + 4) * 2.0**-24 * size
    assert float(excess.max()) <= 0


@pytest.mark.parametrize(("rows", "depth", "columns"), SHAPES)
@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16])
def test_centred_rows(isa: str, rows: int, depth: int, columns: int, kind: torch.dtype) -> None:
    wide = torch.randn(rows, depth + 3)
    wide[::5] *= 300
    left, right, origin = (
        wide.to(kind)[:, 1 : depth + 1],
        torch.randn(columns + 2, depth + 1).T,
        torch.randn(depth),
    )
    right = right[1:, :columns].contiguous()
    norms = torch.empty(rows)
    found = compiled.product(left, right, origin=origin, norms=norms)
    centred = left.double() - origin.double()
    size = (left.double().abs() + origin.double().abs()) @ right.double().abs()
    within(found, centred @ right.double(), size, depth)
    torch.testing.assert_close(norms.double(), centred.norm(dim=1), rtol=2e-6, atol=1e-6)
    within(compiled.product(left, right), left.double() @ right.double(), size, depth)


@pytest.mark.parametrize(("rows", "depth", "columns"), SHAPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_added_to_a_base(isa: str, rows: int, depth: int, columns: int, transposed: bool) -> None:
    given, right, base = torch.randn(depth, rows), torch.randn(depth, columns), torch.randn(rows, columns)
    left = given if transposed else given.T.contiguous()
    how: dict[str, Any] = {"transposed": transposed, "scale": -0.5}
    exact = -0.5 * given.T.double() @ right.double()
    size = given.T.double().abs() @ right.double().abs() + 2 * base.double().abs()
    within(compiled.product(left, right, **how), exact, size, depth)
    found = compiled.product(left, right, base=base, factor=1.5, **how)
    within(found, exact + 1.5 * base.double(), size, depth)


def test_strided_factors(isa: str) -> None:
    left, right = torch.randn(70, 90)[:, 5:85], torch.randn(80, 120)[:, 20:90]
    assert torch.equal(compiled.product(left, right), compiled.product(left.contiguous(), right.contiguous()))


def test_bits_depend_on_the_row_alone(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = torch.randn(1000, 500), torch.randn(500, 210)
    whole = compiled.product(left, right)
    assert torch.equal(compiled.product(left[317:318], right), whole[317:318])
    assert torch.equal(compiled.product(left[130:], right), whole[130:])
    before = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: before + 2)
    assert torch.equal(compiled.product(left, right), whole)


def test_more_rows_than_are_packed_at_once(isa: str) -> None:
    left, right = torch.randn(23_000, 97), torch.randn(97, 5)
    size = left.double().abs() @ right.double().abs()
    within(compiled.product(left, right), left.double() @ right.double(), size, 97)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(isa: str, bad: float) -> None:
    left, right = torch.randn(30, 40), torch.randn(40, 35)
    left[7, 3] = bad
    found = compiled.product(left, right)
    assert not found[7].isfinite().any()
    assert found[[i for i in range(30) if i != 7]].isfinite().all()


def test_nothing_in_nothing_out(isa: str) -> None:
    assert compiled.product(torch.empty(0, 4), torch.randn(4, 3)).shape == (0, 3)


def test_what_the_extension_refuses() -> None:
    left, right = torch.randn(4, 3), torch.randn(4, 2)
    for how in ({"origin": torch.zeros(4)}, {"norms": torch.empty(3)}):
        with pytest.raises(ValueError, match="transposed left has to be fp32, without origin"):
            compiled.product(left, right, transposed=True, **how)
    with pytest.raises(ValueError, match="transposed left has to be fp32"):
        compiled.product(left.half(), right, transposed=True)
    with pytest.raises(ValueError, match="only left may be in half precision"):
        compiled.product(left, right[:3].half())


@pytest.mark.parametrize("pays", [False, True])
def test_either_way_the_same(pays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "pays", lambda *sizes: pays)
    rows, rotation, origin = (
        torch.randn(300, 48).half(),
        torch.linalg.qr(torch.randn(48, 48))[0],
        torch.randn(48),
    )
    norms, expected_norms = torch.empty(300), torch.empty(300)
    expected = centring.rotate_centred(rows, rotation, origin, norms=expected_norms)
    torch.testing.assert_close(dispatch.rotate_centred(rows, rotation, origin, norms=norms), expected)
    torch.testing.assert_close(norms, expected_norms)
    matrix, base = torch.randn(48, 48), torch.randn(48, 48)
    for transposed in (False, True):
        left = matrix.T if transposed else matrix
        found = dispatch.product(matrix, rotation, transposed=transposed, scale=0.5)
        torch.testing.assert_close(found, 0.5 * left @ rotation)
        found = dispatch.product(matrix, rotation, transposed=transposed, base=base, factor=1.5, scale=-0.5)
        torch.testing.assert_close(found, 1.5 * base - 0.5 * left @ rotation)


def test_pays_for_large_products_on_amds_avx512_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    large = (1024, 256, 256)
    real = extension.extension()
    for isa in ("avx512bf16", "avx512", "avx2", "portable"):
        for amd in (False, True):
            monkeypatch.setattr(compiled, "isa", lambda isa=isa: isa)
            monkeypatch.setattr(compiled, "extension", lambda amd=amd: _Vendor(amd))
            assert compiled.pays(*large) == (amd and isa.startswith("avx512"))
            assert not compiled.pays(8, 8, 8)
    assert isinstance(real.is_amd(), bool)


class _Vendor:
    def __init__(self, amd: bool) -> None:
        self._amd = amd

    def is_amd(self) -> bool:
        return self._amd
