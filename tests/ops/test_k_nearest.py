"""The contract of the search for k keys, against the fp64 oracle. All backends run one code: torch's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_inputs import heavy_tailed, rotation_of
from torch import Tensor

from ndm_fast import ops
from ndm_fast.errors import InputError
from ndm_fast.geometry import k_nearest, k_nearest_frame, reference

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]),
]

METRICS = pytest.mark.parametrize("metric", ["euclidean", "cosine"])


def copies(rows: int, width: int) -> Tensor:
    """Of five rows."""
    return torch.randn(5, width)[torch.randint(5, (rows,))]


def corners(rows: int, width: int) -> Tensor:
    """Of a cube: many distances are equal, and some rows are."""
    return torch.randint(2, (rows, width)).float()


def constant(rows: int, width: int) -> Tensor:
    return torch.full((rows, width), 3.5)


def crowded(rows: int, width: int) -> Tensor:
    """Near twins, far from the origin."""
    return 1000 + torch.randn(width) + 1e-3 * torch.randn(rows, width)


def one_loud(rows: int, width: int) -> Tensor:
    data = torch.randn(rows, width)
    data[0] *= 1e6
    return data


def nothing(rows: int, width: int) -> Tensor:
    return torch.zeros(rows, width)


KINDS = [torch.randn, heavy_tailed, copies, corners, constant, crowded, one_loud, nothing]


def check(
    device: str,
    queries: Tensor,
    keys: Tensor,
    widths: list[int],
    k: int,
    metric: str = "euclidean",
    exclude: Tensor | None = None,
    **form: bool,
) -> reference.Neighbors:
    """Every distance is that of the key named, and at most 1 + 1e-6 times the true one of its rank."""
    rows = (queries, keys, rotation_of(sum(widths)))
    hidden = None if exclude is None else exclude.to(device)
    on_device = ops.k_nearest_neighbors(
        *(each.to(device) for each in rows), widths, k, exclude=hidden, metric=metric, **form
    )
    found = reference.Neighbors(*(each.cpu() for each in on_device))
    shape = (len(widths), len(queries), k)
    assert (found.distance.shape, found.distance.dtype) == (shape, torch.float32)
    assert (found.index.shape, found.index.dtype) == (shape, torch.int64)
    oracle = reference.k_nearest_neighbors(*rows, widths, k, exclude=exclude, metric=metric, **form)
    true = torch.stack(
        [reference.distance_to(*rows, widths, each, metric=metric, **form) for each in found.index.unbind(2)],
        2,
    )
    floor = 1e-13 if metric == "cosine" else 0.0  # what fp64 resolves of 1 - cos
    torch.testing.assert_close(found.distance.double(), true, rtol=1e-5, atol=floor)
    assert bool((true <= oracle.distance * (1 + 1e-6) + floor).all())
    ascending = found.distance.diff(dim=2)
    assert bool((ascending >= 0).all())
    assert bool((found.index.diff(dim=2) > 0)[ascending == 0].all()), "ties are not in the order of the keys"
    if exclude is not None:
        assert not bool((found.index == exclude[:, None]).any())
    return found


@settings(max_examples=60)
@given(
    kind=st.sampled_from(KINDS),
    queries=st.integers(1, 12),
    keys=st.sampled_from([1, 2, 3, 8, 9, 31, 64, 129, 257, 641]),
    widths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    k=st.integers(1, 24),
    among=st.integers(0, 8),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    metric=st.sampled_from(["euclidean", "cosine"]),
    form=st.sampled_from([{}, {"keys_rotated": True}, {"keys_rotated": True, "queries_rotated": True}]),
    excludes=st.booleans(),
    seed=st.integers(0, 99),
)
def test_matches_oracle(
    device: str,
    kind: object,
    queries: int,
    keys: int,
    widths: list[int],
    k: int,
    among: int,
    dtype: torch.dtype,
    metric: str,
    form: dict[str, bool],
    excludes: bool,
    seed: int,
) -> None:
    """Some queries are keys; what each leaves out is that key, any other, or none."""
    torch.manual_seed(seed)
    keys = max(keys, 2 if excludes else 1)
    data = kind(keys + queries, sum(widths))
    data = data if kind in (heavy_tailed, one_loud) else data.to(dtype)  # they do not fit into fp16
    among = min(among, keys)
    asked, rows = torch.cat([data[keys:], data[:among]]), data[:keys]
    exclude = None
    if excludes:
        exclude = torch.cat([torch.randint(-1, keys, (queries,)), torch.arange(among)])
    check(device, asked, rows, widths, min(k, keys - excludes), metric, exclude, **form)


@METRICS
@pytest.mark.parametrize("kind", KINDS)
def test_keys_and_queries_in_blocks(
    device: str, metric: str, kind: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last key of one block, and the first of the next, left out; minima of groups with a rest."""
    for module in (k_nearest, k_nearest_frame):
        monkeypatch.setattr(module, "KEYS_AT_ONCE", 317)
    monkeypatch.setattr(k_nearest, "PRODUCTS_AT_ONCE", 317 * 4)
    keys = kind(700, 21)
    exclude = torch.tensor([316, 317, 634, 699, 0, -1, 5])
    check(device, keys[exclude], keys, [13, 8], 6, metric, exclude)


