"""Families whose named points are known by heart: they resolve without a run, and before weights are loaded.

All other families are told by their structure, `ndm_fast.activations.structure`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ndm_fast.activations.site import End
from ndm_fast.activations.wrappers import describe, join
from ndm_fast.errors import InputError

_BLOCK_INPUT: tuple[str, End] = ("", "input")


_BLOCK_OUTPUT: tuple[str, End] = ("", "output")


@dataclass(frozen=True)
class Family:
    """Where the named points of one architecture live."""

    blocks: tuple[str, ...]  # paths the list of blocks may have: under a head first, bare last
    mid: tuple[str, End] | None  # module inside the block and its end; None: no such point
    attn_out: str
    mlp_out: str
    parallel_flag: str | None = None  # config field that, when true, leaves the block without resid_mid
    attention: str = ""  # the attention module itself, where attn_out is a module after it

    def points(self, config: Any) -> dict[str, tuple[str, End]]:
        """Point -> (module inside the block, end), in the order of the forward pass."""
        parallel = self.parallel_flag is not None and bool(getattr(config, self.parallel_flag))
        mid = {} if self.mid is None or parallel else {"resid_mid": self.mid}
        return {
            "resid_pre": _BLOCK_INPUT,
            "attn_out": (self.attn_out, "output"),
            **mid,
            "mlp_out": (self.mlp_out, "output"),
            "resid_post": _BLOCK_OUTPUT,
        }

    @property
    def is_post_norm(self) -> bool:
        """Whether the family normalises after each sum, so that resid_mid is a module's output, not a sum."""
        return self.mid is not None and self.mid[1] == "output"

    def blocks_path(self, model: nn.Module) -> str:
        """Path of the list of blocks.

        Raises:
            InputError: it is at none of the places known.
        """
        paths = {name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
        for path in self.blocks:
            if path in paths:
                return path
        raise InputError(
            f"the blocks of {describe(model)} are not at {join(self.blocks)}: load it with AutoModel or "
            "AutoModelForCausalLM"
        )


_LLAMA_LIKE = Family(
    blocks=("model.layers", "layers"),
    mid=("post_attention_layernorm", "input"),
    attn_out="self_attn",
    mlp_out="mlp",
)


# Gemma normalises each branch before adding it, so what is added is the output of these norms.
_GEMMA = Family(
    blocks=(
        "model.language_model.layers",
        "language_model.model.layers",
        "language_model.layers",
        "model.layers",
        "layers",
    ),
    mid=("pre_feedforward_layernorm", "input"),
    attn_out="post_attention_layernorm",
    mlp_out="post_feedforward_layernorm",
    attention="self_attn",
)


# `config.model_type` -> family.
_FAMILIES: dict[str, Family] = {
    "gpt2": Family(("transformer.h", "h"), mid=("ln_2", "input"), attn_out="attn", mlp_out="mlp"),
    "llama": _LLAMA_LIKE,
    "mistral": _LLAMA_LIKE,
    "qwen2": _LLAMA_LIKE,
    "qwen3": _LLAMA_LIKE,
    "gemma2": _GEMMA,
    "gemma3": _GEMMA,
    "gemma3_text": _GEMMA,
    "phi": Family(("model.layers", "layers"), mid=None, attn_out="self_attn", mlp_out="mlp"),
    "gpt_neox": Family(
        ("gpt_neox.layers", "layers"),
        mid=("post_attention_layernorm", "input"),
        attn_out="post_attention_dropout",
        mlp_out="post_mlp_dropout",
        parallel_flag="use_parallel_residual",
        attention="attention",
    ),
    "bert": Family(
        ("bert.encoder.layer", "encoder.layer"),
        mid=("attention.output", "output"),
        attn_out="attention.output.dropout",
        mlp_out="output.dropout",
    ),
}


def family_of(model: nn.Module) -> Family | None:
    """The family of a model, where it is in the table."""
    return _FAMILIES.get(getattr(getattr(model, "config", None), "model_type", ""))
