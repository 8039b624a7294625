"""Hook points of TransformerLens's bridge beside our sites."""

from functools import cache

import pytest
import tiny_families
import torch
from adapter_cases import (
    CASES,
    FAMILIES,
    OTHERS,
    PARTITION,
    POSITION,
    SUBSPACE,
    TOKENS,
    clean_logits,
    installed,
    our_patch,
    small_model,
)
from tiny import make_model
from transformers import AutoTokenizer

from ndm_fast.activations.hooks import collect_activations
from ndm_fast.activations.sites import list_sites
from ndm_fast.adapters.transformer_lens import hook_name, patching_hooks, site_name
from ndm_fast.errors import InputError
from ndm_fast.evaluate.patching import pad_prompts, subspace_patch


@pytest.fixture(scope="module", autouse=True)
def lens(one_thread):
    return installed("transformer_lens")


@pytest.fixture(scope="module")
def bridge(tmp_path_factory, lens):
    """Family -> a bridge over a copy of its small model."""
    tokenizer = AutoTokenizer.from_pretrained(make_model(tmp_path_factory.mktemp("tokenizer"), head=True))

    @cache
    def boot(family):
        folder = tmp_path_factory.mktemp(family)
        small_model(family).save_pretrained(folder)
        from transformer_lens.model_bridge import TransformerBridge

        return TransformerBridge.boot_transformers(str(folder), tokenizer=tokenizer, device="cpu")

    return boot


@pytest.mark.parametrize("family", FAMILIES)
def test_all_sites_are_hook_points_with_the_same_activations(family, bridge):
    model, made = small_model(family), bridge(family)
    sites = list_sites(model)
    assert len(sites) == 3 * (4 if family == "phi" else 5)
    with collect_activations(model, sites, stop_after_last=False) as ours:
        model(TOKENS)
    _, cache_of_theirs = made.run_with_cache(TOKENS)
    for site in sites:
        assert (cache_of_theirs[hook_name(made, site)] - ours[site]).abs().max() < 1e-5, site


SAME_EVERYWHERE = (
    "bloom codegen cohere falcon gemma gemma2 gemma3_text glm glm4 gpt2 gpt_bigcode gpt_neo gpt_neox gptj "
    "granite granitemoe llama mistral mixtral mpt nemotron olmo olmo2 olmoe opt phi phi3 qwen2 qwen3 "
    "qwen3_moe smollm3 stablelm starcoder2 xglm"
)
"""Families whose points are all the same tensors; docs/adapters.md has their number."""


@pytest.mark.parametrize("family", SAME_EVERYWHERE.split())
def test_points_of_many_families_are_the_same_tensors(family, tmp_path, lens):
    from transformer_lens.model_bridge import TransformerBridge

    model = tiny_families.build(family)
    model.save_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(make_model(tmp_path / "tokenizer", head=True))
    made = TransformerBridge.boot_transformers(str(tmp_path / "model"), tokenizer=tokenizer, device="cpu")
    tokens = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    sites = [site for site in list_sites(model) if ".1." in site]
    with collect_activations(model, sites, stop_after_last=False) as ours:
        model(tokens)
    _, theirs = made.run_with_cache(tokens)
    assert len(sites) >= 4
    for site in sites:
        assert (theirs[hook_name(made, site)] - ours[site]).abs().max() < 1e-5, site


def test_names_lead_both_ways(bridge):
    made = bridge("gpt2")
    assert hook_name(made, "x1.mid") == "blocks.1.hook_resid_mid"
    for theirs, ours in {
        "blocks.1.ln2.hook_in": "blocks.1.hook_resid_mid",
        "blocks.1.hook_in": "blocks.1.hook_resid_pre",
        "blocks.1.hook_out": "blocks.1.hook_resid_post",
        "blocks.1.mlp.hook_out": "blocks.1.hook_mlp_out",
        "blocks.2.hook_attn_out": "blocks.2.hook_attn_out",
    }.items():
        assert site_name(made, theirs) == ours
        assert made.hook_dict[hook_name(made, ours)] is made.hook_dict[theirs]
    assert site_name(bridge("gemma2"), "blocks.0.ln1_post.hook_out") == "blocks.0.hook_attn_out"


