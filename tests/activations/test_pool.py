"""The pool: every row once, keys that were no queries, and exact restoring."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ndm_fast.activations import pool_storage
from ndm_fast.activations.pool import ActivationPool, PoolConfig
from ndm_fast.activations.pool_storage import choose_place, memory_line
from ndm_fast.activations.rows import TensorStream, take_rows
from ndm_fast.errors import InputError
from ndm_fast.seeds import seeded


def numbered(sizes: list[int], width: int = 3) -> TensorStream:
    """A stream whose row number i is filled with i."""
    rows = torch.arange(sum(sizes)).float()[:, None].expand(-1, width).clone()
    return TensorStream(rows.split(sizes))


def ids(rows: torch.Tensor) -> list[int]:
    return [int(value) for value in rows[:, 0]]


def pool_of(stream: Any, rows: int, keys: int, state: dict[str, Any] | None = None, **settings: Any) -> Any:
    """A filled pool, or one that goes on from a state."""
    pool = ActivationPool(stream, PoolConfig(rows, keys, **settings))
    if state:
        pool.load_state_dict(state, settings.get("queries"))
    pool.fill()
    return pool


class Endless:
    """Batches of 7 rows without end, numbered through; remembers where reading began."""

    def __init__(self) -> None:
        self.starts: list[int] = []

    def batches(self, start: int = 0):
        self.starts.append(start)
        while True:
            yield torch.arange(7 * start, 7 * start + 7).float()[:, None].expand(-1, 2)
            start += 1


@given(
    rows=st.integers(2, 60),
    data=st.data(),
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=30),
)
def test_every_row_appears_once_in_queries_and_what_is_left(rows, data, sizes):
    sizes = [*sizes, rows]
    keys = data.draw(st.integers(1, rows - 1))
    pool = pool_of(numbered(sizes), rows, keys, seed=data.draw(st.integers(0, 5)))
    free = rows - keys
    taken: list[int] = []
    while len(taken) < free:
        part = pool.take(data.draw(st.integers(1, free - len(taken))))
        taken += ids(part)
        window = pool.next_keys()
        assert window.shape == (keys, 3)
        assert not set(ids(window)) & set(taken)
        assert ids(pool.peek_keys()) == ids(window)
        assert len(set(ids(window))) == keys
    assert sorted(taken + ids(pool.next_keys())) == list(range(rows))


def test_nothing_is_read_before_the_first_use(free):
    """But room is found, or refused, before."""
    stream = Endless()
    pool = ActivationPool(stream, PoolConfig(21, 7))
    pool.reserve(2)
    assert pool.state_dict()["scale"] is None
    assert stream.starts == []
    with pytest.raises(InputError, match="--pool-rows to"):
        pool.reserve(1000)
    pool.peek_keys()
    pool.take(3)
    assert stream.starts == [0]


def test_keys_are_views_and_pass_over_all_that_is_left():
    pool = pool_of(numbered([64]), 64, 16)
    storage = pool.take(4).untyped_storage().data_ptr()
    windows = [pool.next_keys() for _ in range(3)]
    assert all(window.untyped_storage().data_ptr() == storage for window in windows)
    seen = [i for window in windows for i in ids(window)]
    assert len(set(seen)) == 48
    assert ids(pool.next_keys()) == ids(windows[0])


def test_rows_are_shuffled_over_batches_and_by_seed():
    orders = [ids(pool_of(numbered([8] * 8), 64, 1, seed=seed).take(63)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    moved = sum(abs(place - i) for place, i in enumerate(orders[0])) / 63
    assert moved > 12  # a shuffle inside batches of 8 would give less than 8


def test_refill_goes_on_where_the_stream_stood():
    stream = Endless()
    pool = pool_of(stream, 21, 7, first_batch=2)
    generations = []
    for _ in range(3):
        queries = ids(pool.take(14))
        generations.append(sorted(queries + ids(pool.next_keys())))
    assert stream.starts == [2, 5, 8]
    assert generations == [list(range(start, start + 21)) for start in (14, 35, 56)]


def test_a_refill_comes_when_too_few_are_left_and_changes_the_order():
    pool = pool_of(Endless(), 21, 7)
    first = ids(pool.take(10))
    second = ids(pool.take(10))  # only 4 would have been left beside the keys
    assert set(first) <= set(range(21))
    assert set(second) <= set(range(21, 42))
    assert [i - 21 for i in second] != first


@settings(max_examples=40)
@given(before=st.lists(st.integers(1, 14), max_size=6), after=st.lists(st.integers(1, 14), max_size=6))
def test_restored_pools_have_the_same_future(before, after):
    def play(pool: ActivationPool, counts: list[int]) -> list[list[int]]:
        return [
            ids(rows) for count in counts for rows in (pool.take(count), pool.peek_keys(), pool.next_keys())
        ]

    pool = pool_of(Endless(), 21, 7, seed=3, first_batch=1, dtype=torch.float16)
    play(pool, before)
    restored = pool_of(Endless(), 21, 7, seed=3, first_batch=1, dtype=torch.float16, state=pool.state_dict())
    assert restored.state_dict() == pool.state_dict()
    assert ids(restored.peek_keys()) == ids(pool.peek_keys())
    assert play(restored, after) == play(pool, after)


@pytest.mark.parametrize(
    ("largest", "dtype", "scale"),
    [
        (100.0, torch.float16, 1.0),
        (1e5, torch.float16, 2**-3),
        (3e38, torch.float16, 2.0**-114),
        (1e5, torch.bfloat16, 1.0),
        (1e30, torch.float32, 1.0),
    ],
)
def test_scale_is_a_power_of_two_that_fits(largest, dtype, scale):
    rows = torch.tensor([[1.0, largest], [-largest, 2.0]], dtype=torch.float64)
    pool = pool_of(TensorStream([rows.float()]), 2, 1, dtype=dtype)
    assert pool.scale is not None
    assert pool.scale == scale
    stored = torch.cat([pool.take(1), pool.next_keys()])
    assert stored.dtype == dtype
    assert torch.isfinite(stored).all()
    assert stored.abs().max() <= torch.finfo(dtype).max / 4
    assert float(stored.abs().max()) / pool.scale == pytest.approx(largest, rel=1e-2)


@pytest.mark.parametrize(
    ("later", "dtype"), [(1e6, torch.float16), (float("nan"), torch.float32), (float("inf"), torch.bfloat16)]
)
def test_overflow_names_the_remedy(later, dtype):
    stream = TensorStream([torch.ones(2, 2), torch.full((2, 2), later)])
    with pytest.raises(InputError, match="set --pool-dtype bfloat16 or float32"):
        pool_of(stream, 4, 1, dtype=dtype)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_first_rows_that_are_not_finite_are_refused(value):
    with pytest.raises(InputError, match="not finite"):
        pool_of(TensorStream([torch.full((4, 2), value)]), 4, 1, dtype=torch.float16)


def test_streams_that_are_too_short_are_refused():
    with pytest.raises(InputError, match=r"ended after 5 activations, 8 are needed.*--repeat-data"):
        pool_of(numbered([3, 2]), 8, 2)
    with pytest.raises(InputError, match="ended after 5 activations, 6"):
        take_rows(numbered([3, 2]).batches(), 6)
    pool = pool_of(numbered([8, 5]), 8, 2)
    pool.take(6)
    with pytest.raises(InputError, match="ended after 5 activations, 8"):
        pool.take(1)


@pytest.mark.parametrize(("rows", "keys"), [(4, 4), (4, 9)])
def test_pools_without_queries_are_refused(rows, keys):
    with pytest.raises(InputError, match="raise pool_rows"):
        pool_of(numbered([20]), rows, keys)


def test_more_queries_than_fit_are_refused():
    with pytest.raises(InputError, match="raise pool_rows"):
        pool_of(numbered([20]), 10, 4).take(7)


def test_tensor_streams_start_anywhere():
    stream = numbered([2, 3, 1])
    assert [ids(batch) for batch in stream.batches()] == [[0, 1], [2, 3, 4], [5]]
    assert [ids(batch) for batch in stream.batches(2)] == [[5]]
    assert list(stream.batches(3)) == []


def test_take_rows_cuts_and_counts_batches():
    rows, batches = take_rows(numbered([3, 3, 3]).batches(), 4)
    assert ids(rows) == [0, 1, 2, 3]
    assert batches == 2


def test_generators_differ_by_seed_and_purpose():
    draws = [
        float(torch.rand(1, generator=seeded(*numbers)))
        for numbers in [(0, 0), (0, 1), (1, 0), (0, 1, 0), (0, 1, 1)]
    ]
    assert len(set(draws)) == len(draws)
    assert float(torch.rand(1, generator=seeded(0, 1))) == draws[1]
    seeded(2**40, 3)
    seeded(-1, 3)


def test_memory_is_stated():
    assert memory_line(4_194_304, 768, torch.float16, "cuda:0") == (
        "pool: 4,194,304 rows x 768 x float16 = 6.00 GiB on cuda:0"
    )


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Free memory by kind of device, in bytes; the GPU need not exist."""
    bytes_free = {"cpu": 1000, "cuda": 1000}
    monkeypatch.setattr(pool_storage, "free_memory", lambda device: bytes_free[device.type])
    return bytes_free


