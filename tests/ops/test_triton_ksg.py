"""Triton's KSG ops against the fp64 oracle: on the GPU where there is one, else through the interpreter."""

from __future__ import annotations

import pytest
import torch
from oracle_inputs import rotation_of
from torch import Tensor

from ndm_fast.geometry import reference
from ndm_fast.kernels import ksg
from ndm_fast.ops import backends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.skipif(not backends.has_triton_installed(), reason="triton is not installed"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("keys", [1, 65, 1030])
def test_ksg_matches_oracle(keys: int, rotated: bool) -> None:
    widths = [1, 5, 5, 12]
    data, queries = torch.randn(keys, 23) + 2, torch.randn(5, 23) + 2
    rotation, variances = rotation_of(23), torch.tensor([1.0, 4.0, 0.0, 30.0])
    pairs = torch.tensor([[0, 1], [3, 0], [2, 3], [1, 1]])
    arguments = (queries, data, rotation, widths, variances, pairs)
    given = [x.to(DEVICE) if isinstance(x, Tensor) else x for x in arguments]
    radius = ksg.ksg_radius(*given, rotated=rotated)
    counts = ksg.ksg_counts(*given, radius, rotated=rotated).cpu()
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
    radius = ksg.ksg_radius(*(x.to(DEVICE) for x in (queries, keys, torch.eye(4))), *rest)
    assert radius.isnan()[0].tolist() == [False, True, False]


def test_ksg_queries_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ksg, "_DISTANCE_BYTES", 2 * 4 * 4 * 65)
    test_ksg_matches_oracle(65, False)


def test_writes_every_output(poisoned_outputs: None) -> None:
    test_ksg_matches_oracle(65, False)
