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
from ndm_fast.evaluate.patching.head import Head, forward_is
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
        head: of this model, where it is cut at several sites, so that it is compared only once.
    """

    def __init__(self, model: nn.Module, site: str, head: Head | None = None) -> None:
        self._model: Any = unwrapped(model)
        self.site: Site = resolve_site(model, site)
        self._below = parts_below(model, self.site)
        self._head = head or Head(model)
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
        self,
        activations: Tensor,
        prompts: Prompts,
        columns: Tensor,
        prefix: Prefix | None = None,
        tokens: Tensor | None = None,
    ) -> Tensor:
        """[N, R, V] logits at some columns, from [N, T, d] activations at the site (of :meth:`below`).

        Args:
            columns: [N, R] int64 columns of the padded prompts.
            prefix: of these prompts (``Prefix.rows``); the activations are then of the columns after it.
            tokens: [M] ids of the logits that are wanted; the others may be NaN. None for all.
        """
        return self.above_with_gradient(activations, prompts, columns, prefix, tokens)

    def above_with_gradient(
        self,
        activations: Tensor,
        prompts: Prompts,
        columns: Tensor,
        prefix: Prefix | None = None,
        tokens: Tensor | None = None,
    ) -> Tensor:
        """:meth:`above`, through which gradients flow to the activations."""
        columns = columns - (prefix.columns if prefix else 0)
        kept, place = columns.unique(return_inverse=True)
        rows = torch.arange(len(columns), device=columns.device)[:, None]

        def run() -> Tensor:
            return self._pass(activations, prompts, kept, prefix)[rows, place]

        return self._head.logits(run, tokens)

    def _pass(self, activations: Tensor, prompts: Prompts, kept: Tensor, prefix: Prefix | None) -> Tensor:
        """[N, C, V] logits of the C columns kept."""
        inputs: dict[str, Any] = {**prompts.model_inputs(), "use_cache": False}
        if prefix is not None:
            inputs = prefix.again().rest_of(prompts)
        with ExitStack() as stack:
            for module, forward in self._passed_over():
                stack.enter_context(forward_is(module, forward))
            name = self._entrance()
            stack.enter_context(replace_activations(self._model, {name: lambda _: activations}))
            return self._model(**inputs, logits_to_keep=kept).logits

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