def test_a_pool_that_does_not_fit_says_what_would(free):
    """900 bytes can be used, a row takes 12."""
    with pytest.raises(InputError, match=r"a pool of 76 rows .* set --pool-rows to 75 or less"):
        pool_of(Endless3(), 76, 10)
    pool_of(Endless3(), 75, 10)
    pool_of(Endless3(), 150, 10, dtype=torch.bfloat16)


class Endless3:
    def batches(self, start: int = 0):
        while True:
            yield torch.ones(9, 3)


@pytest.mark.parametrize(
    ("cuda", "cpu", "place"),
    [
        (4000, 0, ("cuda", False, True)),
        (2000, 0, ("cuda", False, False)),
        (1000, 2300, ("cpu", True, False)),  # 1600 bytes, for which torch takes 2048
        (1000, 4500, ("cpu", True, False)),
        (1000, 4600, ("cpu", True, True)),
    ],
)
def test_a_gpu_without_room_has_its_pool_in_host_memory(free, caplog, cuda, cpu, place):
    """A decision only: there is no GPU here."""
    free |= {"cuda": cuda, "cpu": cpu}
    found = choose_place(100, 4, torch.float32, torch.device("cuda", 0))
    assert (found.device.type, found.pinned, found.spare) == place
    assert [("pinned host memory" in line) for line in caplog.messages] == [True] * found.pinned


