"""Sites inside a trace of nnsight beside our hooks."""

import pytest
import tiny_families
import torch
from adapter_cases import CASES, TOKENS, clean_logits, installed, our_patch, small_model
from tiny import make_model

from ndm_fast.activations.hooks import collect_activations, replace_activations
from ndm_fast.activations.models import load_model
from ndm_fast.adapters.nnsight import traced_site
from ndm_fast.errors import InputError


@pytest.fixture(scope="module", autouse=True)
def nnsight(one_thread):
    return installed("nnsight")


@pytest.mark.parametrize(("family", "site"), CASES)
def test_saved_and_patched_as_by_our_hooks(family, site, nnsight):
    before, ours, replacement = our_patch(family, site)
    model = nnsight.NNsight(small_model(family))
    traced = traced_site(model, site)
    with model.trace(input_ids=TOKENS):
        saved = traced.read().save()
        after = traced.replace(replacement).save()
        logits = model.output.logits.save()
    assert torch.equal(saved, before)
    assert (after - replacement(before.clone())).abs().max() < 1e-6
    assert (logits[:, -1] - ours).abs().max() < 1e-5
    assert (ours - clean_logits(family)).abs().max() > 1e-2
    assert (small_model(family)(TOKENS).logits[:, -1] - clean_logits(family)).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("family", "site"),
    [
        ("granite", "a1"),  # multiplies what it adds
        ("granite", "m1"),
        ("opt", "m1"),  # its MLP sees the rows of all prompts as one list
        ("opt", "x1.mid"),
        ("xlnet", "x1.post"),  # [T, B, d]
        ("squeezebert", "x1.mid"),  # [B, d, T]
        ("cpmant", "x1.post"),  # positions of its own before the text
        ("xlm", "x1.pre"),  # the first part's input, which the skip connection reads too
    ],
)
def test_activations_that_are_no_module_s_own_tensor(family, site, nnsight):
    inner = tiny_families.build(family)
    with collect_activations(inner, site) as source:
        inner(TOKENS)
    shift = source[site].std() * torch.linspace(-1, 1, source[site].shape[-1])
    with replace_activations(inner, {site: lambda h: h + shift}):
        ours = inner(TOKENS).logits
    model = nnsight.NNsight(inner)
    traced = traced_site(model, site)
    with model.trace(input_ids=TOKENS):
        saved = traced.read().save()
        traced.replace(lambda h: h + shift)
        logits = model.output.logits.save()
    assert torch.equal(saved, source[site])
    torch.testing.assert_close(logits, ours, rtol=1e-5, atol=1e-5)
    assert (logits - inner(TOKENS).logits).abs().max() > 1e-2


def test_calls_of_one_module_are_refused(nnsight):
    with pytest.raises(InputError, match=r"nnsight does not tell the calls of albert.* apart"):
        traced_site(nnsight.NNsight(tiny_families.build("albert")), "x1.post")


def test_two_sites_in_one_trace_and_a_shape_that_is_refused(nnsight):
    model = nnsight.NNsight(small_model("gpt2"))
    first, second = traced_site(model, "x0.post"), traced_site(model, "blocks.2.hook_resid_post")
    with model.trace(input_ids=TOKENS):
        first.replace(torch.zeros_like)
        later = second.read().save()
    with collect_activations(small_model("gpt2"), "x2.post") as clean:
        small_model("gpt2")(TOKENS)
    inner = small_model("gpt2")
    zeros = {"x0.post": torch.zeros_like}
    with replace_activations(inner, zeros), collect_activations(inner, "x2.post") as changed:
        inner(TOKENS)
    assert torch.equal(later, changed["x2.post"])
    assert not torch.equal(later, clean["x2.post"])

    def shorter():
        with model.trace(input_ids=TOKENS):
            first.replace(lambda h: h[:, 1:])

    with pytest.raises(Exception, match=r"return a tensor of shape \(4, 9, 32\)"):  # nnsight wraps it
        shorter()


def test_a_model_that_nnsight_loads_by_itself(tmp_path, nnsight):
    from nnsight.modeling.transformers import TransformersModel

    folder = str(make_model(tmp_path, head=True))
    model = TransformersModel(folder, task="text-generation", dispatch=True)
    traced = traced_site(model, "x1.mid")
    with model.trace("a red old cat"):
        saved = traced.read().save()
    inner, tokenizer = load_model(folder)
    with collect_activations(inner, "x1.mid") as ours:
        inner(**tokenizer("a red old cat", return_tensors="pt"))
    assert (saved - ours["x1.mid"]).abs().max() < 1e-5
    with pytest.raises(InputError, match="pass dispatch=True"):
        traced_site(TransformersModel(folder, task="text-generation", tokenizer=tokenizer), "x1.mid")


def test_what_is_no_model_of_nnsight_is_one_line(nnsight):
    with pytest.raises(InputError, match=r"Linear is no model of nnsight: wrap it"):
        traced_site(torch.nn.Linear(2, 2), "x1.mid")
    with pytest.raises(InputError, match=r"has 3 blocks"):
        traced_site(nnsight.NNsight(small_model("gpt2")), "x7.mid")
