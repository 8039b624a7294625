"""Several ranks on gloo: they do what one process does, and none is left waiting."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Forked, wait_for

from ndm_fast import ops
from ndm_fast.activations.pool import ActivationPool, PoolConfig
from ndm_fast.activations.rows import TensorStream
from ndm_fast.config import MergeConfig, RunSettings, TrainConfig
from ndm_fast.distributed import TIMEOUT_VARIABLE, together
from ndm_fast.errors import InputError, RanksError
from ndm_fast.geometry.objective import loss_and_gradient
from ndm_fast.geometry.orthogonal import random_rotation
from ndm_fast.ranks import Group, Launch, Ranks, launched
from ndm_fast.run.checkpoint import load_checkpoint
from ndm_fast.seeds import seeded
from ndm_fast.train import over_ranks
from ndm_fast.train.merge.mutual_information import mutual_information
from ndm_fast.train.trainer import Observer, Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTHS = (4, 4, 2, 1, 1)


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun tells a process."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in names.items()}}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def in_ranks(tmp_path: Path) -> Callable[..., list[Any]]:
    """Run ``work(group)`` in forked processes, and get what it gave on every rank."""

    def run(size: int, shared: str, work: Callable[[Group], Any]) -> list[Any]:
        port = free_port()

        def be(rank: int) -> None:
            torch.set_num_threads(1)
            os.environ.update(environment(rank, size, port))
            with together(shared, "cpu") as group:
                torch.save(work(group), tmp_path / f"{rank}.pt")

        context = multiprocessing.get_context("fork")
        processes = [context.Process(target=be, args=(rank,)) for rank in range(size)]
        for process in processes:
            process.start()
        deadline = time.monotonic() + 60
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        for process in processes:
            process.kill()  # one that hangs, which Python would wait for at its end
            process.join()
        assert [process.exitcode for process in processes] == [0] * size
        return [torch.load(tmp_path / f"{rank}.pt") for rank in range(size)]

    return run


def rows_of(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, sum(WIDTHS), generator=seeded(seed))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_neighbors_of_shards_are_those_of_all_keys(in_ranks, size, metric):
    rotation = random_rotation(sum(WIDTHS), seeded(3))
    queries, keys = rows_of(40, 1), rows_of(301, 2)
    keys[150:] = keys[:151].clone()  # every key twice: the lowest number wins, whichever rank has it
    keys[7] = queries[5]  # at distance zero, or a little below it for the cosine
    expected = ops.nearest_neighbors(queries, keys, rotation, WIDTHS, metric=metric)

    def work(group: Group) -> tuple[torch.Tensor, ...]:
        part = group.keys.share(keys)
        return tuple(
            over_ranks.nearest_neighbors(group.keys, queries, part, rotation, WIDTHS, metric, "fp32")
        )

    for distance, index in in_ranks(size, "keys", work):
        assert torch.equal(index, expected.index)
        torch.testing.assert_close(distance, expected.distance, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shared", ["queries", "keys"])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_the_parts_of_a_gradient_add_up(in_ranks, shared, metric):
    rotation = random_rotation(sum(WIDTHS), seeded(3))
    queries, keys = rows_of(40, 1), rows_of(300, 2)
    keys[7] = queries[5]
    index = ops.nearest_neighbors(queries, keys, rotation, WIDTHS, metric=metric).index
    expected = loss_and_gradient(queries, keys, index, rotation, WIDTHS, metric)

    def work(group: Group) -> list[torch.Tensor]:
        places, here = group.keys.owned(group.queries.share(index.T).T)
        given = group.queries.share(queries), group.keys.share(keys), places
        part = loss_and_gradient(*given, rotation, WIDTHS, metric, here)
        return [group.combine(each) for each in part]

    for found in in_ranks(4, shared, work):
        torch.testing.assert_close(found[0], expected.by_subspace, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[1], expected.gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_shared_pool_holds_the_rows_of_one_pool(in_ranks, dtype):
    """An odd number of rows, three fillings, windows of keys that move."""
    stream = TensorStream([rows_of(50, seed) * 1e5 for seed in range(20)])

    def draw(ranks: Ranks) -> list[torch.Tensor]:
        pool = ActivationPool(stream, PoolConfig(253, 60, dtype=dtype, seed=4), ranks)
        return [each.clone() for _ in range(9) for each in (pool.take(47), pool.next_keys())]

    for size in (2, 3):
        expected = draw(Ranks())
        for rank, found in enumerate(in_ranks(size, "keys", lambda group: draw(group.keys))):
            for number, (mine, whole) in enumerate(zip(found, expected, strict=True)):
                assert torch.equal(mine, whole[rank::size] if number % 2 else whole)


@pytest.mark.parametrize("shared", ["queries", "keys"])
def test_information_is_that_of_one_process_and_the_same_everywhere(in_ranks, shared):
    rotation = random_rotation(sum(WIDTHS), seeded(3))
    queries, keys = rows_of(41, 1), rows_of(303, 2) + 5
    expected = mutual_information(queries, keys, rotation, WIDTHS)

    def work(group: Group) -> torch.Tensor:
        return mutual_information(queries, group.keys.share(keys), rotation, WIDTHS, group=group)

    found = in_ranks(2, shared, work)
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(*found)


class Events(Observer):
    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def event(self, record: dict[str, Any]) -> None:
        self.records.append(record)


TRAIN = TrainConfig(
    unit_size=2,
    queries=16,
    keys=256,
    heldout_queries=65,
    heldout_keys=255,
    pool_rows=701,
    max_steps=48,
    lr=0.02,
    search_every=4,
    start="random",
    escape_tries=1,
    escape_steps=8,
)
SETTINGS = RunSettings(eval_every=16, log_every=4)
MERGE = MergeConfig(merge_threshold="auto", merge_start=24, merge_interval=8, mi_queries=33, mi_keys=201)


def train(group: Group) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    events = Events()
    stream = TensorStream([rows_of(50, seed) for seed in range(60)])
    partition = Trainer(stream, TRAIN, MERGE, SETTINGS, group=group).run(events)
    return partition.rotation, events.records


@pytest.mark.parametrize(("size", "shared"), [(2, "queries"), (4, "keys")])
def test_training_together_is_training_alone(in_ranks, size, shared):
    """To rounding at first; where neighbors are near ties the ways part, and the losses stay together."""
    _, expected = train(Group())
    found = in_ranks(size, shared, train)
    assert {"train", "evaluate", "escape", "merge", "merge_tree"} <= {e["event"] for e in expected}
    for rotation, records in found:
        assert torch.equal(rotation, found[0][0])
        assert json.dumps(records) == json.dumps(found[0][1])
        assert [e["event"] for e in records][:4] == [e["event"] for e in expected][:4]
        for mine, alone in zip(records[:2], expected[:2], strict=True):
            name = "loss" if mine["event"] == "train" else "heldout_loss"
            assert mine[name] == pytest.approx(alone[name], rel=1e-5)
        last, last_alone = (
            [e["heldout_loss"] for e in r if "heldout_loss" in e] for r in (records, expected)
        )
        assert last[-1] == pytest.approx(last_alone[-1], rel=0.03)


def test_drift_is_an_error_on_every_rank(in_ranks):
    def work(group: Group) -> str:
        matrix = torch.eye(4)
        group.all.check_same(matrix, "the rotation")
        matrix[1, 2] += 1e-9 * group.all.rank
        with pytest.raises(RanksError) as raised:
            group.all.check_same(matrix, "the rotation at step 7")
        return str(raised.value)

    for said in in_ranks(2, "queries", work):
        assert said.startswith(
            "the rotation at step 7 differs between the ranks: run them all on the same kind"
        )


def test_all_ranks_take_what_the_first_has(in_ranks):
    def work(group: Group) -> tuple[Any, ...]:
        ranks = group.all
        with pytest.raises(InputError, match="of rank 0"):
            ranks.first(lambda: refuse(ranks.rank))
        made = ranks.first(lambda: {"rank": ranks.rank})
        copied = ranks.of_first(torch.full((3,), ranks.rank))
        return made, copied.tolist(), ranks.any(ranks.rank == 1), ranks.any(False)

    def refuse(rank: int) -> None:
        raise InputError(f"of rank {rank}")

    assert in_ranks(2, "keys", work) == [({"rank": 0}, [0, 0, 0], True, False)] * 2


def test_settings_that_cannot_be_shared_are_named():
    class Three(Ranks):
        size = 3

    with pytest.raises(InputError, match="3 ranks cannot share 16 queries evenly: set --queries to a mult"):
        Group(queries=Three()).check(TRAIN, SETTINGS)
    with pytest.raises(
        InputError, match="3 ranks cannot share 256 keys evenly: set --keys to a multiple of 3"
    ):
        Group(keys=Three()).check(TRAIN, SETTINGS)
    with pytest.raises(InputError, match="cuda_graph captures the steps of one rank"):
        Group(keys=Three()).check(TRAIN, RunSettings(cuda_graph="on"))


def test_what_ranks_share(monkeypatch):
    assert launched() == Launch(0, 1, 0)
    assert Launch().device("cuda") == "cuda"
    for name, value in environment(3, 4, 0).items():
        monkeypatch.setenv(name, value)
    assert launched() == Launch(3, 4, 3)
    assert launched().device("cuda") == "cuda:3"
    assert launched().device("cpu") == "cpu"
    assert launched().shared("auto", sites=4) == "sites"
    assert launched().shared("auto", sites=3) == "queries"
    assert launched().shared("keys", sites=9) == "keys"
    with pytest.raises(InputError, match=r"4 ranks for 3 site\(s\) leave ranks without one"):
        launched().shared("sites", sites=3)
    monkeypatch.delenv("RANK")
    with pytest.raises(InputError, match="not all of RANK, WORLD_SIZE, LOCAL_RANK"):
        launched()


class Launcher(Forked):
    """Runs ``ndm-fast`` on several ranks; as torchrun, but it ends no rank."""

    def start(self, size: int, arguments: list[str], timeout: int = 60) -> list[int]:
        """The process ids of the ranks of a new command."""
        port, limit = free_port(), {TIMEOUT_VARIABLE: str(timeout)}
        return self.start_all(arguments, [environment(rank, size, port) | limit for rank in range(size)], 1)

    def run(self, size: int, arguments: list[str]) -> list[str]:
        """The outputs of a command that ends well."""
        self.start(size, arguments)
        codes, outputs = self.wait_all()
        assert codes == [0] * size, outputs
        return outputs


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    made = Launcher(tmp_path_factory.mktemp("ranks"), "ndm_fast.distributed")
    yield made
    made.close()


def assert_same_run(found: Path, expected: Path) -> None:
    """Same partition bit for bit, same figures and log, nothing left over."""
    weights = "partition/partition.safetensors"
    assert (found / weights).read_bytes() == (expected / weights).read_bytes()
    assert (found / "result.json").read_text() == (expected / "result.json").read_text()
    logs = [re.sub(r', "time": [\d.]+', "", (out / "log.jsonl").read_text()) for out in (found, expected)]
    assert logs[0] == logs[1]
    assert sorted(p.name for p in found.iterdir()) == sorted(p.name for p in expected.iterdir())


def heldout(folder: Path) -> float:
    return float(json.loads((folder / "result.json").read_text())["heldout_loss"])


@pytest.mark.parametrize("shared", ["queries", "keys"])
def test_two_ranks_make_one_run(launcher, train_flags, tmp_path, shared):
    alone, together = tmp_path / "alone", tmp_path / "together"
    flags = {"parallel": shared, "merging": True}
    launcher.run(1, train_flags(alone, **flags))
    outputs = launcher.run(2, train_flags(together, **flags))
    assert "held-out distance" in outputs[0]
    assert outputs[1] == ""
    assert sorted(p.name for p in together.iterdir()) == sorted(p.name for p in alone.iterdir())
    assert heldout(together) == pytest.approx(heldout(alone), rel=0.02)
    launcher.run(2, ["train", "--quiet", "--out", str(together), "--resume"])  # prints the result again


def test_each_site_is_trained_by_one_rank(launcher, train_flags, tmp_path):
    sites = {"site": ["x0.mid", "m1", "x1.post"], "max_steps": 16}
    alone, together = tmp_path / "alone", tmp_path / "together"
    launcher.run(1, train_flags(alone, **sites))
    outputs = launcher.run(2, train_flags(together, **sites))
    for folder in alone.iterdir():
        assert_same_run(together / folder.name, folder)
    assert [output.count("held-out distance") for output in outputs] == [2, 1]


def checkpoint_step(folder: Path) -> int:
    file = folder / "checkpoint.safetensors"
    return int(load_checkpoint(file)[1]["step"]) if file.exists() else 0


def test_a_run_goes_on_with_any_number_of_ranks(launcher, train_flags, tmp_path):
    """Killed with one, four and two ranks, and ended with one."""
    out = tmp_path / "run"
    flags = {"parallel": "keys", "max_steps": 100_000, "checkpoint_every": 4, "repeat_data": True}
    arguments, steps = train_flags(out, **flags), [0]
    for number, size in enumerate((1, 4, 2)):
        process = launcher.start(size, [*arguments, "--resume"])[number % size]
        before = steps[-1]
        wait_for(lambda: checkpoint_step(out) > before)  # noqa: B023
        os.kill(process, signal.SIGKILL)
        codes, outputs = launcher.wait_all()
        assert codes.count(-signal.SIGKILL) == 1
        for rank, (code, output) in enumerate(zip(codes, outputs, strict=True)):
            if code != -signal.SIGKILL:
                assert code == 1
                assert re.fullmatch(rf"ndm-fast: rank {rank} lost another rank, .* with --resume\n", output)
        steps.append(checkpoint_step(out))
    assert steps == sorted(set(steps))
    process = launcher.start(2, [*arguments, "--resume"])[1]
    wait_for(lambda: checkpoint_step(out) > steps[-1])
    os.kill(process, signal.SIGTERM)  # one of them is enough: they agree to stop
    codes, outputs = launcher.wait_all()
    assert codes == [130, 130]
    assert "state saved: go on with the same command and --resume" in outputs[0]
    assert not (out / "result.json").exists()


def test_a_rank_that_hangs_is_given_up(launcher, train_flags, tmp_path):
    out = tmp_path / "run"
    arguments = train_flags(out, parallel="queries", max_steps=100_000, repeat_data=True)
    processes = launcher.start(2, arguments, timeout=2)
    wait_for(lambda: checkpoint_step(out) > 0)
    os.kill(processes[1], signal.SIGSTOP)
    wait_for(lambda: not Path(f"/proc/{processes[0]}/fd/1").exists())
    os.kill(processes[1], signal.SIGKILL)
    codes, outputs = launcher.wait_all()
    assert codes == [1, -signal.SIGKILL]
    assert re.fullmatch(r"ndm-fast: rank 0 lost another rank, .*Timed out.* with --resume\n", outputs[0])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"parallel": "keys", "keys": 255}, "2 ranks cannot share 255 keys evenly"),
        ({"parallel": "sites"}, "2 ranks for 1 site(s) leave ranks without one"),
        ({"unit_size": 7}, "unit_size 7 does not divide the width 32"),
    ],
)
def test_bad_input_ends_every_rank(launcher, train_flags, tmp_path, changes, says):
    launcher.start(2, train_flags(tmp_path / "run", **changes))
    codes, outputs = launcher.wait_all()
    assert codes == [2, 2]
    assert all(says in output for output in outputs)


def test_another_run_is_not_overwritten_by_any_rank(launcher, tmp_path, train_flags):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    launcher.start(2, train_flags(tmp_path / "run"))
    codes, outputs = launcher.wait_all()
    assert codes == [2, 2]
    assert "exists and is no run of ndm-fast" in outputs[1]
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.tex"]


@contextmanager
def torchrun(size: int, arguments: list[str]) -> Iterator[subprocess.Popen[str]]:
    """The real thing; it does not outlive the block."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size), "-m", "ndm_fast"]
    with subprocess.Popen(
        [*command, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as job:
        try:
            yield job
        finally:
            job.terminate()  # it ends its ranks


def said(error: str) -> list[str]:
    return [line for line in error.splitlines() if line.startswith("ndm-fast: ")]


def test_torchrun_prints_an_error_once(tmp_path):
    """`no text given` comes before the imports that take seconds."""
    with torchrun(2, ["train", "--site", "x0.mid", "--out", str(tmp_path / "run")]) as job:
        error = job.communicate(timeout=120)[1]
    assert said(error) == ["ndm-fast: no text given: pass --data with a file, folder, glob or dataset name"]
    assert re.search(r"exitcode *: 2", error)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_torchrun(train_flags, tmp_path, victim):
    """Within a minute, with one line, and the run goes on."""
    out = tmp_path / "run"
    arguments = train_flags(out, parallel="queries", max_steps=100_000, repeat_data=True)
    with torchrun(2, arguments) as job:
        wait_for(lambda: checkpoint_step(out) > 0)
        children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        ranks = {
            int(re.search(r"(?:^|\0)RANK=(\d+)", Path(f"/proc/{child}/environ").read_text())[1]): int(child)
            for child in children
        }
        os.kill(ranks[victim], signal.SIGKILL)
        began = time.monotonic()
        error = job.communicate(timeout=120)[1]
        assert time.monotonic() - began < 60
    assert job.returncode == 1
    assert len(said(error)) == 1
    assert re.match(rf"ndm-fast: rank {1 - victim} lost another rank", said(error)[0])


@pytest.mark.slow
@pytest.mark.parametrize("shared", ["queries", "keys"])
def test_ten_kills_change_nothing(launcher, train_flags, tmp_path, shared):
    """Of either rank, at random points of start, harvest and training; a run that ends is followed by one."""
    chance = random.Random(time.time_ns())
    flags = {"parallel": shared, "merging": True, "merge_start": 2000, "max_steps": 3000, "repeat_data": True}
    whole = tmp_path / "whole"
    began = time.monotonic()
    launcher.run(2, train_flags(whole, **flags))
    seconds = time.monotonic() - began
    kills: list[tuple[int, int]] = []
    run = 0
    while len(kills) < 10:
        run += 1
        killed, steps = tmp_path / f"killed{run}", [0]
        arguments = [*train_flags(killed, **flags), "--resume"]
        while not (killed / "result.json").exists():
            processes = launcher.start(2, arguments, timeout=10)
            if len(kills) < 10:
                victim = chance.randrange(2)
                time.sleep(chance.uniform(0, 0.25) * seconds)
                with suppress(ProcessLookupError):
                    os.kill(processes[victim], signal.SIGKILL)
            codes, outputs = launcher.wait_all()
            steps.append(checkpoint_step(killed))  # reads it whole, or raises
            if -signal.SIGKILL in codes:
                kills.append((victim, steps[-1]))
                assert codes[1 - victim] in (1, 0), outputs  # 0: the killed one had nothing left to do
            else:
                assert codes == [0, 0], outputs
        assert steps == sorted(steps)
        assert_same_run(killed, whole)
    print(f"(rank killed, step of the checkpoint): {kills}, {run} run(s)")
