"""Models whose weights were quantized before they were saved."""

from __future__ import annotations

from typing import Any

from transformers.quantizers.auto import AutoHfQuantizer

from ndm_fast.activations.model_source import Source
from ndm_fast.errors import InputError


def quantized_by(source: Source, config: Any) -> str | None:
    """What quantized a model's weights, by its config; None where they are plain.

    Raises:
        InputError: a way that transformers does not know; it would take the packed numbers for weights.
    """
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    found = found if isinstance(found, dict) else found.to_dict()
    name = found.get("quant_method") or "bitsandbytes"
    name = str(getattr(name, "value", name))
    if not AutoHfQuantizer.supports_quant_method(found):
        raise InputError(
            f"the weights of model {source.name!r} are quantized by {name!r}, which the installed "
            "transformers does not read: update it, or take the model's plain weights"
        )
    return name


def reads_with_head(quantized: str | None, config: Any) -> bool:
    """Whether weights are found only under the names they were saved under, with a causal head's prefix."""
    return quantized == "torchao" and any(
        "CausalLM" in name or "LMHead" in name for name in config.architectures or ()
    )
