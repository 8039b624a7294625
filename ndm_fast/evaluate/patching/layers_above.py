"""Run a model up to a site, then only what lies above the site, for any number of changed activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ndm_fast.activations.hooks import collect_activations, forward_errors, replace_activations
from ndm_fast.activations.sites import Site, parts_below, resolve_site, site_width
from ndm_fast.activations.wrappers import unwrapped
from ndm_fast.errors import InputError
from ndm_fast.evaluate.patching.language_model import check_length
from ndm_fast.evaluate.patching.prefix import Prefix
from ndm_fast.evaluate.patching.prompts import Prompts
from ndm_fast.partition import SubspacePartition


class LayersAbove:
    """A causal language model cut in two at a site.

    Blocks below the site are passed over, so a forward pass costs what lies above. Where the site is not in
    the residual stream of a pre-norm family the whole model runs; the result is the same
    (``runs_whole_model`` tells).

    Args:
        model: Hugging Face model with a language-model head, in eval mode.
        site: any name of ``ndm_fast.activations.sites``.
    """

    def __init__(self, model: nn.Module, site: str) -> None:
        self._model: Any = unwrapped(model)
        self.site: Site = resolve_site(model, site)
        self._below = parts_below(model, self.site)
        self._tuples = True

    @property
    def runs_whole_model(self) -> bool:
        """Whether nothing is saved, because the layers below cannot be passed over at this site."""
        return self._below is None

    def check_fits(self, partition: SubspacePartition) -> None:
        """Refuse a partition of another width than the site."""
        width = site_width(self._model, self.site)
        if partition.width != width:
            raise InputError(
                f"the partition is {partition.width} wide, {self.site.name} of this model {width}: "
                "take the model and site that it was trained on"
            )

    @torch.no_grad()
    def below(self, prompts: Prompts) -> Tensor:
        """[N, T, d] activations at the site; nothing above it runs."""
        check_length(self._model, prompts.tokens.shape[1])
        with (
            self.watching(),
            collect_activations(self._model, [self.site.name]) as captured,
            forward_errors(self._model, f"{self.site.name}, prompts", prompts.tokens),
        ):
            self._model(**prompts.model_inputs(), use_cache=False)
        return captured[self.site.name]

    @torch.no_grad()
    def above(
        self, activations: Tensor, prompts: Prompts, columns: Tensor, prefix: Prefix | None = None
    ) -> Tensor:
        """[N, R, V] logits at some columns, from [N, T, d] activations at the site (of :meth:`below`).

        Args:
            columns: [N, R] int64 columns of the padded prompts.
            prefix: of these prompts (``Prefix.rows``); the activations are then of the columns after it.
        """
        return self.above_with_gradient(activations, prompts, columns, prefix)

    def above_with_gradient(
        self, activations: Tensor, prompts: Prompts, columns: Tensor, prefix: Prefix | None = None
    ) -> Tensor:
        """:meth:`above`, through which gradients flow to the activations."""
        if prefix is None:
            inputs: dict[str, Any] = {**prompts.model_inputs(), "use_cache": False}
        else:
            inputs, columns = prefix.rest_of(prompts), columns - prefix.columns
        kept, place = columns.unique(return_inverse=True)
        with ExitStack() as stack:
            for module, forward in self._passed_over():
                stack.enter_context(_forward_is(module, forward))
            name = self._entrance()
            stack.enter_context(replace_activations(self._model, {name: lambda _: activations}))
            result = self._model(**inputs, logits_to_keep=kept)
        rows = torch.arange(len(columns), device=columns.device)[:, None]
        return result.logits[rows, place]

    def _entrance(self) -> str:
        """Where the activations go in: with attention passed over, resid_mid is the block's own input."""
        name = self.site.name
        return name.replace("resid_mid", "resid_pre") if self._below is not None else name

    def _passed_over(self) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
        """Modules below the site, and what they do instead of their work."""
        blocks, attention = self._below or ([], None)
        for block in blocks:
            yield block, lambda hidden, *_, **__: (hidden,) if self._tuples else hidden
        if attention is not None:  # adds nothing to an input that holds its part already

            def nothing(hidden: Tensor | None = None, *_: Any, **named: Any) -> tuple[Tensor, None]:
                return torch.zeros_like(named["hidden_states"] if hidden is None else hidden), None

            yield attention, nothing

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Learn whether blocks return a tensor (transformers 5) or a tuple (some families in 4)."""
        blocks = self._below[0] if self._below else []

        def note(_: nn.Module, __: Any, output: Any) -> None:
            self._tuples = isinstance(output, tuple)

        handle = blocks[0].register_forward_hook(note) if blocks else None
        try:
            yield
        finally:
            if handle:
                handle.remove()


@contextmanager
def _forward_is(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """The module computes something else inside the block; its hooks stay."""
    had_own = "forward" in vars(module)
    before = module.forward
    module.forward = forward
    try:
        yield
    finally:
        if had_own:
            module.forward = before
        else:
            del module.forward
