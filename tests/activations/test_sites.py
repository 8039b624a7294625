"""Names of sites against the modules of tiny models of every family; test_hooks runs them."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from ndm_fast.activations.sites import (
    Site,
    list_sites,
    number_of_blocks,
    resolve_site,
    resolve_sites,
    site_width,
)
from ndm_fast.errors import InputError

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 61,
    "pad_token_id": 0,
}
GQA = {"num_key_value_heads": 2, "head_dim": 8}
# family: (extra config, block 1 under a causal or masked head, mid, attn_out, mlp_out inside the block)
LLAMA = ("model.layers.1", "post_attention_layernorm", "self_attn", "mlp")
GEMMA = (
    "model.layers.1",
    "pre_feedforward_layernorm",
    "post_attention_layernorm",
    "post_feedforward_layernorm",
)
NEOX = ("gpt_neox.layers.1", "post_attention_layernorm", "post_attention_dropout", "post_mlp_dropout")
BERT = ("bert.encoder.layer.1", "attention.output", "attention.output.dropout", "output.dropout")
FAMILIES = {
    "gpt2": ({}, "transformer.h.1", "ln_2", "attn", "mlp"),
    "llama": (GQA, *LLAMA),
    "mistral": (GQA, *LLAMA),
    "qwen2": (GQA, *LLAMA),
    "qwen3": (GQA, *LLAMA),
    "gemma2": (GQA, *GEMMA),
    "gemma3_text": (GQA, *GEMMA),
    "gpt_neox": ({"use_parallel_residual": False}, *NEOX),
    "bert": ({}, *BERT),
}
POINTS = {
    "resid_pre": "x1.pre",
    "resid_mid": "x1.mid",
    "resid_post": "x1.post",
    "attn_out": "a1",
    "mlp_out": "m1",
}


def build(family: str, auto: type = AutoModelForCausalLM, **extra: object) -> nn.Module:
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES.get(family, ({},))[0], **extra})
    with torch.device("meta"):
        return auto.from_config(config)


@pytest.mark.parametrize("headed", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_form_of_every_point_is_the_same_site(family: str, headed: bool) -> None:
    head = AutoModelForMaskedLM if family == "bert" else AutoModelForCausalLM
    model = build(family, head if headed else AutoModel)
    _, block, mid, attn_out, mlp_out = FAMILIES[family]
    bare = block.partition(".")[2]
    where = {"resid_pre": "", "resid_mid": mid, "resid_post": "", "attn_out": attn_out, "mlp_out": mlp_out}
    for point, inner in where.items():
        site = resolve_site(model, f"blocks.1.hook_{point}")
        path = f"{block}.{inner}".rstrip(".") if headed else f"{bare}.{inner}".rstrip(".")
        reads_input = point == "resid_pre" or (point == "resid_mid" and family != "bert")
        assert site == Site(f"blocks.1.hook_{point}", path, "input" if reads_input else "output")
        assert resolve_site(model, POINTS[point]) == site
        if site.end == "output":  # a module path means the output; with and without the head's prefix
            assert resolve_site(model, f"{block}.{inner}".rstrip(".")) == site
            assert resolve_site(model, f"{bare}.{inner}".rstrip(".")) == site
        assert site_width(model, site) == 32
    assert number_of_blocks(model) == 3
    assert [name for name in list_sites(model) if name.startswith("blocks.1.")] == [
        f"blocks.1.hook_{p}" for p in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
    ]
    assert len(list_sites(model)) == 15


@pytest.mark.parametrize("family", ["gpt_neox", "phi"])
def test_parallel_attention_has_no_mid_and_says_what_exists(family: str) -> None:
    model = build(family, **({"use_parallel_residual": True} if family == "gpt_neox" else {}))
    assert "blocks.1.hook_resid_mid" not in list_sites(model)
    assert resolve_site(model, "x1.post").end == "output"
    with pytest.raises(InputError, match=r"'x1\.mid'.*in parallel.*blocks\.1\.hook_resid_pre.*hook_mlp_out"):
        resolve_site(model, "x1.mid")


def test_the_language_model_inside_a_multimodal_gemma() -> None:
    text = {k: v for k, v in SIZES.items() if k != "pad_token_id"} | GQA
    vision = {**text, "num_attention_heads": 4, "image_size": 16, "patch_size": 8}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    site = resolve_site(model, "x2.mid")
    assert re.fullmatch(r"(model\.)?language_model\..*layers\.2\.pre_feedforward_layernorm", site.module)
    assert (site_width(model, site), number_of_blocks(model)) == (32, 3)


@pytest.mark.parametrize(
    ("path", "width"),
    [
        ("transformer.h.1.mlp.c_fc", 48),
        ("transformer.h.1.mlp.c_proj", 32),
        ("transformer.h.1.attn.c_attn", 96),
        ("transformer.wte", 32),
        ("transformer.h", 32),
        ("transformer.ln_f", None),
        ("transformer.h.1.mlp.act", None),
        ("lm_head", 61),
    ],
)
def test_width_of_a_module_path(path: str, width: int | None) -> None:
    model = build("gpt2", n_inner=48)
    site = resolve_site(model, path)
    assert (site.name, site.module, site.end) == (path, path, "output")
    if width is None:
        with pytest.raises(InputError, match="not known before a forward pass"):
            site_width(model, site)
    else:
        assert site_width(model, site) == width


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x3.mid", "has 3 blocks, use 0 to 2"),
        ("transformer.h.3", "accepted are blocks"),
        ("blocks.1.hook_resid_pos", r"near it: blocks\.1\.hook_resid_pos"),
        ("x1.middle", r"accepted are blocks.*x3\.pre\|mid\|post, a3, m3, or a module path"),
        ("transformer.h.1.mpl", r"transformer\.h\.1\.mlp"),
        ("", "no site ''"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        resolve_site(build("gpt2"), name)
    assert "\n" not in str(error.value)


def test_an_unknown_family_works_through_module_paths() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 6)))
    assert list_sites(model) == ["0", "1", "1.0", "1.1"]
    assert [site_width(model, resolve_site(model, path)) for path in ("0", "1", "1.1")] == [8, 6, 6]
    with pytest.raises(InputError, match=r"'x1\.mid': Sequential.*give a module path, e\.g\. 1\.1"):
        resolve_site(model, "x1.mid")
    with pytest.raises(InputError, match="how many blocks"):
        number_of_blocks(model)
    known_config = build("opt", AutoModelForCausalLM, ffn_dim=48, word_embed_proj_dim=32)
    assert number_of_blocks(known_config) == 3
    with pytest.raises(InputError, match=r"model\.decoder\.layers\.1"):
        resolve_site(known_config, "blocks.1.hook_resid_mid")


def test_several_names() -> None:
    model = build("gpt2")
    assert resolve_sites(model, "x1.mid") == [resolve_site(model, "x1.mid")]
    assert [site.name for site in resolve_sites(model, ("m2", "a0"))] == [
        "blocks.2.hook_mlp_out",
        "blocks.0.hook_attn_out",
    ]
    with pytest.raises(InputError, match="no site given"):
        resolve_sites(model, [])
