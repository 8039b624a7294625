"""Triton ops against the fp64 oracle: on the GPU where there is one, else through Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from oracle_inputs import heavy_tailed, rotation_of
from torch import Tensor

from ndm_fast import gpu_frame, ops, reference, triton_ksg, triton_ops
from ndm_fast.reference import Neighbors

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.skipif(not triton_ops.available(), reason="triton is not installed"),
    pytest.mark.usefixtures("one_thread"),
]

FORMS = {
    "rotated": {"keys_rotated": True},
    "both-rotated": {"keys_rotated": True, "queries_rotated": True},
    "split": {"form": "split"},
    "fused": {"form": "fused"},
    "split-half": {"form": "split", "precision": "bf16"},
    "fused-half": {"form": "fused", "precision": "bf16"},
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def check(
    queries: Tensor, keys: Tensor, widths: list[int], form: str = "split", metric: str = "euclidean"
) -> Neighbors:
    """The contract of design section 3; in half precision too, a query farther than 1 % fails."""
    rotation, options = rotation_of(sum(widths)), FORMS[form]
    if "precision" in options and keys.dtype == torch.float32:
        half = torch.float16 if max(keys.abs().max(), queries.abs().max()) < 2**15 else torch.bfloat16
        queries, keys = queries.to(half), keys.to(half)
    found = triton_ops.nearest_neighbors(
        *(rows.to(DEVICE) for rows in (queries, keys, rotation)), widths, metric=metric, **options
    )
    found = Neighbors(found.distance.cpu(), found.index.cpu())
    given = {name: options.get(name, False) for name in ("keys_rotated", "queries_rotated")}
    oracle = reference.nearest_neighbors(queries, keys, rotation, widths, metric=metric, **given)
    true = reference.distance_to(queries, keys, rotation, widths, found.index, metric=metric, **given)
    floor = 1e-13 if metric == "cosine" else 0.0  # what fp64 resolves of 1 - cos
    assert found.distance.dtype == torch.float32
    torch.testing.assert_close(found.distance.double(), true, rtol=1e-5, atol=floor)
    tolerance = 1e-2 if options.get("precision") == "bf16" else 1e-6
    assert bool((true <= oracle.distance * (1 + tolerance) + floor).all())
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_matches_oracle_on_heavy_tailed_data(form: str, metric: str) -> None:
    keys = heavy_tailed(201, 45)
    keys[180:186] = keys[3]
    queries = heavy_tailed(3, 45)
    if "half" not in form:  # which may lose a twin whose distance is 0 and whose norm is a million
        queries = torch.cat([queries, keys[::150]])
    check(queries, keys, [40, 5], form, metric)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_takes_half_precision(form: str, dtype: torch.dtype) -> None:
    queries, keys = torch.randn(3, 41).to(dtype), (torch.randn(140, 41) + 3).to(dtype)
    check(queries, keys, [33, 8], form)


@pytest.mark.parametrize("keys", [1, 2, 127, 128, 129, 257])
@pytest.mark.parametrize("queries", [1, 5])
def test_sizes_around_a_tile(queries: int, keys: int) -> None:
    check(torch.randn(queries, 17), torch.randn(keys, 17), [17], "rotated")


@pytest.mark.parametrize("widths", [[1], [72], [3, 16, 16, 1], [96, 31]], ids=str)
def test_odd_widths(widths: list[int]) -> None:
    for form in ("rotated", "split-half"):
        check(torch.randn(2, sum(widths)), torch.randn(150, sum(widths)), widths, form)


def test_more_queries_than_a_block() -> None:
    check(torch.randn(129, 8), torch.randn(20, 8), [8], "rotated")


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_a_subspace_too_wide_to_keep_in_place(metric: str) -> None:
    check(torch.randn(2, 530), torch.randn(70, 530), [530], "rotated", metric)


@pytest.mark.parametrize("form", FORMS)
def test_copies_of_a_key_go_to_the_lowest_index(form: str) -> None:
    keys = torch.randn(20, 24).repeat(10, 1)
    found = check(torch.randn(3, 24), keys, [24], form)
    assert int(found.index.max()) < 20


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [0.0, 3.5])
def test_constant_data(form: str, value: float) -> None:
    found = check(torch.randn(1, 12), torch.full((40, 12), value), [12], form)
    assert not found.index.any()


@pytest.mark.parametrize("form", ["split", "fused"])
def test_query_among_keys_has_distance_exactly_zero(form: str) -> None:
    keys = heavy_tailed(200, 40)
    found = check(keys[123:126], keys, [8, 32], form)
    assert not found.distance.any()
    assert torch.equal(found.index, torch.arange(123, 126).expand(2, -1))


@pytest.mark.parametrize("form", ["rotated", "split", "split-half"])
def test_zero_vectors_have_cosine_zero(form: str) -> None:
    keys = torch.randn(30, 8)
    keys[10:20] = 0
    found = check(torch.cat([torch.zeros(1, 8), torch.randn(1, 8)]), keys, [5, 3], form, "cosine")
    assert bool((found.distance[:, 0] == 1).all())
    assert not found.index[:, 0].any()


@pytest.mark.parametrize("form", FORMS)
def test_nan_stays_nan(form: str) -> None:
    queries, keys, rotation = torch.randn(3, 16), torch.randn(140, 16), torch.eye(16)
    queries[1, 3] = torch.nan
    keys[5, 3] = torch.inf
    keys[7, 2] = torch.nan
    found = triton_ops.nearest_neighbors(
        *(rows.to(DEVICE) for rows in (queries, keys, rotation)), [16], **FORMS[form]
    )
    assert found.distance.isnan()[0].tolist() == [False, True, False]
    assert bool(((found.index >= 0) & (found.index < 140)).all())
    assert not bool(torch.isin(found.index[0, [0, 2]].cpu(), torch.tensor([5, 7])).any())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [1e-6, 1e15])
def test_scale_does_not_matter(form: str, scale: float) -> None:
    """Far outside of what fp16, in which the sweep runs, can hold."""
    check(scale * torch.randn(2, 16), scale * torch.randn(100, 16), [16], form)


def test_a_query_that_fp16_cannot_hold_is_searched_exhaustively() -> None:
    keys = torch.randn(150, 8)
    check(torch.cat([torch.randn(1, 8), 1e6 * torch.randn(1, 8)]), keys, [8], "rotated")


def test_keys_in_chunks_and_queries_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_frame, "KEY_BYTES", 4 * 8 * 50)
    monkeypatch.setattr(gpu_frame, "MINIMA_BYTES", 1)
    queries, keys = torch.randn(129, 8), torch.randn(110, 8)
    keys[60:] = keys[:50]
    for form in ("split", "split-half"):
        check(queries[:3], keys, [8], form)
    check(queries, keys, [8], "rotated")


def test_writes_every_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs start as NaN and a negative index; none may survive."""
    empty = torch.empty

    def poisoned(*shape, **options):
        out = empty(*shape, **options)
        return out.fill_(torch.nan if out.is_floating_point() else -(2**62))

    monkeypatch.setattr(torch, "empty", poisoned)
    for form in ("rotated", "split-half"):
        found = check(torch.randn(3, 19), torch.randn(140, 19), [16, 3], form)
        assert bool((found.index >= 0).all())
    test_ksg_matches_oracle(65, False)


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("keys", [1, 65, 1030])
def test_ksg_matches_oracle(keys: int, rotated: bool) -> None:
    widths = [1, 5, 5, 12]
    data, queries = torch.randn(keys, 23) + 2, torch.randn(5, 23) + 2
    rotation, variances = rotation_of(23), torch.tensor([1.0, 4.0, 0.0, 30.0])
    pairs = torch.tensor([[0, 1], [3, 0], [2, 3], [1, 1]])
    arguments = (queries, data, rotation, widths, variances, pairs)
    given = [x.to(DEVICE) if isinstance(x, Tensor) else x for x in arguments]
    radius = triton_ops.ksg_radius(*given, rotated=rotated)
    counts = triton_ops.ksg_counts(*given, radius, rotated=rotated).cpu()
    radius = radius.cpu()
    exact = reference.ksg_radius(*arguments, rotated=rotated)
    torch.testing.assert_close(radius.double(), exact, rtol=1e-5, atol=1e-6)
    # A key as far as the radius may fall on either side when distances are rounded, no other.
    low, high = (
        reference.ksg_counts(*arguments, radius.double() * f, rotated=rotated) for f in (1 - 1e-5, 1 + 1e-5)
    )
    assert bool(((counts >= low) & (counts <= high)).all())
    # With one subspace twice, nothing is closer than the radius.
    assert not counts[3].any()