def test_what_torch_takes_for_pinned_memory_is_said(free, caplog):
    """19.3 GiB would fit, the block that holds them does not."""
    free |= {"cuda": 2**30, "cpu": 60 * 2**30}
    choose_place(4_500_000, 2304, torch.float16, torch.device("cuda", 0))
    assert "19.31 GiB" in caplog.text
    assert "torch takes 32.00 GiB, a power of two" in caplog.text
    free["cpu"] = 30 * 2**30
    with pytest.raises(InputError, match=r"19.31 GiB \(32.00 GiB, a power of two") as refusal:
        choose_place(4_500_000, 2304, torch.float16, torch.device("cuda", 0))
    fitting = int(re.search(r"--pool-rows to (\d+)", str(refusal.value))[1])
    assert fitting * 2304 * 2 <= 2**34 < (fitting + 1) * 2304 * 2
    assert choose_place(fitting, 2304, torch.float16, torch.device("cuda", 0)).pinned


def test_a_gpu_pool_that_fits_nowhere_is_refused(free):
    with pytest.raises(InputError, match="set --pool-rows to 56 or less"):
        choose_place(100, 4, torch.float32, torch.device("cuda", 0))


def test_free_memory_of_this_machine_is_known():
    assert 2**20 < pool_storage.free_memory(torch.device("cpu")) < 2**50


@settings(max_examples=30)
@given(counts=st.lists(st.integers(1, 14), min_size=1, max_size=9), stop=st.integers(0, 8))
def test_generations_filled_ahead_are_the_same(counts, stop):
    """Also for a pool that is restored from another's state."""

    def play(pool: ActivationPool, counts: list[int]) -> list[list[int]]:
        return [ids(rows) for count in counts for rows in (pool.take(count), pool.next_keys())]

    plain = pool_of(Endless(), 21, 7, seed=3)
    ahead = pool_of(Endless(), 21, 7, seed=3, queries=sum(counts), ahead=True)
    assert play(ahead, counts[:stop]) == play(plain, counts[:stop])
    assert ahead.state_dict() == plain.state_dict()
    ahead.close()
    left = sum(counts[stop:])
    again = pool_of(Endless(), 21, 7, seed=3, queries=left, ahead=True, state=ahead.state_dict())
    assert play(again, counts[stop:]) == play(plain, counts[stop:])
    again.close()


def test_nothing_is_filled_ahead_that_nobody_takes():
    stream = Endless()
    pool = pool_of(stream, 21, 7, queries=28, ahead=True)
    pool.take(14)
    pool.take(14)
    assert len(stream.starts) == 2
    short = pool_of(numbered([21, 5]), 21, 7, queries=20, ahead=True)
    short.take(14)
    with pytest.raises(InputError, match="ended after 5 activations, 21"):
        short.take(6)
