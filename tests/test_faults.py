"""Every command that writes, with a failure or a crash at every change it makes on disk; and then once more.

``fault_shim.c`` counts writes, syncs, renames, and what makes, cuts or removes files and folders. In the
usual suite a change of each of some commands is drawn; ``--run-slow`` takes all of all commands. Kills at
random moments are in ``bench/claims/kills.py``.
"""

from __future__ import annotations

import random
import shutil
import sys
import time
from collections.abc import Iterator

import pytest
from writers import Scene, scene

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which("cc") is None,
    reason="the shim is compiled, and preloaded as Linux does",
)

WRITERS = (
    "train",
    "train, two sites",
    "train, two ranks",
    "train, a site a rank",
    "harvest",
    "train --acts",
    "train --rows",
    "index",
    "index again",
    "report",
    "report again",
    "report --share",
    "report --figures-only",
    "explore",
    "evaluate purity",
    "evaluate stability",
    "evaluate conflict",
    "evaluate causalgym",
    "evaluate trace",
    "evaluate circuits",
    "evaluate connections",
    "toy",
    "hub",
)


@pytest.fixture(scope="module")
def some(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """Without the kinds of ``evaluate`` that need models of their own."""
    with scene(tmp_path_factory.mktemp("scene"), with_faults=True, evaluating=False) as made:
        yield made


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with scene(tmp_path_factory.mktemp("scene"), with_faults=True) as made:
        yield made


@pytest.mark.parametrize("name", ["train", "train, two sites", "harvest", "index again", "explore"])
def test_a_failure_and_a_crash_need_no_hand(some, name):
    writer, chance = some.writers[name], random.Random(time.time_ns())
    expected, changes = some.undisturbed(writer)
    assert len(changes) > 20
    for how in ("crash", chance.choice(["error", "full"])):
        number = chance.randint(1, len(changes))
        assert not some.after_fault(writer, number, how, expected), (how, changes[number - 1])


def test_the_shim_counts_every_kind_of_change(some):
    made = [some.undisturbed(some.writers[name])[1] for name in ("train", "train, two sites")]
    changes = {change.split()[1] for one in made for change in one}
    assert changes == {"mkdir", "open", "write", "fsync", "ftruncate", "rename", "unlink", "rmdir"}


def test_a_checkpoint_counts_on_no_log_that_a_power_cut_takes(some):
    synced, checkpoints = True, 0
    for change in some.undisturbed(some.writers["train"])[1]:
        _, kind, path = change.split(" ", 2)
        if path.endswith("log.jsonl"):
            synced = {"write": False, "fsync": True}.get(kind, synced)
        if kind == "rename" and path.endswith("checkpoint.safetensors"):
            checkpoints += 1
            assert synced
    assert checkpoints == 3


@pytest.mark.slow
def test_no_command_is_forgotten(every):
    assert tuple(every.writers) == WRITERS


@pytest.mark.slow
@pytest.mark.parametrize("how", ["crash", "error", "full"])
@pytest.mark.parametrize("name", WRITERS)
def test_no_failure_and_no_crash_needs_a_hand(every, name, how):
    writer = every.writers[name]
    expected, changes = every.undisturbed(writer)
    wrong = {}
    for number, change in enumerate(changes, 1):
        if said := every.after_fault(writer, number, how, expected):
            wrong[change] = said
    assert not wrong
