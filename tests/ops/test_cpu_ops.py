"""The compiled CPU ops against the fp64 oracle, on every instruction set that this machine runs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_inputs import heavy_tailed, rotation_of
from torch import Tensor

from ndm_fast.geometry import reference
from ndm_fast.ops.cpu import extension, ksg, search
from ndm_fast.ops.cpu.extension import ISA_VARIABLE

pytestmark = pytest.mark.skipif(not extension.available(), reason=str(extension.why_unavailable()))

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def check_against_oracle(
    queries: Tensor,
    keys: Tensor,
    widths: list[int],
    *,
    metric: str = "euclidean",
    precision: str = "fp32",
    **form: bool,
) -> reference.Neighbors:
    """The contract: the distance is that of the index, and at most 1 + 1e-6 (bf16: 1.01) times the least."""
    rotation = rotation_of(sum(widths))
    arguments = (queries, keys, rotation, widths)
    found = search.nearest_neighbors(*arguments, metric=metric, precision=precision, **form)
    oracle = reference.nearest_neighbors(*arguments, metric=metric, **form)
    true = reference.distance_to(*arguments, found.index, metric=metric, **form)
    allowed = 1e-2 if precision == "bf16" else 1e-6
    floor = 1e-13 if metric == "cosine" else 0.0  # what fp64 resolves of 1 - cos
    assert found.distance.dtype == torch.float32
    assert found.index.dtype == torch.int64
    torch.testing.assert_close(found.distance.double(), true, rtol=1e-5, atol=floor)
    assert bool((true <= oracle.distance * (1 + allowed) + floor).all())
    return found


WIDTHS = [[1], [1, 5, 31, 32, 33], [32] * 4, [100], [7, 3], [130, 2]]


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("keys_rotated", [False, True], ids=["raw", "rotated"])
def test_matches_oracle_on_heavy_tailed_data(
    isa: str, widths: list[int], metric: str, keys_rotated: bool, precision: str
) -> None:
    keys = heavy_tailed(601, sum(widths))
    keys[500:520] = keys[3]
    queries = torch.cat([heavy_tailed(29, sum(widths)), keys[::100]])
    form = {"metric": metric, "precision": precision, "keys_rotated": keys_rotated}
    check_against_oracle(queries, keys, widths, **form)


@pytest.mark.parametrize("crowd", [0, 5, 400])
@pytest.mark.parametrize("keys_rotated", [False, True], ids=["raw", "rotated"])
def test_bf16_sweep_keeps_its_contract(isa: str, keys_rotated: bool, crowd: int) -> None:
    """Also where bf16 cannot tell keys apart: ``crowd`` queries sit in a cluster far from the origin."""
    keys, queries = torch.randn(9000, 24), torch.randn(400, 24)
    keys[:6000, 8:] = 1000 + torch.randn(6000, 16)
    queries[:crowd, 8:] = 1000 + torch.randn(crowd, 16)
    queries[crowd:, 8:] *= 1000
    widths = [8, 16]
    rotation = torch.block_diag(rotation_of(8), rotation_of(16))
    given = keys @ rotation if keys_rotated else keys
    found = search.nearest_neighbors(
        queries, given, rotation, widths, keys_rotated=keys_rotated, precision="bf16"
    )
    oracle = reference.nearest_neighbors(queries, given, rotation, widths, keys_rotated=keys_rotated)
    true = reference.distance_to(queries, given, rotation, widths, found.index, keys_rotated=keys_rotated)
    torch.testing.assert_close(found.distance.double(), true, rtol=1e-5, atol=0.0)
    excess = true / oracle.distance - 1
    assert float(excess.max()) <= 1e-2
    assert float(excess.mean()) <= 1e-3


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_takes_rotated_queries(isa: str, metric: str) -> None:
    queries, keys = heavy_tailed(31, 40), heavy_tailed(700, 40)
    check_against_oracle(queries, keys, [7, 33], metric=metric, keys_rotated=True, queries_rotated=True)
    with pytest.raises(ValueError, match="queries_rotated goes with keys_rotated"):
        search.nearest_neighbors(queries, keys, torch.eye(40), [40], queries_rotated=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keys_rotated", [False, True], ids=["raw", "rotated"])
def test_takes_half_precision(isa: str, dtype: torch.dtype, keys_rotated: bool) -> None:
    widths = [33, 8, 7]
    queries, keys = torch.randn(13, 48).to(dtype), (torch.randn(700, 48) + 3).to(dtype)
    check_against_oracle(queries, keys, widths, keys_rotated=keys_rotated)


@settings(max_examples=40, deadline=None)
@given(
    queries=st.integers(1, 30),
    keys=st.sampled_from([1, 2, 3, 7, 8, 9, 31, 63, 64, 65, 127, 128, 129, 255, 257, 641]),
    widths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    dtype=st.sampled_from(DTYPES),
    metric=st.sampled_from(["euclidean", "cosine"]),
    precision=st.sampled_from(["fp32", "bf16"]),
    keys_rotated=st.booleans(),
    scale=st.sampled_from([1e-6, 1.0, 1e3]),
    strided=st.booleans(),
)
def test_any_shape(
    queries: int,
    keys: int,
    widths: list[int],
    dtype: torch.dtype,
    metric: str,
    precision: str,
    keys_rotated: bool,
    scale: float,
    strided: bool,
) -> None:
    if dtype == torch.float16 and scale != 1:
        scale = 1.0
    width = sum(widths)
    step = 2 if strided else 1
    rows = [
        (scale * torch.randn(n * step, width + 3)).to(dtype)[::step, 1 : 1 + width] for n in (queries, keys)
    ]
    check_against_oracle(*rows, widths, metric=metric, precision=precision, keys_rotated=keys_rotated)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("keys_rotated", [False, True], ids=["raw", "rotated"])
def test_copies_of_a_key_go_to_the_lowest_index(isa: str, metric: str, keys_rotated: bool) -> None:
    keys = torch.randn(20, 24).repeat(40, 1)
    queries = torch.randn(15, 24)
    found = check_against_oracle(queries, keys, [16, 8], metric=metric, keys_rotated=keys_rotated)
    assert int(found.index.max()) < 20


def test_copies_that_wait_in_different_groups_go_to_the_lowest_index(isa: str) -> None:
    """The other queries of the block have so many candidates that the list is worked off early."""
    keys, queries = torch.randn(33000, 64), torch.randn(8, 64)
    keys[20] = queries[0] + 0.3 * torch.randn(64)
    keys[130] = keys[20]
    queries[1:] *= 1e7
    rotation = rotation_of(64)
    alone = search.nearest_neighbors(queries[:1], keys, rotation, [8] * 8)
    together = search.nearest_neighbors(queries, keys, rotation, [8] * 8)
    assert torch.equal(together.index[:, 0], alone.index[:, 0])
    assert 130 not in together.index[:, 0]


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf])
def test_an_infinite_key_is_nobodys_neighbor(isa: str, bad: float) -> None:
    keys = torch.randn(50, 4)
    keys[0, 0] = bad
    found = search.nearest_neighbors(torch.randn(3, 4), keys, torch.eye(4), [4], keys_rotated=True)
    assert bool(found.distance.isfinite().all())
    assert bool((found.index > 0).all())


@pytest.mark.parametrize("keys_rotated", [False, True], ids=["raw", "rotated"])
@pytest.mark.parametrize("value", [0.0, 3.5])
def test_constant_data(isa: str, value: float, keys_rotated: bool) -> None:
    keys = torch.full((500, 12), value)
    found = check_against_oracle(torch.randn(5, 12), keys, [8, 4], keys_rotated=keys_rotated)
    assert not found.index.any()
    if not keys_rotated:
        same = check_against_oracle(keys[:3], keys, [8, 4])
        assert not same.distance.any()
        assert not same.index.any()


def test_query_among_keys_has_distance_exactly_zero(isa: str) -> None:
    keys = heavy_tailed(1000, 40)
    found = check_against_oracle(keys[123:140], keys, [8, 32])
    assert not found.distance.any()
    assert torch.equal(found.index, torch.arange(123, 140).expand(2, -1))


def test_zero_vectors_have_cosine_zero(isa: str) -> None:
    keys = torch.randn(70, 8)
    keys[10:20] = 0
    queries = torch.cat([torch.zeros(2, 8), torch.randn(3, 8)])
    found = check_against_oracle(queries, keys, [5, 3], metric="cosine")
    assert bool((found.distance[:, :2] == 1).all())
    assert not found.index[:, :2].any()


@pytest.mark.parametrize("keys_rotated", [False, True], ids=["raw", "rotated"])
def test_nan_stays_nan(isa: str, keys_rotated: bool) -> None:
    queries, keys, rotation = torch.randn(9, 16), torch.randn(300, 16), torch.eye(16)
    queries[4, 3] = torch.nan
    found = search.nearest_neighbors(queries, keys, rotation, [16], keys_rotated=keys_rotated)
    assert found.distance.isnan()[0].tolist() == [i == 4 for i in range(9)]
    for bad in (torch.nan, torch.inf):
        keys[77, 2] = bad
        found = search.nearest_neighbors(torch.randn(9, 16), keys, rotation, [16], keys_rotated=keys_rotated)
        assert bool(((found.index >= 0) & (found.index < 300)).all())


def test_large_values_do_not_overflow_the_search(isa: str) -> None:
    check_against_oracle(torch.randn(5, 16) * 1e17, torch.randn(200, 16) * 1e17, [16], keys_rotated=True)


def test_results_do_not_depend_on_threads(isa: str) -> None:
    queries, keys, rotation = torch.randn(50, 64), torch.randn(3000, 64), rotation_of(64)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(search.nearest_neighbors(queries, keys, rotation, [40, 24]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r.index, results[0].index) for r in results)
    assert all(torch.allclose(r.distance, results[0].distance, rtol=1e-6) for r in results)


def test_many_queries_go_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "_QUERY_ELEMENTS", 300)
    check_against_oracle(torch.randn(101, 16), torch.randn(333, 16), [11, 5])
    check_against_oracle(torch.randn(101, 16), torch.randn(333, 16), [11, 5], keys_rotated=True)


def test_no_queries() -> None:
    found = search.nearest_neighbors(torch.empty(0, 8), torch.randn(5, 8), torch.eye(8), [8])
    assert found.distance.shape == found.index.shape == (1, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": torch.zeros(3, 8, dtype=torch.float64)}, "queries has dtype"),
        ({"queries": torch.zeros(3, 7)}, "queries has shape"),
        ({"queries": torch.zeros(3, 8, device="meta")}, "queries is on meta"),
        ({"keys": torch.zeros(0, 8)}, "keys has no rows"),
        ({"keys": torch.zeros(8)}, "keys has shape"),
        ({"rotation": torch.eye(8, dtype=torch.bfloat16)}, "rotation is"),
        ({"widths": [8, 0]}, "widths"),
        ({"metric": "manhattan"}, "metric"),
        ({"precision": "fp8"}, "precision"),
    ],
)
def test_refuses_by_name(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "queries": torch.zeros(3, 8),
        "keys": torch.zeros(4, 8),
        "rotation": torch.eye(8),
        "widths": [5, 3],
    }
    with pytest.raises(ValueError, match=message):
        search.nearest_neighbors(**{**arguments, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize("keys", [1, 63, 64, 65, 500])
def test_ksg_matches_oracle(isa: str, keys: int) -> None:
    widths = [1, 5, 16, 33]
    data, queries = torch.randn(keys, 55) + 2, torch.randn(17, 55) + 2
    rotation, variances = rotation_of(55), torch.tensor([1.0, 4.0, 0.0, 30.0])
    pairs = torch.tensor([[0, 1], [3, 0], [2, 3], [1, 3], [1, 1]])
    arguments = (queries, data, rotation, widths, variances, pairs)
    radius = ksg.ksg_radius(*arguments)
    counts = ksg.ksg_counts(*arguments, radius)
    torch.testing.assert_close(radius.double(), reference.ksg_radius(*arguments), rtol=1e-5, atol=1e-6)
    # A key as far as the radius may fall on either side when distances are rounded, no other.
    low, high = (reference.ksg_counts(*arguments, radius.double() * f) for f in (1 - 1e-5, 1 + 1e-5))
    assert bool(((counts >= low) & (counts <= high)).all())


@pytest.mark.parametrize("keys", [1, 63, 64, 65, 3000])
def test_ksg_in_one_op_is_the_two_ops(isa: str, keys: int) -> None:
    widths = [1, 5, 16, 33]
    heavy = torch.distributions.StudentT(1.5).sample((keys + 23, 55))
    heavy[: keys // 2] = heavy[0]  # ties
    pairs = torch.tensor([[0, 1], [0, 2], [0, 3], [3, 0], [2, 3], [1, 1]])
    variances = torch.tensor([1.0, 4.0, 0.0, 30.0])
    arguments = (heavy[keys:], heavy[:keys], rotation_of(55), widths, variances, pairs)
    radius, counts = ksg.ksg_radius_and_counts(*arguments)
    assert torch.equal(radius, ksg.ksg_radius(*arguments))
    assert torch.equal(counts, ksg.ksg_counts(*arguments, radius))


def test_ksg_in_one_op_where_all_keys_are_near(isa: str) -> None:
    """No key is near in both subspaces, so the radius spans all: more than there is room to note."""
    generator = torch.Generator().manual_seed(0)
    near, far = torch.rand(2, 10_000, 1, generator=generator)
    keys = torch.cat([torch.cat([near, far + 10], 1), torch.cat([far + 10, near], 1)])
    queries = torch.rand(600, 2, generator=generator)
    arguments = (queries, keys, torch.eye(2), [1, 1], torch.ones(2), torch.tensor([[0, 1]]))
    radius, counts = ksg.ksg_radius_and_counts(*arguments)
    assert counts.sum() > 11e6
    assert torch.equal(radius, ksg.ksg_radius(*arguments))
    assert torch.equal(counts, ksg.ksg_counts(*arguments, radius))


def test_ksg_counts_are_strict(isa: str) -> None:
    """Every radius is set by a key, which is never below it: with one subspace twice nothing is."""
    queries, keys = torch.randn(40, 20), torch.randn(999, 20)
    arguments = (
        queries,
        keys,
        rotation_of(20),
        [12, 8],
        torch.tensor([12.0, 8.0]),
        torch.tensor([[0, 0], [1, 1]]),
    )
    assert not ksg.ksg_counts(*arguments, ksg.ksg_radius(*arguments)).any()


def test_ksg_gives_the_mutual_information_of_the_oracle(isa: str) -> None:
    shared = torch.randn(2128, 1)
    rows = torch.cat([shared + 0.3 * torch.randn(2128, 4), 2 * shared + torch.randn(2128, 4)], 1)
    pairs, variances = torch.tensor([[0, 1]]), torch.tensor([4.4, 20.0])
    arguments = (rows[:128], rows[128:], torch.eye(8), [4, 4], variances, pairs)

    def estimate(radius: Tensor, counts: Tensor) -> Tensor:
        digamma = torch.digamma(counts.double() + 1).sum(1).mean(1)
        return torch.digamma(torch.tensor([1.0, 2001.0]).double()).sum() - digamma

    exact = reference.ksg_radius(*arguments)
    expected = estimate(exact, reference.ksg_counts(*arguments, exact))
    radius = ksg.ksg_radius(*arguments)
    found = estimate(radius, ksg.ksg_counts(*arguments, radius))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_ksg_takes_rotated_rows(isa: str) -> None:
    queries, keys = torch.randn(17, 20) + 3, torch.randn(500, 20) + 3
    rotation, pairs = rotation_of(20), torch.tensor([[0, 1]])
    raw = (queries, keys, rotation, [12, 8], torch.tensor([12.0, 8.0]), pairs)
    rotated = (queries @ rotation, keys @ rotation, *raw[2:])
    radius = ksg.ksg_radius(*rotated, rotated=True)
    torch.testing.assert_close(radius, ksg.ksg_radius(*raw), rtol=1e-5, atol=1e-6)
    oracle = reference.ksg_radius(*rotated, rotated=True)
    torch.testing.assert_close(radius.double(), oracle, rtol=1e-5, atol=0.0)
    low, high = (
        reference.ksg_counts(*rotated, radius.double() * f, rotated=True) for f in (1 - 1e-5, 1 + 1e-5)
    )
    counts = ksg.ksg_counts(*rotated, radius, rotated=True)
    assert bool(((counts >= low) & (counts <= high)).all())


@pytest.mark.parametrize("name", ["sse9", "avx512"])
def test_impossible_isa_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "avx512" and extension.isa().startswith(name):
        pytest.skip("this CPU runs it")
    monkeypatch.setenv(ISA_VARIABLE, name)
    with pytest.raises(ValueError, match=ISA_VARIABLE):
        extension.isa()


def test_package_imports_without_the_extension() -> None:
    code = (
        "import sys; sys.modules['ndm_fast._C'] = None\n"
        "from ndm_fast.ops.cpu import extension\n"
        "assert not extension.available() and 'not built' in extension.why_unavailable()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=60)
