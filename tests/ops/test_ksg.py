"""The contract of the KSG ops, on every backend, against the fp64 oracle."""

from __future__ import annotations

import pytest
import torch
from op_backend import Backend
from oracle_inputs import rotation_of
from torch import Tensor

from ndm_fast import ops
from ndm_fast.geometry import reference
from ndm_fast.ops import backends

pytestmark = pytest.mark.usefixtures("one_thread")


def on(backend: Backend, arguments: tuple) -> list:
    return [each.to(backend.device) if isinstance(each, Tensor) else each for each in arguments]


def check(backend: Backend, arguments: tuple, rotated: bool = False) -> tuple[Tensor, Tensor]:
    """Radius and counts, apart and in one; those of the backend, on the CPU."""
    given, form = on(backend, arguments), {"rotated": rotated, "backend": backend.name}
    radius = ops.ksg_radius(*given, **form)
    counts = ops.ksg_counts(*given, radius, **form)
    both = ops.ksg_radius_and_counts(*given, **form)
    assert torch.equal(both[0], radius)
    assert torch.equal(both[1], counts)
    radius, counts = radius.cpu(), counts.cpu()
    exact = reference.ksg_radius(*arguments, rotated=rotated)
    torch.testing.assert_close(radius.double(), exact, rtol=1e-5, atol=1e-6)
    # A key as far as the radius may fall on either side when distances are rounded, no other.
    low, high = (
        reference.ksg_counts(*arguments, radius.double() * f, rotated=rotated) for f in (1 - 1e-5, 1 + 1e-5)
    )
    assert bool(((counts >= low) & (counts <= high)).all())
    return radius, counts


@pytest.mark.parametrize("rotated", [False, True], ids=["raw", "rotated"])
@pytest.mark.parametrize("keys", [1, 63, 64, 65, 500, 1030])
def test_matches_oracle(backend: Backend, keys: int, rotated: bool) -> None:
    widths, count = [1, 5, 5, 16, 33], min(keys, backend.few(1030, 130))
    data, queries = torch.randn(count, 60) + 2, torch.randn(backend.few(17, 3), 60) + 2
    variances = torch.tensor([1.0, 4.0, 0.0, 9.0, 30.0])
    pairs = torch.tensor([[0, 1], [4, 0], [2, 4], [1, 3], [1, 1]])
    arguments = (queries, data, rotation_of(60), widths, variances, pairs)
    _, counts = check(backend, arguments, rotated)
    # With one subspace twice, nothing is closer than the radius, which a key sets.
    assert not counts[4].any()


def test_takes_no_rotation_where_rows_are_rotated(backend: Backend) -> None:
    queries, keys = backend.on(torch.randn(3, 20), torch.randn(90, 20))
    rest = ([12, 8], *backend.on(torch.tensor([12.0, 8.0]), torch.tensor([[0, 1]])))
    form = {"rotated": True, "backend": backend.name}
    radius = ops.ksg_radius(queries, keys, None, *rest, **form)
    eye = torch.eye(20, device=backend.device)
    assert torch.equal(radius, ops.ksg_radius(queries, keys, eye, *rest, **form))


