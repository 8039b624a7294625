"""Hugging Face models and tokenizers: loaded, prepared for harvesting, and how long a text they take."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from ndm_fast.activations.model_source import Source, loading, locate
from ndm_fast.activations.quantized import quantized_by, reads_with_head
from ndm_fast.activations.sites import blocks_without, resolve_sites
from ndm_fast.config import HarvestConfig
from ndm_fast.errors import InputError

DEFAULT_CONTEXT = 1024


_POSITIONS_AFTER_PADDING = (
    "camembert",
    "data2vec-text",
    "esm",
    "ibert",
    "longformer",
    "luke",
    "mpnet",
    "prophetnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
)
"""Families that count positions from the padding token's id on: RoBERTa's 514 serve 512 tokens."""


def load_model(
    name: str,
    dtype: str = "float32",
    device: str = "cpu",
    *,
    head: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """A Hugging Face model in eval mode, and its fast tokenizer.

    Args:
        name: Hugging Face name, local folder, ``.gguf`` file, folder of a PEFT adapter, or one of the models
            that come as Python packages: ``"minilm"``, ``"smollm2"``, ``"gemma3-270m"``.
        head: with its language-model head, for logits.
        revision: branch, tag or commit of a hub model.
        trust_remote_code: run code that comes with the model.

    Raises:
        InputError: there is no such model, it cannot be loaded, or it has no language-model head.
    """
    source = locate(name, _unpack, revision=revision, trust_remote_code=trust_remote_code)
    tokenizer = _tokenizer(source)
    model = _model(source, getattr(torch, dtype), head, device)
    return model.eval().requires_grad_(False).to(device), tokenizer


def load_tokenizer(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The fast tokenizer of a model; arguments and errors as for :func:`load_model`."""
    return _tokenizer(locate(name, _unpack, revision=revision, trust_remote_code=trust_remote_code))


def load_config(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The Hugging Face config of a model; arguments and errors as for :func:`load_model`."""
    source = locate(name, _unpack, revision=revision, trust_remote_code=trust_remote_code)
    with loading(source):
        return AutoConfig.from_pretrained(source.place, **source.options)


def empty_model(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """A model without weights, on the meta device; arguments and errors as for :func:`load_model`."""
    source = locate(name, _unpack, revision=revision, trust_remote_code=trust_remote_code)
    with loading(source):
        config = AutoConfig.from_pretrained(source.place, **source.options)
        with torch.device("meta"):
            return AutoModel.from_config(config, trust_remote_code=trust_remote_code)


def _tokenizer(source: Source) -> Any:
    with loading(source):
        tokenizer = AutoTokenizer.from_pretrained(source.tokenizer_place, **source.options)
        if len(tokenizer) <= len(tokenizer.all_special_ids):
            # Where the files are missing, transformers 5 makes up a tokenizer without a word.
            raise ValueError("its tokenizer has no vocabulary")
    return tokenizer


def _model(source: Source, dtype: torch.dtype, head: bool, device: str = "cpu") -> Any:
    if source.is_gguf:  # whose config takes long to read
        config, quantized = None, None
    else:
        with loading(source):
            config = AutoConfig.from_pretrained(source.place, **source.options)
            quantized = quantized_by(source, config)
    through_head = bool(source.adapter) or reads_with_head(quantized, config)
    kind: Any = AutoModelForCausalLM if head or through_head else AutoModel
    options = {**source.options, **({"device_map": {"": device}} if quantized else {})}
    with loading(source, quantized):
        if kind is AutoModelForCausalLM and config is not None:
            _check_head(source, config)
        model, found = kind.from_pretrained(source.place, dtype=dtype, output_loading_info=True, **options)
        _check_weights(source, model, found["missing_keys"])
        if source.is_gguf:
            _forget_quantization(model)
        if source.adapter:
            model = _with_adapter(source, model)
    return model.base_model if through_head and not head else model


def _check_head(source: Source, config: Any) -> None:
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) not in AutoModelForCausalLM._model_mapping and not own_code:
        raise _no_head(source, config.model_type)


def _check_weights(source: Source, model: Any, missing: Any) -> None:
    """Weights that the files lack are drawn at random by transformers."""
    missing = sorted(key for key in missing if "pooler" not in key)  # no site lies behind a pooler
    if not missing:
        return
    prefix = f"{model.base_model_prefix}."
    if model.base_model is not model and not any(key.startswith(prefix) for key in missing):
        raise _no_head(source, model.config.model_type)
    raise InputError(
        f"cannot load model {source.name!r}: its files lack {len(missing)} of its weights, "
        f"{missing[0]} first: check the name or folder"
    )


def _no_head(source: Source, kind: str) -> InputError:
    return InputError(
        f"model {source.name!r} ({kind}) has no language-model head, so it gives no logits: take a causal "
        "language model"
    )


def _forget_quantization(model: Any) -> None:
    """A GGUF file's weights are plain once read, but transformers still calls the model quantized."""
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        if name in vars(model):
            delattr(model, name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _with_adapter(source: Source, model: Any) -> Any:
    """The model with an adapter's change added to its weights."""
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(model, source.adapter)
    if not hasattr(adapted, "merge_and_unload") or adapted.peft_config["default"].is_prompt_learning:
        raise InputError(
            f"the adapter {source.name!r} adds tokens to the text, and no weights to the model: take LoRA"
        )
    return adapted.merge_and_unload()


def _unpack(file: Path, folder: Path) -> None:
    """Write a GGUF file as a Hugging Face folder, which loads in a second, with weights in float32."""
    source = locate(str(file), _unpack)
    tokenizer = _tokenizer(source)
    model = _model(source, torch.float32, head=True)
    with loading(source):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def prepare_model(model: Any, config: HarvestConfig) -> None:
    """Compile the model's blocks where ``config.compile_model`` asks for it; they stay compiled.

    Hooks do not reach into compiled code: blocks that one of ``config.site`` lies inside of are left as they
    are, and no other site inside of a block can be read afterwards.

    Raises:
        InputError: unknown site; a family whose blocks are not known.
    """
    if config.compile_model:
        for block in blocks_without(model, resolve_sites(model, config.site)):
            block.forward = torch.compile(block.forward)


def longest_context(config: Any) -> int:
    """Tokens that a model takes, as far as its Hugging Face config says."""
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if positions is None or positions < 1:
        return sys.maxsize
    if text.model_type in _POSITIONS_AFTER_PADDING:
        return positions - (text.pad_token_id or 0) - 1
    return positions