@pytest.mark.parametrize(("family", "site"), CASES)
def test_a_patch_has_the_effect_of_ours(family, site, bridge):
    _, ours, replacement = our_patch(family, site)
    made = bridge(family)
    theirs = made.run_with_hooks(TOKENS, fwd_hooks=patching_hooks(made, {site: replacement}))[:, -1]
    assert (ours - clean_logits(family)).abs().max() > 1e-2
    assert (theirs - ours).abs().max() < 1e-5


def test_a_source_cached_by_them_serves_as_well(bridge):
    """The whole experiment in TransformerLens: only the mathematics is ours."""
    made = bridge("llama")
    _, cached = made.run_with_cache(OTHERS)
    source = cached[hook_name(made, "x1.post")]
    prompts, where = pad_prompts(TOKENS.tolist()), [[POSITION]] * len(TOKENS)
    replacement = subspace_patch(PARTITION, [SUBSPACE], source, prompts, where)
    with made.hooks(fwd_hooks=patching_hooks(made, {"x1.post": replacement})):
        theirs = made(TOKENS)[:, -1]
    assert (theirs - our_patch("llama", "x1.post")[1]).abs().max() < 1e-5
    assert (made(TOKENS)[:, -1] - clean_logits("llama")).abs().max() < 1e-5  # the hooks are gone


def test_bad_names_are_one_line(bridge):
    made = bridge("phi")
    with pytest.raises(InputError, match=r"no hook point blocks.1.hook_resid_mid: use blocks.1.hook_"):
        hook_name(made, "x1.mid")
    with pytest.raises(InputError, match=r"no block blocks.7"):
        hook_name(made, "x7.post")
    with pytest.raises(InputError, match="is no site that TransformerLens names"):
        hook_name(made, "model.layers.1.mlp")
    with pytest.raises(InputError, match=r"no hook point 'blocks\.1\.hook_nothing'"):
        site_name(made, "blocks.1.hook_nothing")
    with pytest.raises(InputError, match="is not on the residual stream"):
        site_name(made, "blocks.1.attn.hook_pattern")
    with pytest.raises(InputError, match="is no bridge of TransformerLens"):
        hook_name(torch.nn.Linear(2, 2), "x1.mid")


def test_points_that_are_other_tensors_in_a_post_norm_family_are_refused(tmp_path, lens):
    from transformer_lens.model_bridge import TransformerBridge

    make_model(tmp_path)  # for the tokenizer; its model is written over
    model = tiny_families.build("bert")
    model.save_pretrained(tmp_path)
    made = TransformerBridge.boot_transformers(str(tmp_path), device="cpu")
    with collect_activations(model, ["x1.pre", "m1", "x1.post"]) as ours:
        model(TOKENS)
    _, theirs = made.run_with_cache(TOKENS)
    for site, activation in ours.items():
        assert (theirs[hook_name(made, site)] - activation).abs().max() < 1e-5
    with pytest.raises(InputError, match="before the norm of this family"):
        hook_name(made, "x1.mid")


def test_processed_weights_are_refused(tmp_path, lens):
    from transformer_lens.model_bridge import TransformerBridge

    made = TransformerBridge.boot_transformers(str(make_model(tmp_path, head=True)), device="cpu")
    made.enable_compatibility_mode(no_processing=True)
    assert hook_name(made, "x1.mid") == "blocks.1.hook_resid_mid"
    processed = TransformerBridge.boot_transformers(str(tmp_path), device="cpu")
    processed.enable_compatibility_mode()
    with pytest.raises(InputError, match="weights are processed"):
        hook_name(processed, "x1.mid")
