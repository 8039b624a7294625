"""Shadows are no farther apart than rows, and axes are a turn of each subspace in itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_inputs import heavy_tailed, rotation_of

from ndm_fast.geometry import shadow

ROWS = {
    "noise": lambda n, p: torch.randn(n, p),
    "heavy-tailed": heavy_tailed,
    "tied": lambda n, p: torch.randn(1, p).repeat(n, 1),
    "constant": lambda n, p: torch.full((n, p), 3.5),
    "zero": lambda n, p: torch.zeros(n, p),
    "in a line": lambda n, p: torch.randn(n, 1) * torch.randn(1, p),
    "far away": lambda n, p: 1e6 + torch.randn(n, p),
}


@pytest.mark.parametrize("kind", ROWS)
@settings(max_examples=30)
@given(width=st.integers(1, 70), part=st.floats(0, 1), seed=st.integers(0, 2**30))
def test_a_shadow_is_no_farther(kind: str, width: int, part: float, seed: int) -> None:
    torch.manual_seed(seed)
    queries, keys = ROWS[kind](5, width).double(), ROWS[kind](9, width).double()
    columns = int(part * width)
    true = torch.cdist(queries, keys, compute_mode="donot_use_mm_for_euclid_dist")
    seen = torch.cdist(
        *(shadow.shadow(rows, columns) for rows in (queries, keys)),
        compute_mode="donot_use_mm_for_euclid_dist",
    )
    assert bool((seen <= true + 1e-12 * (queries.norm(dim=1)[:, None] + keys.norm(dim=1))).all())


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("widths", [[1], [5, 5, 3], [40, 24]], ids=str)
def test_axes_turn_each_subspace_in_itself(kind: str, widths: list[int]) -> None:
    torch.manual_seed(0)
    keys, rotation = ROWS[kind](300, sum(widths)), rotation_of(sum(widths))
    turned = shadow.axes_of(rotation, keys, keys.mean(0), widths).turned
    for before, after in zip(rotation.split(widths, 1), turned.split(widths, 1), strict=True):
        torch.testing.assert_close(after @ after.T, before @ before.T, rtol=0, atol=2e-6)
        torch.testing.assert_close(after.T @ after, torch.eye(after.shape[1]), rtol=0, atol=2e-6)


def test_the_first_columns_say_most() -> None:
    torch.manual_seed(0)
    keys = torch.randn(2000, 32) * torch.logspace(0, -2, 32)
    rotation = torch.eye(32)
    mixed = keys @ rotation_of(32)
    turned = shadow.axes_of(rotation, mixed, None, [32]).turned
    spread = (mixed @ turned).var(0)
    assert float(spread[:8].sum() / spread.sum()) > 0.95 * float(keys.var(0)[:8].sum() / keys.var(0).sum())


def test_nan_in_the_sample_spoils_no_axis() -> None:
    torch.manual_seed(0)
    keys = torch.randn(200, 12)
    keys[3, 2], keys[7, 0] = torch.nan, torch.inf
    turned = shadow.axes_of(torch.eye(12), keys, torch.zeros(12), [8, 4]).turned
    torch.testing.assert_close(turned.T @ turned, torch.eye(12), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("queries", "keys", "widths", "expected"),
    [
        (4096, 32768, [96] * 8, True),
        (1024, 16384, [96] * 8, False),  # to look would take too much of the search
        (4096, 16384, [32] * 12, True),
        (4096, 98304, [72] * 32, True),
        (4096, 16384, [384] * 6, False),
        (1024, 65536, [24] * 32, False),  # too narrow
        (16, 16384, [96] * 8, False),  # axes would take longer than the search
    ],
)
def test_shadows_are_for_searches_that_are_worth_it(
    queries: int, keys: int, widths: list[int], expected: bool
) -> None:
    assert shadow.pays(queries, keys, widths) is expected


def test_little_is_left_where_few_directions_say_all() -> None:
    torch.manual_seed(0)
    steep = torch.randn(2000, 96) * torch.logspace(0, -2, 96)
    noise = torch.randn(2000, 96)
    constant = torch.zeros(2000, 96)
    keys = torch.cat([steep @ rotation_of(96), noise, constant], 1)
    rest = shadow.axes_of(torch.eye(288), keys, keys.mean(0), [96, 96, 96]).rest
    variances = steep.var(0).sort(descending=True).values
    assert rest[0] == pytest.approx(float(variances[48:].sum() / variances.sum()), rel=0.2)
    assert 0.3 < rest[1] <= 0.5
    assert rest[2] == 1  # nothing is known to be saved
    assert shadow.saved(rest[:1], [96]) > 0.3
    assert shadow.saved(rest[1:2], [96]) < 0
    assert shadow.saved(rest[2:], [96]) < 0
    mean = (shadow.saved(rest[:1], [96]) * 96 + shadow.saved(rest[1:2], [32]) * 32) / 128
    assert shadow.saved(rest[:2], [96, 32]) == pytest.approx(mean)


def test_the_cosine_sees_no_lengths() -> None:
    torch.manual_seed(0)
    keys = torch.randn(1000, 16)
    scaled = keys * torch.logspace(0, 4, 1000)[torch.randperm(1000)][:, None]
    found = (shadow.axes_of(torch.eye(16), rows, None, [16]) for rows in (keys, scaled))
    same, other = found
    torch.testing.assert_close(same.turned, other.turned, rtol=0, atol=1e-4)
    assert same.rest == pytest.approx(other.rest, rel=1e-4)


@pytest.mark.parametrize(
    ("queries", "keys", "width", "share", "expected"),
    [
        (8192, 32768, 96, None, True),
        (1024, 32768, 96, None, False),  # to look would take too much of the search
        (4096, 32768, 96, 0.4, True),
        (4096, 32768, 96, 0.05, False),  # turning would take more than shadows save
        (4096, 32768, 24, 0.4, False),  # too narrow
        (4096, 409600, 96, 0.4, False),  # too large a copy
    ],
)
def test_rotated_keys_are_turned_where_it_pays(
    queries: int, keys: int, width: int, share: float | None, expected: bool
) -> None:
    assert shadow.turning_pays(queries, keys, width, share) is expected
