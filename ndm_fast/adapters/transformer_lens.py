"""TransformerLens 4: our sites are hook points of its bridge, our replacements its hook functions.

    hooks = patching_hooks(bridge, {"x9.mid": subspace_patch(partition, [3], source, prompts, positions)})
    logits = bridge.run_with_hooks(tokens, fwd_hooks=hooks)

The bridge runs the Hugging Face model itself, so its activations are ours. A bridge with processed weights
(``enable_compatibility_mode()`` folds norms and centres what writes to the stream) has others, for which a
partition of ours does not hold: it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ndm_fast.activations.families import family_of
from ndm_fast.activations.hooks import Replacement, replaced
from ndm_fast.activations.site import FORMS, canonical_name, parse
from ndm_fast.activations.wrappers import join
from ndm_fast.errors import InputError

_BEFORE_NORMS = ("attn_out", "resid_mid")
"""What the bridge of a post-norm family (BERT) has under these names is another tensor than ours."""

HookFunction = Callable[..., Tensor]
"""``hook(activation, hook=point)``, as TransformerLens calls it."""


def hook_name(bridge: Any, site: str) -> str:
    """The name under which a ``TransformerBridge`` has a site.

    Args:
        site: canonical or short name.

    Raises:
        InputError: the bridge has no such hook point, or its weights are processed.
    """
    _check_raw(bridge)
    name = canonical_name(site)
    point = parse(name)
    if point is None:
        raise InputError(
            f"{site!r} is no site that TransformerLens names: give one of {FORMS.rpartition(',')[0]}"
        )
    points, block = bridge.hook_dict, name.rpartition(".")[0]
    if name not in points:
        near = [other for other in points if parse(other) and other.rpartition(".")[0] == block]
        raise InputError(
            f"the bridge has no hook point {name}: " + (f"use {join(near)}" if near else f"no block {block}")
        )
    if point[1] in _BEFORE_NORMS and _is_post_norm(bridge):
        raise InputError(
            f"{name} of the bridge is before the norm of this family, ours is behind it: use "
            f"{block}.hook_resid_pre or resid_post"
        )
    return name


def site_name(bridge: Any, hook: str) -> str:
    """The canonical site of any hook point's name, such as ``blocks.3.ln2.hook_in``.

    Raises:
        InputError: there is no such hook point, or it is none of the named sites.
    """
    _check_raw(bridge)
    points = bridge.hook_dict
    if hook not in points:
        raise InputError(f"the bridge has no hook point {hook!r}: list(bridge.hook_dict) names them")
    found = next((name for name in points if parse(name) and points[name] is points[hook]), None)
    if found is None:
        raise InputError(
            f"{hook} is not on the residual stream, nor what attention or MLP add to it: there is no site "
            "of that name"
        )
    return found


def patching_hooks(bridge: Any, replacements: Mapping[str, Replacement]) -> list[tuple[str, HookFunction]]:
    """``fwd_hooks`` that replace activations, as ``ndm_fast.replace_activations`` does on a bare model.

    Args:
        replacements: site name -> function from the activation [B, T, d] to its replacement, such as
            ``ndm_fast.evaluate.patching.subspace_patch`` gives.

    Returns:
        Pairs for ``bridge.run_with_hooks(tokens, fwd_hooks=...)`` or ``bridge.hooks(fwd_hooks=...)``.

    Raises:
        InputError: see :func:`hook_name`; from the forward pass, where a function returns another shape.
    """
    return [(hook_name(bridge, site), _hook(site, function)) for site, function in replacements.items()]


def _hook(site: str, replacement: Replacement) -> HookFunction:
    point = parse(canonical_name(site))
    in_place = point is not None and point[1] == "resid_mid"

    def change(activation: Tensor, hook: Any = None) -> Tensor:
        return replaced(activation, replacement, site, in_place=in_place)

    return change


def _is_post_norm(bridge: Any) -> bool:
    model = getattr(bridge, "original_model", None)
    family = None if model is None else family_of(model)
    return family is not None and family.is_post_norm


def _check_raw(bridge: Any) -> None:
    if not hasattr(bridge, "hook_dict"):
        raise InputError(
            f"{type(bridge).__name__} is no bridge of TransformerLens: give one of "
            "TransformerBridge.boot_transformers(...)"
        )
    if getattr(bridge, "_weights_processed", False):
        raise InputError(
            "the bridge's weights are processed, so its activations are not the model's: boot it anew, "
            "without enable_compatibility_mode() or with no_processing=True"
        )
