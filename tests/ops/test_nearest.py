"""The contract of the nearest-neighbor search, on every backend, against the fp64 oracle."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_backend import Backend
from oracle_inputs import heavy_tailed, rotation_of
from torch import Tensor

from ndm_fast import ops
from ndm_fast.errors import InputError
from ndm_fast.geometry import reference, shadow
from ndm_fast.ops.cpu import extension

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
METRICS = pytest.mark.parametrize("metric", ["euclidean", "cosine"])
ROTATED = pytest.mark.parametrize("keys_rotated", [False, True], ids=["raw", "rotated"])


def find(
    backend: Backend, queries: Tensor, keys: Tensor, rotation: Tensor | None, widths: list[int], **options
) -> reference.Neighbors:
    """Neighbors by the backend, brought back to the CPU; nothing looks for NaN and Inf."""
    rows = [*backend.on(queries, keys), None if rotation is None else rotation.to(backend.device)]
    options = {"check_finite": False, **options}
    found = ops.nearest_neighbors(*rows, widths, backend=backend.name, **options)
    return reference.Neighbors(found.distance.cpu(), found.index.cpu())


def check(
    backend: Backend,
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
    found = find(backend, *arguments, metric=metric, precision=precision, **form)
    oracle = reference.nearest_neighbors(*arguments, metric=metric, **form)
    true = reference.distance_to(*arguments, found.index, metric=metric, **form)
    allowed = 1e-2 if precision == "bf16" else 1e-6
    floor = 1e-13 if metric == "cosine" else 0.0  # what fp64 resolves of 1 - cos
    assert found.distance.dtype == torch.float32
    assert found.index.dtype == torch.int64
    torch.testing.assert_close(found.distance.double(), true, rtol=1e-5, atol=floor)
    assert bool((true <= oracle.distance * (1 + allowed) + floor).all())
    return found


@pytest.mark.parametrize("widths", [[1], [1, 5, 31, 32, 33], [32] * 4, [100], [7, 3], [130, 2]], ids=str)
@METRICS
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@ROTATED
def test_matches_oracle_on_heavy_tailed_data(
    search_backend: Backend, widths: list[int], metric: str, keys_rotated: bool, precision: str
) -> None:
    count = search_backend.few(601, 141)
    keys = heavy_tailed(count, sum(widths))
    keys[count - 20 :] = keys[3]
    queries = torch.cat(
        [heavy_tailed(search_backend.few(29, 1), sum(widths)), keys[::100][:: search_backend.few(1, 2)]]
    )
    form = {"metric": metric, "precision": precision, "keys_rotated": keys_rotated}
    check(search_backend, queries, keys, widths, **form)


@pytest.mark.parametrize("crowd", [0, 5, 400])
@ROTATED
def test_bf16_sweep_keeps_its_contract(backend: Backend, keys_rotated: bool, crowd: int) -> None:
    """Also where bf16 cannot tell keys apart: ``crowd`` queries sit in a cluster far from the origin."""
    count, asked = backend.few(9000, 300), backend.few(400, 6)
    keys, queries = torch.randn(count, 24), torch.randn(asked, 24)
    keys[: count * 2 // 3, 8:] = 1000 + torch.randn(count * 2 // 3, 16)
    crowd = min(crowd, asked)
    queries[:crowd, 8:] = 1000 + torch.randn(crowd, 16)
    queries[crowd:, 8:] *= 1000
    widths = [8, 16]
    rotation = torch.block_diag(rotation_of(8), rotation_of(16))
    given = keys @ rotation if keys_rotated else keys
    form = {"keys_rotated": keys_rotated}
    found = find(backend, queries, given, rotation, widths, precision="bf16", **form)
    oracle = reference.nearest_neighbors(queries, given, rotation, widths, **form)
    true = reference.distance_to(queries, given, rotation, widths, found.index, **form)
    torch.testing.assert_close(found.distance.double(), true, rtol=1e-5, atol=0.0)
    excess = true / oracle.distance - 1
    assert float(excess.max()) <= 1e-2
    assert float(excess.mean()) <= 1e-3


@METRICS
def test_takes_rotated_queries_and_then_no_rotation(search_backend: Backend, metric: str) -> None:
    queries, keys = (
        heavy_tailed(search_backend.few(31, 1), 40),
        heavy_tailed(search_backend.few(700, 150), 40),
    )
    form = {"metric": metric, "keys_rotated": True, "queries_rotated": True}
    check(search_backend, queries, keys, [7, 33], **form)
    given, without = (
        find(search_backend, queries, keys, rotation, [7, 33], **form) for rotation in (torch.eye(40), None)
    )
    assert torch.equal(given.index, without.index)
    assert torch.equal(given.distance, without.distance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@ROTATED
def test_takes_half_precision(search_backend: Backend, dtype: torch.dtype, keys_rotated: bool) -> None:
    queries = torch.randn(search_backend.few(13, 1), 48).to(dtype)
    keys = (torch.randn(search_backend.few(700, 150), 48) + 3).to(dtype)
    check(search_backend, queries, keys, [33, 8, 7], keys_rotated=keys_rotated)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
    search_backend: Backend,
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
    width = sum(widths[: search_backend.few(5, 2)])
    widths, step = widths[: search_backend.few(5, 2)], 2 if strided else 1
    counts = min(queries, search_backend.few(30, 2)), min(keys, search_backend.few(641, 129))
    rows = [(scale * torch.randn(n * step, width + 3)).to(dtype)[::step, 1 : 1 + width] for n in counts]
    check(search_backend, *rows, widths, metric=metric, precision=precision, keys_rotated=keys_rotated)


@METRICS
@ROTATED
def test_copies_of_a_key_go_to_the_lowest_index(
    search_backend: Backend, metric: str, keys_rotated: bool
) -> None:
    keys = torch.randn(20, 24).repeat(search_backend.few(40, 8), 1)
    queries = torch.randn(search_backend.few(15, 1), 24)
    found = check(search_backend, queries, keys, [16, 8], metric=metric, keys_rotated=keys_rotated)
    assert int(found.index.max()) < 20


def test_copies_that_wait_in_different_groups_go_to_the_lowest_index(isa: str) -> None:
    """The other queries of the block have so many candidates that the list is worked off early."""
    keys, queries = torch.randn(33000, 64), torch.randn(8, 64)
    keys[20] = queries[0] + 0.3 * torch.randn(64)
    keys[130] = keys[20]
    queries[1:] *= 1e7
    rotation = rotation_of(64)
    alone = ops.nearest_neighbors(queries[:1], keys, rotation, [8] * 8, backend="cpu")
    together = ops.nearest_neighbors(queries, keys, rotation, [8] * 8, backend="cpu")
    assert torch.equal(together.index[:, 0], alone.index[:, 0])
    assert 130 not in together.index[:, 0]


@pytest.mark.parametrize("value", [0.0, 3.5])
@ROTATED
def test_constant_data(search_backend: Backend, value: float, keys_rotated: bool) -> None:
    keys = torch.full((search_backend.few(500, 140), 12), value)
    found = check(
        search_backend, torch.randn(search_backend.few(5, 1), 12), keys, [8, 4], keys_rotated=keys_rotated
    )
    assert not found.index.any()
    if not keys_rotated:
        same = check(search_backend, keys[: search_backend.few(3, 1)], keys, [8, 4])
        assert not same.distance.any()
        assert not same.index.any()


def test_query_among_keys_has_distance_exactly_zero(search_backend: Backend) -> None:
    keys = heavy_tailed(search_backend.few(1000, 200), 40)
    last = search_backend.few(140, 125)
    found = check(search_backend, keys[123:last], keys, [8, 32])
    assert not found.distance.any()
    assert torch.equal(found.index, torch.arange(123, last).expand(2, -1))


def test_zero_vectors_have_cosine_zero(search_backend: Backend) -> None:
    keys = torch.randn(70, 8)
    keys[10:20] = 0
    queries = torch.cat([torch.zeros(2, 8), torch.randn(3, 8)])
    found = check(search_backend, queries, keys, [5, 3], metric="cosine")
    assert bool((found.distance[:, :2] == 1).all())
    assert not found.index[:, :2].any()


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf])
def test_an_infinite_key_is_nobodys_neighbor(isa: str, bad: float) -> None:
    keys = torch.randn(50, 4)
    keys[0, 0] = bad
    rows = (torch.randn(3, 4), keys, torch.eye(4), [4])
    found = ops.nearest_neighbors(*rows, keys_rotated=True, check_finite=False, backend="cpu")
    assert bool(found.distance.isfinite().all())
    assert bool((found.index > 0).all())


@ROTATED
def test_nan_stays_nan_in_the_compiled_searches(search_backend: Backend, keys_rotated: bool) -> None:
    if search_backend.name == "reference":
        pytest.skip("the oracle centres by the mean of all keys, which one of them spoils")
    queries, keys, rotation = torch.randn(9, 16), torch.randn(300, 16), torch.eye(16)
    queries[4, 3] = torch.nan
    found = find(search_backend, queries, keys, rotation, [16], keys_rotated=keys_rotated)
    assert found.distance.isnan()[0].tolist() == [i == 4 for i in range(9)]
    for bad in (torch.nan, torch.inf):
        keys[77, 2] = bad
        found = find(search_backend, torch.randn(2, 16), keys, rotation, [16], keys_rotated=keys_rotated)
        assert bool(((found.index >= 0) & (found.index < 300)).all())


@pytest.mark.parametrize("scale", [1e-30, 1e-19, 1e17, 1e25, 1e37])
@METRICS
def test_scale_does_not_matter(search_backend: Backend, scale: float, metric: str) -> None:
    queries, keys = scale * torch.randn(2, 16), scale * torch.randn(100, 16)
    check(search_backend, queries, keys, [16], keys_rotated=True, metric=metric)


def test_results_do_not_depend_on_threads(isa: str) -> None:
    queries, keys, rotation = torch.randn(50, 64), torch.randn(3000, 64), rotation_of(64)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(ops.nearest_neighbors(queries, keys, rotation, [40, 24], backend="cpu"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r.index, results[0].index) for r in results)
    assert all(torch.allclose(r.distance, results[0].distance, rtol=1e-6) for r in results)


@pytest.mark.skipif(not extension.available(), reason=str(extension.why_unavailable()))
def test_many_queries_go_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from ndm_fast.ops.cpu import search

    monkeypatch.setattr(search, "_QUERY_ELEMENTS", 300)
    cpu = Backend("cpu", "cpu", False)
    check(cpu, torch.randn(101, 16), torch.randn(333, 16), [11, 5])
    check(cpu, torch.randn(101, 16), torch.randn(333, 16), [11, 5], keys_rotated=True)


@pytest.mark.parametrize("form", ["rotated keys", "rotated keys and queries"])
@pytest.mark.parametrize("widths", [[40, 33, 6, 5], [6, 40, 5, 33], [5, 6], [40]], ids=str)
@METRICS
def test_turning_some_of_the_subspaces_changes_nothing(
    isa: str, monkeypatch: pytest.MonkeyPatch, form: str, widths: list[int], metric: str
) -> None:
    from ndm_fast.ops.cpu import search

    monkeypatch.setattr(search, "_QUERY_ELEMENTS", 900)
    keys, queries = heavy_tailed(3000, sum(widths)), heavy_tailed(40, sum(widths))
    keys[2000:2900] = keys[1000:1900]
    queries[:10] = keys[1500:1510]
    rows = (queries, keys, rotation_of(sum(widths)), widths)
    given = {"metric": metric, "keys_rotated": True, "queries_rotated": form.endswith("queries")}
    found = {}
    for turned in (False, True):
        monkeypatch.setattr(
            shadow, "turning_pays", lambda queries, keys, width, *rest, yes=turned: yes and width > 30
        )
        found[turned] = ops.nearest_neighbors(*rows, backend="cpu", check_finite=False, **given)
    assert torch.equal(found[True].index, found[False].index)
    assert torch.equal(found[True].distance, found[False].distance)
    oracle = reference.nearest_neighbors(*rows, **given)
    torch.testing.assert_close(found[True].distance.double(), oracle.distance, rtol=1e-5, atol=1e-13)


@pytest.mark.parametrize("saved", [-0.01, 0.01])
def test_shadows_are_used_where_the_axes_say_so(monkeypatch: pytest.MonkeyPatch, saved: float) -> None:
    from ndm_fast.ops.cpu import search

    monkeypatch.setattr(shadow, "saved", lambda *given: saved)
    keys = torch.randn(200, 16)
    turn = search._worthwhile_turn(torch.eye(16), keys, None, [16])
    assert (turn is not None) == (saved > 0)


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize(
    ("name", "metric", "looks"),
    [("avx512bf16", "euclidean", False), ("avx512bf16", "cosine", True), ("avx512", "euclidean", True)],
)
def test_half_precision_looks_for_no_shadows(
    monkeypatch: pytest.MonkeyPatch, name: str, metric: str, looks: bool, rotated: bool
) -> None:
    """Products in bf16 save as much; the cosine is never proposed by them."""
    from ndm_fast.ops.cpu import search

    looked = []
    for decision in ("pays", "turning_pays"):
        monkeypatch.setattr(shadow, decision, lambda *sizes: looked.append(sizes))
    monkeypatch.setattr(search, "isa", lambda: name)
    call = search._Search(search.extension(), [0, 16], metric == "cosine", True, shadows=False)
    if rotated:
        assert list(search._parts(call, 10, torch.randn(20, 16), None)) == [(0, 1, None)]
    else:
        monkeypatch.setattr(
            search, "_search_raw", lambda *given: reference.Neighbors(torch.ones(1), torch.ones(1))
        )
        search.nearest_neighbors(
            *torch.randn(2, 20, 16), torch.eye(16), [16], metric=metric, precision="bf16"
        )
    assert bool(looked) is looks


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@METRICS
def test_neighbors_without_distances(
    search_backend: Backend, metric: str, precision: str, dtype: torch.dtype
) -> None:
    rows, rotation, asked = torch.randn(140, 24).to(dtype), rotation_of(24), search_backend.few(9, 2)
    queries, keys, turn = search_backend.on(rows[:asked], rows[asked:], rotation)
    index = ops.nearest_index(
        queries, keys, turn, [17, 7], metric, precision, backend=search_backend.name
    ).cpu()
    given = (rows[:asked], rows[asked:], rotation, [17, 7])
    oracle = reference.nearest_neighbors(*given, metric=metric).distance
    true = reference.distance_to(*given, index, metric=metric)
    assert bool((true <= oracle * (1 + (1e-2 if precision == "bf16" else 1e-4))).all())


def test_writes_every_output(search_backend: Backend, poisoned_outputs: None) -> None:
    found = check(search_backend, torch.randn(3, 19), torch.randn(140, 19), [16, 3])
    assert bool((found.index >= 0).all())


def test_queries_are_rotated_only_where_keys_are(search_backend: Backend) -> None:
    with pytest.raises(InputError, match="queries_rotated goes with keys_rotated"):
        find(search_backend, torch.randn(2, 8), torch.randn(3, 8), torch.eye(8), [8], queries_rotated=True)
