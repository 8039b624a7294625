"""Every language model of transformers, causal or masked, built small from its config with random weights."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

FAMILIES = sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_MASKED_LM_MAPPING_NAMES})

LARGEST = 20_000_000
"""Parameters of a model that still counts as small."""

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "d_model": 64,
    "n_embd": 64,
    "dim": 64,
    "num_hidden_layers": 4,
    "num_layers": 4,
    "n_layer": 4,
    "n_layers": 4,
    "decoder_layers": 4,
    "encoder_layers": 4,
    "num_decoder_layers": 4,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "d_kv": 16,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "n_inner": 96,
    "d_ff": 96,
    "hidden_dim": 96,
    "decoder_ffn_dim": 96,
    "encoder_ffn_dim": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rotary_dim": 16,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "word_embed_proj_dim": 64,
    "embedding_size": 64,
    "state_size": 8,
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "mamba_n_groups": 1,
    "n_groups": 1,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "lru_width": 64,
    "query_pre_attn_scalar": 16,
    "sliding_window": 4,
    "attention_window": 4,
    "num_nextn_predict_layers": 0,
}
"""Of every size the config has, whatever the family calls it."""

INDEXER = {"index_head_dim": 16, "index_n_heads": 2, "index_topk": 4}
SPECIAL: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "axk2": {"num_key_value_heads": 4, **INDEXER},
    "deepseek_v32": {"num_key_value_heads": 4, **INDEXER},
    "glm_moe_dsa": {"num_key_value_heads": 4, **INDEXER},
    "ernie4_5_moe": {"moe_k": 2},
    "esmc": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "gemma3n_text": {"num_hidden_layers": 8, "num_kv_shared_layers": 0, "vocab_size_per_layer_input": 128},
    "gemma4_text": {"vocab_size_per_layer_input": 128, "num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "reformer": {
        "axial_pos_embds": False,
        "is_decoder": True,
        "attention_head_size": 16,
        "lsh_attn_chunk_length": 4,
        "local_attn_chunk_length": 4,
        "num_buckets": 2,
        "attn_layers": ["local", "lsh"] * 2,
        "feed_forward_size": 96,
    },
    "longcat_flash": {
        "expert_ffn_hidden_size": 32,
        "ffn_hidden_size": 96,
        "zero_expert_num": 2,
        "moe_topk": 2,
        "head_dim": 8,
    },
    "moshi": {"audio_vocab_size": 64},
    "luke": {"entity_vocab_size": 32, "entity_emb_size": 16},
    "xlm": {"emb_dim": 64, "n_words": 128, "max_position_embeddings": 64},
    "flaubert": {"emb_dim": 64, "n_words": 128, "max_position_embeddings": 64},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {
        "num_hidden_layers": 6,
        "layer_types": ["mamba", "hybrid"] * 3,
        "hybrid_layer_ids": [1, 3, 5],
        "mamba_headdim": 16,
        "n_mamba_heads": 8,
        "mamba_ngroups": 1,
        "num_mem_blocks": 1,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zaya": {"num_experts_per_tok": 1},
    "dots3_note_text": {"num_key_value_heads": 4},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "perceiver": {"d_latents": 32, "num_latents": 8, "num_blocks": 1, "num_self_attends_per_block": 4},
    "falcon": {"num_kv_heads": 2},
    "granite": {"residual_multiplier": 0.3},
    "minicpm3": {"scale_depth": 1.4},
    "mpnet": {"pad_token_id": 1},
}
"""What one family needs beside."""


def build(family: str) -> torch.nn.Module:
    """A small random model in eval mode, its norms and biases away from their trivial first values."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = _config(CONFIG_MAPPING[family])
        causal = family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        if causal and hasattr(config, "is_decoder") and not getattr(config, "is_encoder_decoder", False):
            config.is_decoder = True
        auto = AutoModelForCausalLM if causal else AutoModelForMaskedLM
        with torch.device("meta"):
            count = sum(p.numel() for p in auto.from_config(config).parameters())
        if count > LARGEST:
            raise ValueError(f"{count} parameters from a small config")
        torch.manual_seed(1)
        model = auto.from_config(config).eval().requires_grad_(False).float()
    for weight in model.parameters():
        if weight.is_floating_point():
            weight.add_(0.1 * torch.randn_like(weight))
    return model


def vocabulary(model: torch.nn.Module) -> int:
    """Tokens that a model knows."""
    return int(getattr(model.config.get_text_config(), "vocab_size", 60))


VISION: dict[str, Any] = {
    "image_size": 16,
    "patch_size": 8,
    "num_channels": 3,
    "depth": 2,
    "num_global_layers": 1,
    "out_hidden_size": 64,
    "vision_output_dim": 64,
    "projection_dim": 64,
}


def _config(cls: Any) -> Any:
    """A small config of a class, with small configs of its parts (text, vision, audio)."""
    known = _names(cls)
    sizes = {name: value for name, value in {**SIZES, **VISION}.items() if name in known}
    for name, part in getattr(cls, "sub_configs", {}).items():
        if part is AutoConfig:
            part = type(getattr(cls(), name))
        if part not in (cls, type(None)):
            sizes[name] = _config(part).to_dict()
    return cls(**sizes | SPECIAL.get(cls.model_type, {}))


def _names(cls: type) -> set[str]:
    import inspect

    names = set(inspect.signature(cls.__init__).parameters)
    for base in cls.__mro__:
        names |= set(getattr(base, "__annotations__", {}))
    return {n for n in names if n not in getattr(cls, "attribute_map", {})}
