"""What a model is inside of its wrappers, where it runs, and how it names itself."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of torch.compile, DataParallel, DistributedDataParallel and PEFT."""
    while True:
        inner: Any = None
        if _is_compiled(model):
            inner = model.get_submodule("_orig_mod")
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        elif hasattr(model, "peft_config"):
            base: Any = getattr(model, "get_base_model", None)  # transformers' own adapters are no wrapper
            inner = None if base is None else base()
        if inner is None or inner is model:
            return model
        model = inner


def _is_compiled(model: nn.Module) -> bool:
    return isinstance(model, torch._dynamo.OptimizedModule)


def without_compiler(model: nn.Module) -> AbstractContextManager[Any]:
    """Run a compiled model eagerly inside the context: compiled code passes hooks over."""
    compiled = _is_compiled(model) or any(
        module._compiled_call_impl is not None for module in model.modules()
    )
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def input_device(model: nn.Module) -> torch.device:
    """Where the model takes its tokens; its first weights may lie on disk, loaded when they are needed."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)  # accelerate's
        if (device := getattr(hook, "execution_device", None)) is not None:
            return torch.device(device)
    devices = (parameter.device for parameter in model.parameters())
    return next((device for device in devices if device.type != "meta"), torch.device("cpu"))


def is_empty(model: nn.Module) -> bool:
    """Whether the model has no weights, so that it cannot run."""
    offloaded = any(hasattr(module, "_hf_hook") for module in model.modules())
    return not offloaded and any(parameter.is_meta for parameter in model.parameters())


def text_config(model: nn.Module) -> Any:
    """The config that has the language model's sizes (multimodal models nest it)."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def describe(model: nn.Module) -> str:
    """The model's class and family, for messages."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    return f"{type(model).__name__} ({kind})" if kind else type(model).__name__


def join(names: Iterable[str]) -> str:
    """Names in a message."""
    return ", ".join(names) or "none"
