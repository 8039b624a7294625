"""How a search on a GPU is dealt out over launches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ndm_fast.kernels import launch


@given(
    widths=st.lists(st.sampled_from([3, 3, 8, 20]), min_size=1, max_size=9),
    queries=st.integers(1, 1000),
    keys=st.integers(1, 5000),
    room=st.sampled_from([1, 5_000, 200_000, 1 << 28]),
)
def test_every_query_meets_every_subspace_once(widths: list[int], queries: int, keys: int, room: int) -> None:
    seen = torch.zeros(len(widths), queries, dtype=torch.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "MINIMA_BYTES", room)
        portions = list(launch.portions(widths, queries, keys, lambda width: 64 if width < 20 else 16))
    for subspaces, columns, group in portions:
        seen[subspaces, group] += 1
        part = widths[subspaces]
        assert len(set(part)) == 1
        assert (columns.start, columns.stop) == (
            sum(widths[: subspaces.start]),
            sum(widths[: subspaces.stop]),
        )
        held = 4 * len(part) * (group.stop - group.start) * -(-keys // (64 if part[0] < 20 else 16))
        assert held <= room or (len(part) == 1 and group.stop - group.start <= 128)
    assert bool((seen == 1).all())


def test_subspaces_are_split_before_queries() -> None:
    """GPT-2's search for 32 batches at once: each launch has all queries, so keys are read once."""
    portions = list(launch.portions([32] * 24, 4096, 409_600, lambda width: 128))
    assert all(group == slice(0, 4096) for _, _, group in portions)
    assert len(portions) == 5
