"""nnsight 0.8: read and replace our sites inside a trace.

    from nnsight.modeling.transformers import TransformersModel

    model = TransformersModel("gpt2", dispatch=True)
    site = traced_site(model, "x9.mid")                   # before the trace
    with model.trace(tokens):
        before = site.read().save()
        site.replace(subspace_patch(partition, [3], source, prompts, positions))
        logits = model.output.logits.save()

As everything in a trace, sites are read and replaced in the order of the forward pass, each once.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ndm_fast.activations.hooks import Replacement, replaced
from ndm_fast.activations.site import Site
from ndm_fast.activations.site_hooks import tensor_at, with_tensor
from ndm_fast.activations.sites import resolve_site
from ndm_fast.activations.wrappers import is_empty
from ndm_fast.errors import InputError


def traced_site(model: Any, name: str) -> TracedSite:
    """A site of a model that nnsight wraps; to be called before the trace.

    Args:
        model: ``nnsight.NNsight(model)``, or a ``TransformersModel`` loaded with ``dispatch=True``.
        name: in any form of ``ndm_fast.activations.sites``.

    Raises:
        InputError: no such site, one in a module that runs again and again, or the model is not loaded yet.
    """
    inner = getattr(model, "_module", None)
    if inner is None:
        raise InputError(f"{type(model).__name__} is no model of nnsight: wrap it, nnsight.NNsight(model)")
    if is_empty(inner):
        raise InputError("nnsight has not loaded the model's weights yet: pass dispatch=True")
    site = resolve_site(inner, name)
    if site.counted_in is not None:
        raise InputError(
            f"nnsight does not tell the calls of {site.module} apart, which {site.name} is one of: use "
            "ndm_fast.collect_activations and ndm_fast.replace_activations"
        )
    return TracedSite(model, site)


class TracedSite:
    """A site, inside a trace.

    Args:
        model: of nnsight. site: of the model that it wraps.
    """

    def __init__(self, model: Any, site: Site) -> None:
        self._module, self.site = model.get(site.module), site
        self._block = None if site.flat_in is None else model.get(site.flat_in)
        self._shape: tuple[int, ...] | None = None

    def read(self) -> Tensor:
        """[B, T, d] the activation, to be saved or used; a copy where the model may write to it."""
        shown = self._shown(self._own())
        return shown.clone() if self.site.copied or self.site.feeds_skip else shown

    def replace(self, replacement: Replacement) -> Tensor:
        """[B, T, d] what the model goes on with.

        Args:
            replacement: function from the activation [B, T, d] to its replacement, such as
                ``ndm_fast.evaluate.patching.subspace_patch`` gives.

        Raises:
            InputError: the function returned another shape.
        """
        own = self._own()
        new = replaced(self._shown(own), replacement, self.site.name, in_place=self.site.feeds_skip)
        if self.site.feeds_skip:
            return new
        scaled = new / self.site.scale if self.site.scale != 1 else new
        written = self.site.layout.put(own, scaled) if self._shape is None else scaled.view(own.shape)
        if self.site.end == "input":
            self._module.input = written
        else:
            self._module.output = with_tensor(self._module.output, written)
        return new

    def _own(self) -> Tensor:
        """The module's tensor."""
        if self._block is not None and self._shape is None:
            self._shape = tuple(self._block.input.shape[:2])
        if self.site.end == "input":
            return self._module.input
        return tensor_at(self._module.output, self.site)

    def _shown(self, own: Tensor) -> Tensor:
        shaped = self.site.layout.view(own) if self._shape is None else own.view(*self._shape, -1)
        return shaped if self.site.scale == 1 else shaped * self.site.scale
