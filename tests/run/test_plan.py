"""Costs predicted from a config alone."""

import dataclasses
import json

import pytest

from ndm_fast.config import from_flat
from ndm_fast.run.hardware import GPUS, Machine, machine_of
from ndm_fast.run.plan import make_plan, model_shape
from ndm_fast.run.presets import preset

SMALL = Machine("cpu", 2e11, 1e11, 1e10, 4e9)


@pytest.fixture
def gpt2(tmp_path):
    """Folder with nothing but the config of GPT-2 small."""
    config = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


def _plan(folder, machine=SMALL, **changes):
    config = from_flat({**preset("gpt2-published"), "model": folder, "site": ["x4.post"], **changes})
    return make_plan(config, model_shape(folder, "x4.post"), machine)


def _part(plan, name):
    return next(part for part in plan.parts if part.name == name)


def test_a_config_is_all_that_is_needed(gpt2):
    shape = model_shape(gpt2, "x4.post")
    assert shape.width == 768
    assert shape.parameters == 124_439_808
    assert shape.run_parameters == 5 * 12 * 768**2
    assert model_shape(gpt2, "blocks.4.hook_resid_mid").run_parameters == (4 * 12 + 4) * 768**2


def test_work_follows_the_cost_model(gpt2):
    plan = _plan(gpt2, search_every=32, rotation="lie", max_steps=1000)
    K, Q, d = 25 * 16384, 128, 768
    assert _part(plan, "search").flops == pytest.approx(
        1000 * (2 * K * d**2 / 32 + 2 * Q * d**2 + 2 * Q * K * d)
    )
    assert _part(plan, "gradient").flops == 1000 * 4 * Q * d**2
    every = _plan(gpt2, search_every=1, rotation="lie", max_steps=1000)
    assert _part(every, "search").seconds > 5 * _part(plan, "search").seconds
    assert plan.rows == 2048 + 16384 + K + 1000 * Q


def test_a_faster_machine_takes_less_time(gpt2):
    times = [_plan(gpt2, machine).seconds for machine in (SMALL, GPUS["A100"], GPUS["H100"])]
    assert times == sorted(times, reverse=True)


def test_what_does_not_fit_is_told_with_what_would(gpt2):
    plan = _plan(gpt2)
    assert plan.peak > SMALL.memory
    assert any(line.startswith("--dtype bfloat16") for line in plan.advice)
    fitting = next(line for line in plan.advice if line.startswith("--pool-rows"))
    smaller = _plan(gpt2, pool_rows=int(fitting.split()[1]))
    assert smaller.peak <= SMALL.memory
    assert smaller.advice == ()


def test_keys_that_never_fit_are_named(gpt2):
    assert "lower --keys" in _plan(gpt2, dataclasses.replace(SMALL, memory=1e9)).advice[-1]


def test_command_prints_a_plan(ndm, gpt2):
    shown = ndm("plan", "--preset", "gpt2", "--model", gpt2, "--site", "x4.post", "--device", "H200")
    assert shown.code == 0
    assert "harvest" in shown.out
    assert "never" not in shown.err
    assert "with --preset gpt2-published: " in shown.out
    found = ndm("plan", "--model", gpt2, "--site", "x4.post", "--device", "a100", "--json")
    assert {part["name"] for part in json.loads(found.out)["parts"]} >= {"harvest", "search", "update"}


@pytest.mark.parametrize("device", ["H200", "a100"])
def test_a_fast_preset_is_compared_with_the_published_one(ndm, gpt2, device):
    """Seconds and memory of both, printed and as JSON; each as its own plan has them."""
    names = ("gpt2", "gpt2-published")
    given = {name: ("plan", "--preset", name, "--model", gpt2, "--site", "x4.post") for name in names}
    lines = ndm(*given["gpt2"], "--device", device).out
    plans = {name: json.loads(ndm(*given[name], "--device", device, "--json").out) for name in names}
    found = plans["gpt2"]["presets"]
    assert list(found) == list(names)
    for name, plan in plans.items():
        assert found[name]["seconds"] == pytest.approx(sum(part["seconds"] for part in plan["parts"]))
        assert found[name]["memory"] == pytest.approx(sum(plan["memory"].values()))
        seconds, memory = found[name]["seconds"], found[name]["memory"] / 1e9
        assert f"with --preset {name}: {seconds:.1f} s, {memory:.2f} GB\n" in lines
    assert found["gpt2-published"]["seconds"] > found["gpt2"]["seconds"]
    assert "presets" not in plans["gpt2-published"]


def test_the_cpu_is_measured():
    machine = machine_of("cpu")
    assert machine.memory > 1e8
    assert 1e8 < machine.single < 1e14


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--site", "x4.post"), "no model given"),
        (("--model", "/nowhere", "--site", "x4.post"), "cannot load model '/nowhere'"),
        (("--model", "GPT2"), "no site given"),
        (("--model", "GPT2", "--site", "x99.post"), "x99"),
        (("--model", "GPT2", "--site", "x4.post", "--device", "abacus"), "unknown device 'abacus'"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(ndm, gpt2, arguments, message):
    given = [gpt2 if argument == "GPT2" else argument for argument in arguments]
    assert message in ndm("plan", *given).refusal()
