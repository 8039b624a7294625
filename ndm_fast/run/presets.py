"""Settings by name: the paper's models, each fast and as published for parity, and small ones.

The published values are those of the authors' released logs (Huang & Hahn 2025; docs/method.md).
"""

from __future__ import annotations

from typing import Any

from ndm_fast.errors import InputError

_PUBLISHED: dict[str, Any] = {
    "rotation": "exp",
    "search_every": 1,
    "schedule": "constant",
    "warmup_steps": 0,
    "lr": 3e-4,
    "queries": 128,
    "keys": 25 * 16384,
    "pool_rows": 4_194_304,
    "pool_dtype": "float16",
    "eval_every": 1000,
    "checkpoint_every": 2000,
    "mi_keys": 25 * 16384,
}

_OF_THE_PAPER: dict[str, dict[str, Any]] = {
    "gpt2": {
        "model": "gpt2",
        "data": "JeanKaddour/minipile",
        "unit_size": 32,
        "merge_threshold": 0.04,
        "merge_start": 20_000,
        "merge_interval": 8_000,
        "max_steps": 100_000,
    },
    "qwen2.5-1.5b": {
        "model": "Qwen/Qwen2.5-1.5B",
        "site": ["blocks.11.hook_resid_mid"],
        "data": "JeanKaddour/minipile",
        "dtype": "bfloat16",
        "unit_size": 64,
        "merge_threshold": 0.02,
        "merge_start": 20_000,
        "merge_interval": 8_000,
        "max_steps": 100_000,
    },
    "gemma-2-2b": {
        "model": "google/gemma-2-2b",
        "site": ["blocks.9.hook_resid_mid"],
        "data": "JeanKaddour/minipile",
        "dtype": "bfloat16",
        "unit_size": 72,
        "merge_threshold": 0.01,
        "merge_start": 10_000,
        "merge_interval": 4_000,
        "max_steps": 150_000,
    },
}

_FAST: dict[str, Any] = {"rotation": "lazy", "search_every": 32, "precision": "bf16"}
"""What a twin changes: how a step is taken, not what is optimised. Rates and numbers stay the paper's."""

TWINS = {name: f"{name}-published" for name in _OF_THE_PAPER}
"""A fast preset -> the one with the published settings."""

PRESETS: dict[str, dict[str, Any]] = {
    **{name: {**_PUBLISHED, **settings, **_FAST} for name, settings in _OF_THE_PAPER.items()},
    **{TWINS[name]: {**_PUBLISHED, **settings} for name, settings in _OF_THE_PAPER.items()},
    # The fastest way to a low held-out loss on the demo's data: docs/training-speed.md.
    "small": {
        "rotation": "lazy",
        "lr": 2e-2,
        "queries": 256,
        "keys": 4096,
        "search_every": 8,
        "precision": "bf16",
        "max_steps": 600,
        "pool_rows": 65_536,
        "mi_keys": 4096,
    },
    # What finds the variables of a language model's circuits: docs/evaluation.md.
    "language-model": {
        "objective": "log",
        "start": "pca",
        "rotation": "lazy",
        "lr": 1e-2,
        "search_every": 16,
        "precision": "bf16",
        "max_steps": 4000,
        "context_length": 256,
        "bos": True,
        "max_norm_ratio": 3.0,
        "eval_every": 500,
        "checkpoint_every": 500,
    },
    "minilm": {
        "model": "minilm",
        "site": ["blocks.3.hook_resid_post"],
        "data": "docstrings",
        "context_length": 40,
        "unit_size": 24,
        "keys": 32_768,
        "heldout_keys": 98_304,
        "search_every": 4,
        "precision": "bf16",
        "lr": 1.5e-2,
        "max_steps": 2250,
        "merge_start": 1250,
        "merge_interval": 125,
        "merge_threshold": 0.05,
        "merge_lr": 5e-3,
        "pool_rows": 330_000,
        "eval_every": 500,
    },
}


def preset(name: str) -> dict[str, Any]:
    """Settings of a preset by name, ready for ``config.from_flat``."""
    if name not in PRESETS:
        raise InputError(f"unknown preset {name!r}: take one of {', '.join(PRESETS)}")
    return dict(PRESETS[name])
