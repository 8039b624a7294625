"""What a subspace holds, in words."""

import pytest

from ndm_fast.evaluate.purity.purity import SHARES
from ndm_fast.evaluate.purity.reading import describe, read_subspaces


def row(**shares):
    shares = {**dict.fromkeys(SHARES, 0.1), **shares}
    return {**shares, "intervals": {name: [value - 0.02, value + 0.02] for name, value in shares.items()}}


@pytest.mark.parametrize(
    ("shares", "reading"),
    [
        ({"position_within_3": 0.99, "same_token": 0.2}, "position"),
        ({"same_token": 0.9}, "current token"),
        ({"same_previous_token": 0.7, "same_token": 0.65}, "previous token"),
        ({"same_next_token": 0.61}, "next token"),
        ({"same_document": 0.8}, "document"),
        ({"same_token": 0.51}, "unclear"),  # its interval reaches below one half
        ({"same_position": 0.9}, "unclear"),
        ({}, "unclear"),
    ],
)
def test_clear_evidence_is_named(shares, reading):
    others = [row(position_within_3=0.25) for _ in range(4)]
    assert read_subspaces([row(**shares), *others]) == [reading] + ["unclear"] * 4


def test_what_all_subspaces_share_tells_of_none():
    """In short rows of text, every neighbor is near."""
    assert read_subspaces([row(position_within_3=0.9)] * 4) == ["unclear"] * 4
    assert read_subspaces([row(same_token=0.9)] * 3) == ["unclear"] * 3


def test_every_subspace_is_read_by_itself():
    rows = [row(same_token=0.9), row(same_token=0.3), row(same_token=0.3, position_within_3=0.9)]
    assert read_subspaces(rows) == ["current token", "unclear", "position"]


@pytest.mark.parametrize(
    ("reading", "variable", "line"),
    [
        ("unclear", "mixed", "mixed, in part current token (42 %)"),
        ("position", "position", "position (10 % within 3)"),
        ("next token", "next token", "next token (10 % of neighbors)"),
        ("label", "label", "label (77 % of neighbors)"),
    ],
)
def test_a_line_gives_the_share_behind_the_reading(reading, variable, line):
    told = {**row(same_token=0.42, same_label=0.77), "reading": reading}
    assert describe(told) == (variable, line)


def test_a_line_does_not_overstate_small_shares():
    assert describe({**row(same_document=0.2), "reading": "unclear"}).line == "mixed, at most document (20 %)"
