"""Phases of a run: learning rate, escapes and merge checks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ndm_fast.config import MergeConfig, TrainConfig
from ndm_fast.errors import InputError
from ndm_fast.train.schedule import Schedule


def make(
    max_steps: int = 100,
    *,
    start: int | None = None,
    interval: int = 10,
    tries: int = 0,
    escape_steps: int = 5,
    warmup: int = 0,
    schedule: str = "linear",
    merge_lr: float | None = None,
) -> Schedule:
    train = TrainConfig(
        max_steps=max_steps,
        escape_tries=tries,
        escape_steps=escape_steps,
        warmup_steps=warmup,
        schedule=schedule,
        lr=1.0,
    )
    return Schedule(train, MergeConfig(merge_start=start, merge_interval=interval, merge_lr=merge_lr))


def bounds(schedule: Schedule) -> list[int]:
    """First step of every phase, and the end of the last."""
    found = [0]
    while found[-1] < schedule.train.max_steps:
        first, end = schedule.phase(found[-1])
        assert first == found[-1]
        found.append(end)
    return found


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (make(), [0, 100]),
        (make(start=60, interval=20), [0, 60, 80, 100]),
        (make(start=60, interval=30), [0, 60, 90, 100]),
        (make(start=200), [0, 100]),
        (make(start=100), [0, 100]),
        (make(start=60, interval=20, tries=2), [0, 50, 55, 60, 80, 100]),
        (make(tries=2), [0, 90, 95, 100]),
        (make(start=200, tries=1), [0, 95, 100]),
    ],
)
def test_phases(schedule, expected):
    assert bounds(schedule) == expected


def test_escapes_and_merge_checks_come_at_their_steps():
    schedule = make(start=60, interval=20, tries=2)
    steps = range(120)
    assert [s for s in steps if schedule.is_escape(s)] == [50, 55, 60]  # two begin, the last is judged
    assert [s for s in steps if schedule.is_merge_check(s)] == [60, 80, 100]
    assert not any(make().is_merge_check(s) or make().is_escape(s) for s in steps)


def test_rate_rises_then_falls_in_every_phase():
    schedule = make(40, start=20, interval=20, warmup=4)
    rates = [schedule.learning_rate(step) for step in range(40)]
    assert rates[:4] == pytest.approx([0.25, 0.5 * 0.95, 0.75 * 0.9, 0.85])
    assert rates[4:20] == pytest.approx([(20 - step) / 20 for step in range(4, 20)])
    assert rates[20:] == rates[:20]


def test_rate_after_the_first_merge_check_can_be_another():
    plain, lower = (make(40, start=20, interval=20, merge_lr=rate) for rate in (None, 0.25))
    assert [lower.learning_rate(step) for step in range(20)] == [
        plain.learning_rate(step) for step in range(20)
    ]
    assert [lower.learning_rate(s) for s in range(20, 40)] == [
        plain.learning_rate(s) / 4 for s in range(20, 40)
    ]


def test_constant_rate_warms_up_and_stays():
    schedule = make(40, start=20, interval=20, warmup=2, schedule="constant")
    assert [schedule.learning_rate(step) for step in (0, 1, 2, 19, 20, 21, 39)] == [0.5, 1, 1, 1, 0.5, 1, 1]


@pytest.mark.parametrize("schedule", ["linear", "constant"])
@given(data=st.data())
def test_phases_tile_the_run_and_rates_stay_positive(schedule, data):
    max_steps = data.draw(st.integers(1, 60))
    start = data.draw(st.none() | st.integers(1, 80))
    merging_from = max_steps if start is None else min(start, max_steps)
    escape_steps = data.draw(st.integers(1, 10))
    tries = data.draw(st.integers(0, max(0, (merging_from - 1) // escape_steps)))
    made = make(
        max_steps,
        start=start,
        interval=data.draw(st.integers(1, 20)),
        tries=tries,
        escape_steps=escape_steps,
        warmup=data.draw(st.integers(0, 10)),
        schedule=schedule,
    )
    edges = bounds(made)
    assert edges == sorted(set(edges))
    assert edges[-1] == max_steps
    for step in range(1, max_steps):
        assert (step in edges) == (made.is_escape(step) or made.is_merge_check(step))
        first, end = made.phase(step)
        assert first <= step < end
        assert 0 < made.learning_rate(step) <= 1
    assert sum(made.is_escape(step) for step in range(max_steps + 1)) == (tries + 1 if tries else 0)


@pytest.mark.parametrize(("start", "tries"), [(60, 12), (None, 20)])
def test_escapes_that_do_not_fit_are_refused(start, tries):
    with pytest.raises(InputError, match="lower escape_tries or raise merge_start"):
        make(start=start, tries=tries)
