"""The language models that are patched: those whose logits mean something, and prompts that they can take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import MODEL_FOR_MASKED_LM_MAPPING

from ndm_fast.activations.models import load_model, longest_context
from ndm_fast.config import HubOptions
from ndm_fast.errors import InputError

_HEADS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def load_language_model(name: str, device: str = "cpu", *, hub: HubOptions | None = None) -> tuple[Any, Any]:
    """A causal language model in eval mode, and its fast tokenizer.

    Args:
        hub: see ``load_model``.

    Raises:
        InputError: as ``load_model``; also one that was trained to fill in masks.
    """
    model, tokenizer = load_model(name, device=device, head=True, **(hub or {}))
    config = model.config
    masked = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    saved_as = config.architectures or []
    if masked and not any(kind.endswith(_HEADS) for kind in saved_as):
        raise InputError(
            f"{name} is a {', '.join(saved_as) or config.model_type} without a causal language-model head, "
            "so it has no logits to measure: take a model that predicts the next token"
        )
    return model, tokenizer


def check_lengths(model: Any, prompts: Sequence[Sequence[int]]) -> None:
    """Refuse prompts that are longer than the model's context."""
    check_length(model, max(map(len, prompts)))


def check_length(model: Any, longest: int) -> None:
    """Refuse a prompt of more tokens than the model's context."""
    most = longest_context(model.config)
    if longest > most:
        raise InputError(
            f"a prompt has {longest} tokens, the model takes {most}: give shorter ones, or another model"
        )
