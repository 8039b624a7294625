"""The sweep over settings: one harvest, every value trained, losses that compare."""

import json

import pytest

from ndm_fast.errors import InputError
from ndm_fast.evaluate.sensitivity import run_sensitivity


@pytest.fixture(scope="module")
def run(tmp_path_factory, train_flags):
    from ndm_fast.cli.main import main

    folder = tmp_path_factory.mktemp("sweep") / "run"
    assert main(train_flags(folder, merging=True, merge_threshold=0.05)) == 0
    return folder


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Tiny tensors."""


def test_every_value_is_trained(run, tmp_path, ndm):
    values = ["--keys", 64, 256, "--thresholds", -1, 9, "--units", 4, 16]
    outcome = ndm("evaluate", "sensitivity", run, *values, "--out", tmp_path)
    assert outcome.code == 0, outcome.err
    rows = json.loads((tmp_path / "sensitivity.json").read_text())
    assert [(row["setting"], row["value"]) for row in rows[:3]] == [
        ("keys", 64),
        ("keys", 256),
        ("merge_threshold", -1),
    ]
    by_value = {(row["setting"], row["value"]): row for row in rows}
    assert by_value["merge_threshold", -1]["subspaces"] < by_value["merge_threshold", 9]["subspaces"] == 4
    assert all(sum(row["widths"]) == 32 for row in rows)
    assert (tmp_path / "sensitivity.png").stat().st_size > 10_000


def test_what_cannot_be_varied_is_refused(run):
    with pytest.raises(InputError, match="nothing to vary"):
        run_sensitivity(run)
    with pytest.raises(InputError, match="unit_size 5 does not divide"):
        run_sensitivity(run, units=[5])
    with pytest.raises(InputError, match="keys is 0"):
        run_sensitivity(run, keys=[0])
