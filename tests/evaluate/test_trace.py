"""Tracing: curves against patches by hand, prefixes against whole prompts, and the command."""

import json

import pytest
import torch

from ndm_fast.errors import InputError
from ndm_fast.evaluate.circuits.prompts import TESTS
from ndm_fast.evaluate.circuits.trace import OTHERS, OWN, read_trace, run_trace
from ndm_fast.evaluate.patching.language_model import load_language_model
from ndm_fast.evaluate.patching.patching import patch_effects
from ndm_fast.evaluate.patching.prefix import PrefixReader
from ndm_fast.evaluate.patching.prompts import pad_prompts
from ndm_fast.partition import SubspacePartition
from tests.evaluate.test_circuits import WIDTH, model_folder, tokenizer  # noqa: F401 - fixtures


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Tiny tensors."""


@pytest.mark.parametrize("name", ["1", "3b", "4"])
def test_curves_are_those_of_patch_effects(model_folder, name):  # noqa: F811
    found = run_trace(str(model_folder), tests=[name], prompts=10, layers=[2, 7], rows=4)
    model, words = load_language_model(str(model_folder))
    made = TESTS[name].build(words, 10, 0)
    whole = SubspacePartition(torch.eye(WIDTH), [WIDTH])
    (curve,) = found.curves
    for layer, effect, error in zip(found.layers, curve.effect, curve.error, strict=True):
        expected = patch_effects(
            model,
            f"x{layer}.post",
            whole,
            pad_prompts(made.prompts),
            pad_prompts(made.counterfactuals),
            made.metric,
            positions=made.positions,
        )
        assert effect == pytest.approx(float(expected.whole.mean()), rel=1e-3, abs=1e-5)
        spread = float(expected.whole.std(correction=0))
        assert error == pytest.approx(spread / 10**0.5, rel=1e-3, abs=1e-5)
        assert curve.clean == pytest.approx(float(expected.clean.mean()), rel=1e-3, abs=1e-5)


def test_kinds_of_positions_cover_the_prompt_and_are_shared(model_folder):  # noqa: F811
    found = run_trace(str(model_folder), tests=["2", "3", "3b"], prompts=6, layers=[0, 9], kinds=True)
    kinds = ["IO", "S1", "IO+1", "S1+1", "S2", "END", OTHERS]
    assert [(c.test, c.positions) for c in found.curves] == [
        *((test, OWN) for test in ("2", "3", "3b")),
        *(("2", kind) for kind in kinds),
        *(("3b", kind) for kind in kinds),
    ]
    by_name = {(c.test, c.positions): c.effect for c in found.curves}
    assert by_name["2", "S2"] == pytest.approx(by_name["2", OWN], rel=1e-4, abs=1e-6)
    assert by_name["3b", "END"] == pytest.approx(by_name["3b", OWN], rel=1e-4)
    # After the last block nothing else reaches the answer.
    assert all(by_name["2", kind][1] == pytest.approx(0, abs=1e-4) for kind in kinds if kind != "END")


def test_the_peak_is_the_first_near_the_largest(model_folder):  # noqa: F811
    found = run_trace(str(model_folder), tests=["3"], prompts=4, layers=[1, 3, 5])
    (curve,) = found.curves
    made = type(curve)("3", "what", OWN, 1.0, 1.0, (0.1, -3.7, -4.0), (0.0, 0.0, 0.0))
    assert made.peak == 1
    assert type(found)("m", 4, 0, "all", (1, 3, 5), (made,)).sites == {"3": "blocks.3.hook_resid_post"}


def test_tokens_before_a_patch_are_not_computed_again(model_folder):  # noqa: F811
    model, words = load_language_model(str(model_folder))
    made = TESTS["3"].build(words, 6, 0)
    seen = []
    handle = model.transformer.h[9].mlp.register_forward_hook(lambda *a: seen.append(a[1][0].shape[1]))
    run = {"positions": [[-1]] * 6, "rows": 6}
    prompts, others = pad_prompts(made.prompts), pad_prompts(made.counterfactuals)
    partition = SubspacePartition(torch.eye(WIDTH), [16, 16])
    patch_effects(model, "x5.post", partition, prompts, others, made.metric, **run)
    handle.remove()
    assert seen[-4:] == [1] * 4


def test_a_model_that_cannot_go_on_from_a_prefix_is_run_whole(model_folder):  # noqa: F811
    model, words = load_language_model(str(model_folder))
    prompts = pad_prompts(TESTS["3"].build(words, 3, 0).prompts)
    reader = PrefixReader(model)
    assert reader.read(prompts, prompts.tokens.shape[1] - 1) is not None
    assert reader.read(prompts, 0) is None
    forward = model.forward

    def forgetful(*args, past_key_values=None, **kwargs):
        return forward(*args, **kwargs)

    def no_cache(*args, use_cache=None, **kwargs):
        return forward(*args, use_cache=False, **kwargs)

    for broken in (forgetful, no_cache):
        model.forward = broken
        reader = PrefixReader(model)
        assert reader.read(prompts, prompts.tokens.shape[1] - 1) is None
        assert reader.read(prompts, prompts.tokens.shape[1] - 2) is None


def test_the_command_writes_what_can_be_read_again(model_folder, tmp_path, ndm):  # noqa: F811
    options = ["--model", model_folder, "--prompts", 4, "--layers", 3, 8, "--out", tmp_path]
    outcome = ndm("evaluate", "trace", *options)
    assert outcome.code == 0, outcome.err
    assert "train for test 3b at blocks." in outcome.out
    saved = json.loads((tmp_path / "trace.json").read_text())
    del saved["sha256"]
    assert list(saved["sites"]) == list(TESTS)
    assert read_trace(tmp_path / "trace.json").to_json() == json.loads(json.dumps(saved), object_hook=_tuples)
    assert (tmp_path / "trace.png").stat().st_size > 10_000
    assert "blocks 0 to 9" in ndm("evaluate", "trace", *options, "--layers", 10).refusal()
    assert "unknown circuit test '7'" in ndm("evaluate", "trace", *options, "--tests", 7).refusal()
    (tmp_path / "bad.json").write_text('{"curves": [1]}')
    with pytest.raises(InputError, match=r"bad\.json is damaged \(its checksum does not match\)"):
        read_trace(tmp_path / "bad.json")
    with pytest.raises(InputError, match=r"absent\.json is no trace"):
        read_trace(tmp_path / "absent.json")


def _tuples(content):
    return {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}
