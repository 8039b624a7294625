"""Every form of the GPU searches, by their launchers: tiles, chunks and segments of keys, half precision.

On the GPU where there is one. Else Triton's go through its interpreter, and CUDA C++ is built for this CPU.
What every backend must do is tested in ``test_nearest.py``.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from oracle_inputs import heavy_tailed, rotation_of
from torch import Tensor

from ndm_fast import ops
from ndm_fast.errors import InputError
from ndm_fast.geometry import reference
from ndm_fast.geometry.reference import Neighbors
from ndm_fast.kernels import launch
from ndm_fast.kernels import search as triton_search
from ndm_fast.ops import backends, cuda

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("one_thread")

FORMS = {
    "rotated": {"keys_rotated": True},
    "both-rotated": {"keys_rotated": True, "queries_rotated": True},
    "split": {"form": "split"},
    "fused": {"form": "fused"},
    "split-half": {"form": "split", "precision": "bf16"},
    "fused-half": {"form": "fused", "precision": "bf16"},
    "cuda-rotated": {"keys_rotated": True},
    "cuda-both-rotated": {"keys_rotated": True, "queries_rotated": True},
    "cuda-split": {},
    "cuda-split-half": {"precision": "bf16"},
}


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A name of ``FORMS`` that can run."""
    if request.param.startswith("cuda"):
        monkeypatch.setattr(cuda, "_cuda", request.getfixturevalue("cuda_extension"))
    elif not backends.has_triton_installed():
        pytest.skip("triton is not installed")
    return request.param


