"""The estimate of mutual information against known values: Gaussians, discrete, constant, repeated rows."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ndm_fast.errors import InputError
from ndm_fast.geometry import reference
from ndm_fast.geometry.orthogonal import random_rotation
from ndm_fast.ops import backends
from ndm_fast.train.merge import mutual_information as module
from ndm_fast.train.merge.mutual_information import mutual_information
from ndm_fast.train.merge.ties import made_equal

pytestmark = pytest.mark.usefixtures("one_thread")

RUNNABLE = [name for name in backends.BACKENDS if backends.obstacle(name, "cpu") is None]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def drawn(count: int, values: int, seed: int = 0) -> Tensor:
    return torch.randint(values, (count,), generator=torch.Generator().manual_seed(seed))


def between(rows: Tensor, queries: int = 500, **options) -> float:
    """Of the two columns."""
    found = mutual_information(rows[:queries], rows[queries:], torch.eye(2), [1, 1], **options)
    return float(found[0, 1])


@pytest.mark.parametrize("rho", [0.0, 0.5, -0.9, 0.99])
def test_gaussians(rho: float) -> None:
    a, b = normal(2, 8000)
    rows = torch.stack([a, rho * a + math.sqrt(1 - rho**2) * b], 1)
    assert between(rows, 1000) == pytest.approx(-0.5 * math.log(1 - rho**2), abs=0.1)


@pytest.mark.parametrize("backend", RUNNABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rows_that_repeat_share_at_most_the_logarithm_of_their_number(
    backend: str, dtype: torch.dtype
) -> None:
    """As in a first layer; rotated, where a product may round equal rows differently."""
    queries, keys, values = (3, 300, 12) if backend == "triton" else (200, 4000, 200)
    rows = normal(values, 48)[drawn(queries + keys, values)].to(dtype)
    rotation = random_rotation(48, torch.Generator().manual_seed(1))
    found = mutual_information(rows[:queries], rows[queries:], rotation, [32, 16], backend=backend)
    assert float(found[0, 1]) == pytest.approx(math.log(values), abs=0.4 if backend == "triton" else 0.05)
    same = mutual_information(rows[:queries], rows[queries:], rotation, [32, 16], backend="reference")
    torch.testing.assert_close(found, same, rtol=0, atol=1e-12)


def test_discrete_variables() -> None:
    one, other = drawn(6000, 5).float(), drawn(6000, 7, seed=1).float()
    assert between(torch.stack([one, one], 1)) == pytest.approx(math.log(5), abs=0.05)
    assert between(torch.stack([one, other], 1)) == pytest.approx(0, abs=0.05)
    # I(X; X + Y mod 5) of independent ones is 0; of X and X // 2, the entropy of X // 2.
    entropy = -(2 * 0.4 * math.log(0.4) + 0.2 * math.log(0.2))
    assert between(torch.stack([one, one // 2], 1)) == pytest.approx(entropy, abs=0.05)


def test_a_discrete_and_a_continuous_variable() -> None:
    """Gao et al. 2017, experiment I: X uniform on m values, Y uniform on [X, X + 2]."""
    count, values = 12_000, 5
    x = drawn(count, values).float()
    y = x + 2 * torch.rand(count, generator=torch.Generator().manual_seed(2))
    expected = math.log(values) - (values - 1) * math.log(2) / values
    assert between(torch.stack([x, y], 1), 2000) == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("backend", RUNNABLE)
def test_constant_columns_share_nothing(backend: str) -> None:
    rows = torch.stack([torch.full((160,), 3.5), normal(160), torch.zeros(160)], 1)
    found = mutual_information(rows[:10], rows[10:], torch.eye(3), [1, 1, 1], backend=backend)
    assert found.abs().max() < 1e-12


@pytest.mark.parametrize("backend", RUNNABLE)
def test_equal_rows_share_nothing(backend: str) -> None:
    rows = normal(1, 24).expand(150, 24)
    rotation = random_rotation(24, torch.Generator().manual_seed(1))
    found = mutual_information(rows[:10], rows[10:], rotation, [16, 8], backend=backend)
    assert found.abs().max() < 1e-12


def test_without_equal_rows_the_estimate_is_the_published_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: ties are not even looked at."""
    rows, rotation, widths = (
        normal(900, 24),
        random_rotation(24, torch.Generator().manual_seed(1)),
        [10, 8, 6],
    )
    monkeypatch.setattr(module, "tied_counts", None)
    found = mutual_information(rows[:100], rows[100:], rotation, widths)
    monkeypatch.setattr(module, "made_equal", lambda rows, rotated: rotated)
    assert torch.equal(found, mutual_information(rows[:100], rows[100:], rotation, widths))
    pairs = torch.tensor([[0, 1], [0, 2], [1, 2]])
    variances = module.subspace_variances(rows[100:], rotation, widths)
    given = (rows[:100], rows[100:], rotation, widths, variances, pairs)
    counts = reference.ksg_counts(*given, reference.ksg_radius(*given))
    inside = torch.digamma(counts.double() + 1).sum((1, 2)) / 100
    expected = torch.digamma(torch.tensor([1.0, 801.0]).double()).sum() - inside
    torch.testing.assert_close(found[[0, 0, 1], [1, 2, 2]], expected, rtol=0, atol=0.02)


def test_equal_rows_get_the_numbers_of_the_first() -> None:
    rows = normal(40, 30)
    rows[7] = rows[23] = rows[2]
    rows[3, 0], rows[5] = 0.0, rows[3]
    rows[5, 0] = -0.0
    rotated = normal(40, 30, seed=1)
    parts = made_equal([rows[:10], rows[10:]], [rotated[:10], rotated[10:]])
    found = torch.cat(parts)
    expected = rotated.clone()
    expected[7] = expected[23] = rotated[2]
    expected[5] = rotated[3]
    assert torch.equal(found, expected)
    alone = [normal(10, 30), normal(5, 30, seed=2)]
    assert made_equal(alone, parts) is parts


@pytest.mark.filterwarnings("error")
def test_one_row_is_refused() -> None:
    rows = normal(3, 4)
    with pytest.raises(InputError, match="keys has one row, and no variance: give at least two"):
        mutual_information(rows[:2], rows[2:], torch.eye(4), [2, 2])
    assert mutual_information(rows[:1], rows[1:], torch.eye(4), [2, 2]).isfinite().all()


@pytest.mark.parametrize("pairs", [[(0, 0)], [(0, 2)], [(-1, 0)], [(0, 1, 1)], [(0.5, 1)], 3])
def test_pairs_are_two_different_subspaces(pairs: object) -> None:
    with pytest.raises(InputError, match="pairs"):
        mutual_information(normal(3, 4), normal(9, 4), torch.eye(4), [2, 2], pairs=pairs)
