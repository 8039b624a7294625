"""Patching: put a part of another run's activation into a run, and see what changes."""

from ndm_fast.evaluate.patching.patching import (
    Metric,
    PatchEffects,
    logit_of,
    patch,
    patch_effects,
    subspace_patch,
)
from ndm_fast.evaluate.patching.prompts import Positions, Prompts, pad_prompts

__all__ = [
    "Metric",
    "PatchEffects",
    "Positions",
    "Prompts",
    "logit_of",
    "pad_prompts",
    "patch",
    "patch_effects",
    "subspace_patch",
]