def only(*forms: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("form", forms, indirect=True)


def search(
    form: str, queries: Tensor, keys: Tensor, rotation: Tensor, widths: list[int], **options
) -> Neighbors:
    nearest = (cuda if form.startswith("cuda") else triton_search).nearest_neighbors
    given = (rows.to(DEVICE) for rows in (queries, keys, rotation))
    found = nearest(*given, widths, **options, **FORMS[form])
    return Neighbors(found.distance.cpu(), found.index.cpu())


def check(
    queries: Tensor, keys: Tensor, widths: list[int], form: str, metric: str = "euclidean"
) -> Neighbors:
    """The contract of docs/method.md; in half precision too, a query farther than 1 % fails."""
    rotation, options = rotation_of(sum(widths)), FORMS[form]
    if "precision" in options and keys.dtype == torch.float32:
        half = torch.float16 if max(keys.abs().max(), queries.abs().max()) < 2**15 else torch.bfloat16
        queries, keys = queries.to(half), keys.to(half)
    found = search(form, queries, keys, rotation, widths, metric=metric)
    given = {name: options.get(name, False) for name in ("keys_rotated", "queries_rotated")}
    oracle = reference.nearest_neighbors(queries, keys, rotation, widths, metric=metric, **given)
    true = reference.distance_to(queries, keys, rotation, widths, found.index, metric=metric, **given)
    floor = 1e-13 if metric == "cosine" else 0.0  # what fp64 resolves of 1 - cos
    assert found.distance.dtype == torch.float32
    torch.testing.assert_close(found.distance.double(), true, rtol=1e-5, atol=floor)
    tolerance = 1e-2 if options.get("precision") == "bf16" else 1e-6
    assert bool((true <= oracle.distance * (1 + tolerance) + floor).all())
    return found


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_matches_oracle_on_heavy_tailed_data(form: str, metric: str) -> None:
    keys = heavy_tailed(201, 45)
    keys[180:186] = keys[3]
    queries = heavy_tailed(3, 45)
    if form not in ("split-half", "fused-half"):  # which may lose a twin at 0 whose norm is a million
        queries = torch.cat([queries, keys[::150]])
    check(queries, keys, [40, 5], form, metric)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("widths", [[33, 8], [32, 10]], ids=str)
def test_takes_half_precision(form: str, dtype: torch.dtype, widths: list[int]) -> None:
    queries, keys = (torch.randn(n, sum(widths)) for n in (3, 140))
    check(queries.to(dtype), (keys + 3).to(dtype), widths, form)


@pytest.mark.parametrize("keys", [1, 2, 127, 128, 129, 257])
@pytest.mark.parametrize("queries", [1, 5])
@only("rotated", "cuda-rotated")
def test_sizes_around_a_tile(form: str, queries: int, keys: int) -> None:
    check(torch.randn(queries, 17), torch.randn(keys, 17), [17], form)


@pytest.mark.parametrize("widths", [[1], [72], [3, 16, 16, 1], [96, 31], [24, 100], [40, 104]], ids=str)
@only("rotated", "split", "split-half", "fused-half", "cuda-rotated", "cuda-split-half")
def test_odd_widths(form: str, widths: list[int]) -> None:
    """Multiples of 1 to 8: loads of other widths, and pieces of which some are left over."""
    check(torch.randn(2, sum(widths)), torch.randn(150, sum(widths)), widths, form)


@only("rotated", "cuda-rotated")
def test_more_queries_than_a_block(form: str) -> None:
    check(torch.randn(129, 8), torch.randn(20, 8), [8], form)


@pytest.mark.parametrize("width", cuda.PADDED_WIDTHS)
@only("cuda-split")
def test_every_width_that_is_compiled(form: str, width: int) -> None:
    """More than a tile of keys and a block of queries, so that both buffers are filled again."""
    check(torch.randn(65, width), torch.randn(130 if width > 32 else 260, width), [width], form)


@pytest.mark.parametrize("width", [513, 530, 576])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@only("rotated", "split-half")
def test_a_subspace_too_wide_to_keep_in_place(form: str, metric: str, width: int) -> None:
    check(torch.randn(2, width), torch.randn(70, width), [width], form, metric)


@only("cuda-rotated")
def test_cuda_refuses_a_subspace_too_wide(form: str) -> None:
    with pytest.raises(InputError, match="530 wide, the CUDA kernels take 512"):
        check(torch.randn(2, 530), torch.randn(7, 530), [530], form)


def test_copies_of_a_key_go_to_the_lowest_index(form: str) -> None:
    keys = torch.randn(20, 24).repeat(10, 1)
    found = check(torch.randn(3, 24), keys, [24], form)
    assert int(found.index.max()) < 20


@pytest.mark.parametrize("value", [0.0, 3.5])
def test_constant_data(form: str, value: float) -> None:
    found = check(torch.randn(1, 12), torch.full((40, 12), value), [12], form)
    if DEVICE == "cpu" or "half" not in form:  # cuBLAS need not round equal rows alike
        assert not found.index.any()


@only("split", "fused", "cuda-split")
def test_query_among_keys_has_distance_exactly_zero(form: str) -> None:
    keys = heavy_tailed(200, 40)
    found = check(keys[123:126], keys, [8, 32], form)
    assert not found.distance.any()
    assert torch.equal(found.index, torch.arange(123, 126).expand(2, -1))


@only("rotated", "split", "split-half", "cuda-rotated", "cuda-split", "cuda-split-half")
def test_zero_vectors_have_cosine_zero(form: str) -> None:
    keys = torch.randn(30, 8)
    keys[10:20] = 0
    found = check(torch.cat([torch.zeros(1, 8), torch.randn(1, 8)]), keys, [5, 3], form, "cosine")
    assert bool((found.distance[:, 0] == 1).all())
    assert not found.index[:, 0].any()


def test_nan_stays_nan(form: str) -> None:
    queries, keys, rotation = torch.randn(3, 16), torch.randn(140, 16), torch.eye(16)
    queries[1, 3] = torch.nan
    keys[5, 3] = torch.inf
    keys[7, 2] = torch.nan
    found = search(form, queries, keys, rotation, [16])
    assert found.distance.isnan()[0].tolist() == [False, True, False]
    assert bool(((found.index >= 0) & (found.index < 140)).all())
    assert not bool(torch.isin(found.index[0, [0, 2]], torch.tensor([5, 7])).any())


@pytest.mark.parametrize("scale", [1e-6, 1e15])
def test_scale_does_not_matter(form: str, scale: float) -> None:
    """Far outside of what fp16, in which the sweep runs, can hold."""
    check(scale * torch.randn(2, 16), scale * torch.randn(100, 16), [16], form)


@only("rotated", "split", "fused", "cuda-rotated", "cuda-split")
def test_a_query_that_fp16_cannot_hold_is_searched_exhaustively(form: str) -> None:
    """Two keys that the sweep, which saturates, cannot tell apart; the wrong one lies in an earlier tile."""
    keys = torch.randn(2500, 8)
    keys[[10, 901]] = 0
    keys[10, 0] = 1e5
    keys[901, :2] = torch.tensor([1e6, 1.0])
    query = torch.zeros(1, 8)
    query[0, 0] = 1e6
    found = search(form, query, keys, torch.eye(8), [8])
    assert (found.index.item(), found.distance.item()) == (901, 1.0)


@only("rotated")
def test_a_wide_key_that_fp16_cannot_hold_keeps_its_direction(form: str) -> None:
    keys = torch.randn(300, 520)
    query = torch.zeros(1, 520)
    query[0, :2] = torch.tensor([1.0, 0.1])
    keys[7] = query[0]
    keys[7, 5] = 0.45
    keys[201] = 1e7 * query[0]
    found = search(form, query, keys, torch.eye(520), [520], metric="cosine")
    assert found.index.item() == 201


@only("split-half", "fused-half")
def test_the_nearest_tiles_come_first(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster far from the centre is in reach with many tiles, of which few may be visited."""
    monkeypatch.setattr(triton_search, "_MOST_TILES", 3)
    centre = 500 * torch.nn.functional.one_hot(torch.tensor(0), 8)
    keys = torch.randn(1500, 8)
    keys[::100] = centre + 0.7 * torch.randn(15, 8)
    query = centre + 0.7 * torch.randn(1, 8)
    keys[1400] = query[0] + 0.01
    found = search(form, query.half(), keys.half(), torch.eye(8), [8])
    assert found.index.item() == 1400


@only("both-rotated", "cuda-both-rotated")
def test_one_query_that_is_a_part_of_a_wider_row(form: str) -> None:
    check(torch.randn(3, 16)[:1, :8], torch.randn(40, 8), [5, 3], form)


@only("rotated", "split", "split-half", "cuda-rotated", "cuda-split", "cuda-split-half")
def test_keys_in_chunks_and_queries_in_groups(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "KEY_BYTES", 4 * 8 * 50)
    monkeypatch.setattr(launch, "MINIMA_BYTES", 1)
    queries, keys = torch.randn(129, 8), torch.randn(110, 8)
    keys[60:] = keys[:50]
    check(queries[: None if "rotated" in form else 3], keys, [8], form)


@only("split", "split-half")
def test_queries_are_packed_once_for_all_chunks(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from ndm_fast.kernels import sweep

    pack, packs = sweep.pack_queries, []
    monkeypatch.setattr(sweep, "pack_queries", lambda *given: packs.append(pack(*given)) or packs[-1])
    monkeypatch.setattr(launch, "KEY_BYTES", 4 * 8 * 50)
    check(torch.randn(3, 12), torch.randn(170, 12), [4, 4, 3, 1], form)
    assert len(packs) == 3  # a pack for each width


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@only("rotated", "split", "split-half")
def test_minima_in_several_segments(form: str, metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More tiles than a program holds the minima of at once, and twins in tiles of different segments."""
    from ndm_fast.kernels import tuning

    shape = tuning.resolve_shape
    monkeypatch.setattr(tuning, "resolve_shape", lambda *a, **b: shape(*a, **b)._replace(SEGMENT=2))
    keys = heavy_tailed(700, 24)
    keys[690:] = keys[:10]
    found = check(torch.cat([heavy_tailed(2, 24), keys[:1] + 0.1]), keys, [16, 8], form, metric)
    assert int(found.index.max()) < 690


@pytest.mark.parametrize("keys", [70, 129, 300])
@pytest.mark.parametrize("together", [1, 2])
@only("rotated", "split", "split-half", "fused")
def test_two_tiles_of_a_block_are_as_two_blocks(
    form: str, keys: int, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even and odd numbers of tiles; narrow subspaces, and some in two parts."""
    from ndm_fast.kernels import tuning

    monkeypatch.setattr(tuning, "_forced", {"sweep": tuning.Sweep(64, 64, 4, 2, together)._asdict()})
    rows = heavy_tailed(keys, 45)
    check(torch.cat([heavy_tailed(2, 45), rows[-1:] + 0.1]), rows, [36, 9], form)


@pytest.mark.parametrize("queries", [1, 65, 130])
@only("split-half")
def test_keys_that_pass_by_queries(form: str, queries: int) -> None:
    """Narrow subspaces, some in two parts; a key that fp16 cannot hold, and one that is NaN."""
    keys = heavy_tailed(300, 77)
    keys[40, 3], keys[41, 3] = torch.nan, 6e4
    check(torch.cat([heavy_tailed(queries, 77), keys[299:] + 0.1]), keys, [36, 41], form)


@only("split", "split-half")
def test_more_tiles_in_reach_than_the_first_look_keeps(form: str) -> None:
    """Twins of the nearest key lie in seven tiles; the first of them is the neighbor."""
    keys = heavy_tailed(1000, 16)
    keys[77::130] = keys[77]
    found = check(keys[77:78] + 1e-3, keys, [16], form)
    assert found.index.tolist() == [[77]]


@only("rotated", "split-half", "cuda-rotated", "cuda-split-half")
def test_writes_every_output(form: str, poisoned_outputs: None) -> None:
    found = check(torch.randn(3, 19), torch.randn(140, 19), [16, 3], form)
    assert bool((found.index >= 0).all())


@only("cuda-split")
def test_does_not_depend_on_which_warp_goes_first(form: str) -> None:
    """Built for a CPU, every run draws another order, and other moments at which copies arrive."""
    rows = torch.randn(70, 40), torch.randn(140, 40), rotation_of(40)
    first, *others = (search(form, *rows, [32, 8]) for _ in range(3))
    for other in others:
        assert torch.equal(first.distance, other.distance)
        assert torch.equal(first.index, other.index)


def check_index(
    queries: Tensor, keys: Tensor, widths: list[int], form: str, metric: str = "euclidean"
) -> tuple[Tensor, Tensor]:
    """Neighbors without distances, at most 1 % too far; true distances, and which raw rows decided."""
    rotation, asked = rotation_of(sum(widths)), []
    module = importlib.import_module("ndm_fast.kernels.rerank")
    rerank = module.rerank

    def watched(*arguments: Any) -> tuple[Tensor, Tensor]:
        asked.append(arguments[-1].counts)
        return rerank(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "rerank", watched)
        index = triton_search.nearest_index(
            *(rows.to(DEVICE) for rows in (queries, keys, rotation)), widths, metric=metric, form=form
        ).cpu()
    oracle = reference.nearest_neighbors(queries, keys, rotation, widths, metric=metric)
    true = reference.distance_to(queries, keys, rotation, widths, index, metric=metric)
    floor = 1e-13 if metric == "cosine" else 0.0
    assert bool((true <= oracle.distance * 1.01 + floor).all())
    return true, asked[0].cpu()


@pytest.mark.skipif(not backends.has_triton_installed(), reason="triton is not installed")
@pytest.mark.parametrize("form", ["split", "fused"])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_neighbors_without_distances(
    form: str, metric: str, dtype: torch.dtype, poisoned_outputs: None
) -> None:
    """Of the queries some are settled by the copy, others, near to two keys, by raw rows."""
    keys = torch.randn(300, 41).to(dtype)
    keys[150:160] = keys[:10]
    queries = torch.cat(
        [torch.randn(6, 41).to(dtype), (keys[:5].float() + 0.02 * torch.randn(5, 41)).to(dtype)]
    )
    true, by_raw_rows = check_index(queries, keys, [33, 8], form, metric)
    assert bool((by_raw_rows >= 5).all())
    assert dtype == torch.bfloat16 or bool((by_raw_rows < 11).all())
    assert not (true[:, :6] == 0).any()


@pytest.mark.skipif(not backends.has_triton_installed(), reason="triton is not installed")
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_neighbors_without_distances_of_heavy_tailed_data(metric: str) -> None:
    rows = heavy_tailed(210, 45).clamp(-3e4, 3e4).half()
    check_index(rows[:7], rows[7:], [40, 5], "split", metric)


@pytest.mark.skipif(not backends.has_triton_installed(), reason="triton is not installed")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_quiet_subspace_beside_a_loud_one(dtype: torch.dtype) -> None:
    """There the rounding of the rotation decides, of which each subspace alone knows nothing."""
    rotation, loud = rotation_of(64), torch.ones(64)
    loud[:32] = 30 if dtype == torch.float16 else 10
    queries, keys = (((torch.randn(n, 64) * loud) @ rotation.T).to(dtype) for n in (20, 600))
    widths, given = [32, 16, 16], (queries, keys, rotation)
    index = triton_search.nearest_index(*(rows.to(DEVICE) for rows in given), widths).cpu()
    true = reference.distance_to(*given, widths, index)
    assert bool((true <= 1.01 * reference.nearest_neighbors(*given, widths).distance).all())


@pytest.mark.skipif(not backends.has_triton_installed(), reason="triton is not installed")
def test_of_equal_keys_the_first_is_the_neighbor_and_nan_has_none() -> None:
    keys = torch.randn(20, 24).half().repeat(10, 1)
    queries = torch.randn(3, 24).half()
    queries[1, 2] = torch.nan
    given = (queries.to(DEVICE), keys.to(DEVICE), torch.eye(24, device=DEVICE), [16, 8])
    index = triton_search.nearest_index(*given)
    assert int(index.max()) < 20
    assert int(index[0, 1]) == 0
    expected = reference.nearest_neighbors(queries[[0, 2]], keys, torch.eye(24), [16, 8])
    assert torch.equal(index[:, [0, 2]].cpu(), expected.index)


@pytest.mark.skipif(not backends.has_triton_installed(), reason="triton is not installed")
def test_public_op_takes_the_backend_by_name() -> None:
    queries, keys, rotation = (x.to(DEVICE) for x in (torch.randn(2, 8), torch.randn(30, 8), rotation_of(8)))
    found = ops.nearest_neighbors(queries, keys, rotation, [5, 3], precision="bf16", backend="triton")
    expected = reference.nearest_neighbors(queries, keys, rotation, [5, 3])
    torch.testing.assert_close(found.distance.double(), expected.distance, rtol=1e-5, atol=1e-7)


@pytest.mark.skipif(not backends.has_triton_installed(), reason="triton is not installed")
def test_asks_for_the_interpreter_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "TRITON_INTERPRET=1" in str(backends.why_no_triton(torch.device("cpu")))