@pytest.mark.parametrize("keys", [1, 63, 64, 65, 3000])
def test_in_one_op_is_the_two_ops(backend: Backend, keys: int) -> None:
    keys = min(keys, backend.few(3000, 130))
    heavy = torch.distributions.StudentT(1.5).sample((keys + 23, 55))
    heavy[: keys // 2] = heavy[0]  # ties
    pairs = torch.tensor([[0, 1], [0, 2], [0, 3], [3, 0], [2, 3], [1, 1]])
    variances = torch.tensor([1.0, 4.0, 0.0, 30.0])
    rows = (heavy[keys:][: backend.few(23, 2)], heavy[:keys], rotation_of(55), [1, 5, 16, 33])
    given = on(backend, (*rows, variances, pairs))
    radius, counts = ops.ksg_radius_and_counts(*given, backend=backend.name)
    assert torch.equal(radius, ops.ksg_radius(*given, backend=backend.name))
    assert torch.equal(counts, ops.ksg_counts(*given, radius, backend=backend.name))


def test_in_one_op_where_all_keys_are_near(isa: str) -> None:
    """No key is near in both subspaces, so the radius spans all: more than there is room to note."""
    generator = torch.Generator().manual_seed(0)
    near, far = torch.rand(2, 10_000, 1, generator=generator)
    keys = torch.cat([torch.cat([near, far + 10], 1), torch.cat([far + 10, near], 1)])
    queries = torch.rand(600, 2, generator=generator)
    arguments = (queries, keys, torch.eye(2), [1, 1], torch.ones(2), torch.tensor([[0, 1]]))
    radius, counts = ops.ksg_radius_and_counts(*arguments, backend="cpu")
    assert counts.sum() > 11e6
    assert torch.equal(radius, ops.ksg_radius(*arguments, backend="cpu"))
    assert torch.equal(counts, ops.ksg_counts(*arguments, radius, backend="cpu"))


def test_counts_are_strict(backend: Backend) -> None:
    """Every radius is set by a key, which is never below it: with one subspace twice nothing is."""
    rows = torch.randn(backend.few(40, 3), 20), torch.randn(backend.few(999, 130), 20), rotation_of(20)
    pairs = torch.tensor([[0, 0], [1, 1]])
    given = on(backend, (*rows, [12, 8], torch.tensor([12.0, 8.0]), pairs))
    assert not ops.ksg_radius_and_counts(*given, backend=backend.name)[1].any()


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e15, 1e19, 1e25, 1e37])
@pytest.mark.parametrize("shares", [False, True], ids=["variance 1", "its own variance"])
def test_scale_does_not_matter(backend: Backend, scale: float, shares: bool) -> None:
    rows = torch.randn(3, 20), torch.randn(130, 20), rotation_of(20)
    variances, pairs = torch.tensor([12.0, 8.0], dtype=torch.float64), torch.tensor([[0, 1]])
    given = on(backend, (*rows, [12, 8], variances, pairs))
    radius, counts = ops.ksg_radius_and_counts(*given, backend=backend.name)
    variances = variances * scale**2 if shares else variances
    scaled = (rows[0] * scale, rows[1] * scale, rows[2], [12, 8], variances, pairs)
    found, same = ops.ksg_radius_and_counts(*on(backend, scaled), backend=backend.name)
    torch.testing.assert_close(found, radius * (1 if shares else scale), rtol=1e-5, atol=0)
    assert (same - counts).abs().max() <= 1
    exact = reference.ksg_radius(*scaled)
    torch.testing.assert_close(found.cpu().double(), exact, rtol=1e-5, atol=0)
    again = ops.ksg_counts(*on(backend, scaled), found, backend=backend.name)
    assert torch.equal(again, same)


def test_equal_rows_have_distance_zero(backend: Backend) -> None:
    keys = torch.randn(5, 20).repeat(20, 1)
    given = on(
        backend, (keys[:2], keys, torch.eye(20), [12, 8], torch.tensor([12.0, 8.0]), torch.tensor([[0, 1]]))
    )
    radius, counts = ops.ksg_radius_and_counts(*given, rotated=True, backend=backend.name)
    assert not radius.any()
    assert not counts.any()
    nothing = torch.full_like(radius, 1e-30)
    counts = ops.ksg_counts(*given, nothing, rotated=True, backend=backend.name)
    assert bool((counts == 20).all())


def test_queries_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from ndm_fast.kernels import ksg

    monkeypatch.setattr(ksg, "_DISTANCE_BYTES", 2 * 4 * 4 * 65)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    test_matches_oracle(Backend("triton", device, device == "cpu"), 65, False)


@pytest.mark.skipif(not backends.has_triton_installed(), reason="triton is not installed")
def test_the_triton_kernels_keep_nan() -> None:
    from ndm_fast.kernels import ksg

    device = "cuda" if torch.cuda.is_available() else "cpu"
    queries, keys = torch.randn(3, 4), torch.randn(70, 4)
    queries[1, 0] = torch.nan
    rest = ([2, 2], torch.ones(2, device=device), torch.tensor([[0, 1]], device=device))
    radius = ksg.ksg_radius(*(x.to(device) for x in (queries, keys, torch.eye(4))), *rest)
    assert radius.isnan()[0].tolist() == [False, True, False]


def test_writes_every_output(backend: Backend, poisoned_outputs: None) -> None:
    test_matches_oracle(backend, 65, False)