def test_one_of_them_is_the_nearest(device: str) -> None:
    queries, keys, rotation = (
        x.to(device) for x in (heavy_tailed(20, 48), heavy_tailed(900, 48), rotation_of(48))
    )
    one = ops.k_nearest_neighbors(queries, keys, rotation, [32, 16], 1)
    nearest = ops.nearest_neighbors(queries, keys, rotation, [32, 16])
    torch.testing.assert_close(one.distance[..., 0], nearest.distance, rtol=1e-6, atol=0)
    assert torch.equal(one.index[..., 0], nearest.index)


@METRICS
def test_copies_come_in_the_order_of_the_keys(device: str, metric: str) -> None:
    """More of them than are proposed, so that all keys are compared."""
    keys = torch.randn(20, 24).repeat(40, 1)
    found = check(device, torch.cat([torch.randn(5, 24), keys[:1]]), keys, [16, 8], 30, metric)
    assert bool((found.index % 20 == found.index[..., :1]).all())
    assert torch.equal(found.index // 20, torch.arange(30).expand(2, 6, -1))
    if metric == "euclidean":
        assert not found.distance[:, -1].any()


def test_a_query_among_the_keys_leaves_itself_out(device: str) -> None:
    keys = torch.randn(100, 24)
    everyone = torch.arange(100)
    found = check(device, keys, keys, [16, 8], 99, exclude=everyone)
    assert torch.equal(
        found.index.sort(2).values, torch.stack([everyone[everyone != q] for q in everyone]).expand(2, -1, -1)
    )
    with_itself = check(device, keys, keys, [16, 8], 1, exclude=torch.full((100,), -1))
    assert torch.equal(with_itself.index[..., 0], everyone.expand(2, -1))


@pytest.mark.parametrize("scale", [1e-30, 1e-19, 1e17, 1e25, 1e37])
@METRICS
def test_scale_does_not_matter(device: str, scale: float, metric: str) -> None:
    check(
        device, scale * torch.randn(2, 16), scale * torch.randn(100, 16), [16], 5, metric, keys_rotated=True
    )


@METRICS
def test_rows_too_small_to_square_beside_a_large_one(device: str, metric: str) -> None:
    """Their products underflow. All clusters are far from the origin, which is the median of each column."""
    rows = torch.randn(360, 15)
    for cluster in range(3):
        rows[cluster::3, 5 * cluster : 5 * cluster + 5] += 30
    rows *= 1e-25
    rows[-1] = 1
    check(device, rows[:60], rows[60:], [15], 1, metric, keys_rotated=True, queries_rotated=True)


def test_nan_stays_nan(device: str) -> None:
    queries, keys = torch.randn(9, 16), torch.randn(300, 16)
    queries[4, 3] = torch.nan
    given = [each.to(device) for each in (queries, keys, torch.eye(16))]
    found = ops.k_nearest_neighbors(*given, [16], 3, check_finite=False)
    assert found.distance.isnan().all(2)[0].tolist() == [i == 4 for i in range(9)]
    given[1][77, 2] = torch.nan
    found = ops.k_nearest_neighbors(*given, [16], 3, check_finite=False)
    assert bool(((found.index >= 0) & (found.index < 300)).all())
    with pytest.raises(InputError, match="queries holds NaN or Inf"):
        ops.k_nearest_neighbors(*given, [16], 3)


def test_no_query_is_compared_with_all_keys_for_nothing(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing ties, what is proposed decides: the bound is not so loose that it says nothing."""
    doubtful = []
    among_all = k_nearest.among_all
    monkeypatch.setattr(k_nearest, "among_all", lambda *a: doubtful.append(len(a[2])) or among_all(*a))
    for rows in (torch.randn, heavy_tailed):
        for widths in ([32] * 4, [8] * 4, [1] * 4):
            check(device, rows(40, sum(widths)), rows(3000, sum(widths)), widths, 10)
    assert not doubtful
