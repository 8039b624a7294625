"""What the tests of adapters share: the tools, tiny models of several families, and our own patch of each.

``make test`` skips what is not installed. ``make test-adapters`` names in ``NDM_FAST_ADAPTERS`` what must be.
"""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from ndm_fast.activations.hooks import collect_activations, replace_activations
from ndm_fast.evaluate.patching import pad_prompts, subspace_patch
from ndm_fast.geometry.orthogonal import random_rotation
from ndm_fast.partition import SubspacePartition

WIDTH, VOCABULARY, WIDTHS, LENGTH = 32, 61, (12, 12, 8), 9
SITES = ("x1.pre", "a1", "x1.mid", "m1", "x1.post")
GQA = {"num_key_value_heads": 2, "head_dim": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": GQA,
    "gemma2": {**GQA, "sliding_window": 4, "query_pre_attn_scalar": 8},
    "phi": {"num_key_value_heads": 4},
}
SUBSPACE, POSITION = 1, 5


def installed(package: str) -> Any:
    """The tool; skips the test where it is missing, fails where it must not be."""
    if package in os.environ.get("NDM_FAST_ADAPTERS", "").split():
        return import_module(package)
    return pytest.importorskip(package, reason=f"{package} is not installed: `make test-adapters`")


@cache
def small_model(family: str) -> nn.Module:
    """A random causal language model of three blocks, with eager attention; not to be changed."""
    sizes = {
        "hidden_size": WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(1)
    config = AutoConfig.for_model(family, **{**sizes, **FAMILIES[family]})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().requires_grad_(False)
    for weight in model.parameters():
        weight.add_(0.15 * torch.randn_like(weight))
    return model


def sites_of(family: str) -> tuple[str, ...]:
    """Those of one block that the family has."""
    return tuple(site for site in SITES if (family, site) != ("phi", "x1.mid"))


CASES = [(family, site) for family in FAMILIES for site in sites_of(family)]
PARTITION = SubspacePartition(random_rotation(WIDTH, torch.Generator().manual_seed(5)), WIDTHS)
TOKENS, OTHERS = torch.randint(3, VOCABULARY, (2, 4, LENGTH), generator=torch.Generator().manual_seed(2))
"""[4, 9] prompts and their counterfactuals."""


def our_patch(family: str, site: str) -> tuple[Tensor, Tensor, Any]:
    """Activations [4, 9, d] at a site, patched last logits [4, V], and the replacement that patched."""
    model, prompts = small_model(family), pad_prompts(TOKENS.tolist())
    with collect_activations(model, site) as source:
        model(OTHERS)
    with collect_activations(model, site) as before:
        model(TOKENS)
    positions = [[POSITION]] * len(TOKENS)
    replacement = subspace_patch(PARTITION, [SUBSPACE], source[site], prompts, positions)
    with replace_activations(model, {site: replacement}):
        return before[site], model(TOKENS).logits[:, -1], replacement


def clean_logits(family: str) -> Tensor:
    """[4, V] last logits without a patch."""
    return small_model(family)(TOKENS).logits[:, -1]