def test_ksg_keeps_nan() -> None:
    queries, keys = torch.randn(3, 4), torch.randn(70, 4)
    queries[1, 0] = torch.nan
    rest = ([2, 2], torch.ones(2, device=DEVICE), torch.tensor([[0, 1]], device=DEVICE))
    radius = triton_ops.ksg_radius(*(x.to(DEVICE) for x in (queries, keys, torch.eye(4))), *rest)
    assert radius.isnan()[0].tolist() == [False, True, False]


def test_ksg_queries_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_ksg, "_DISTANCE_BYTES", 2 * 4 * 4 * 65)
    test_ksg_matches_oracle(65, False)


def test_public_op_takes_the_backend_by_name() -> None:
    queries, keys, rotation = (x.to(DEVICE) for x in (torch.randn(2, 8), torch.randn(30, 8), rotation_of(8)))
    found = ops.nearest_neighbors(queries, keys, rotation, [5, 3], precision="bf16", backend="triton")
    expected = reference.nearest_neighbors(queries, keys, rotation, [5, 3])
    torch.testing.assert_close(found.distance.double(), expected.distance, rtol=1e-5, atol=1e-7)


def test_asks_for_the_interpreter_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "TRITON_INTERPRET=1" in str(triton_ops.why_unavailable(torch.device("cpu")))
