"""Logits of a few tokens only: the head of a large vocabulary can cost more than the layers do."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ndm_fast.activations.wrappers import unwrapped

_LARGEST_DIFFERENCE = {torch.float32: 1e-4, torch.float64: 1e-4}
"""Of logits, over their spread, between the whole head and the rows of some tokens."""

_LARGEST_DIFFERENCE_IN_HALF = 0.05

logger = logging.getLogger("ndm_fast")


class TokenMetric:
    """A metric that reads the logits of some tokens only; all others may be NaN.

    Args:
        metric: see ``ndm_fast.evaluate.patching.Metric``.
        tokens: ids that it reads, over all prompts.
    """

    def __init__(self, metric: Callable[[Tensor, Tensor], Tensor], tokens: Tensor) -> None:
        self.metric, self.tokens = metric, tokens.unique()

    def __call__(self, logits: Tensor, rows: Tensor) -> Tensor:
        return self.metric(logits, rows)


def tokens_of(metric: Callable[[Tensor, Tensor], Tensor]) -> Tensor | None:
    """The ids that a metric reads; None for all."""
    return metric.tokens if isinstance(metric, TokenMetric) else None


class Head:
    """A model's output head, of which a pass may compute some tokens' rows alone.

    What a family does with logits behind the head, as soft-capping, need not work token by token. So the
    first pass with some tokens is compared with one of all, and where they differ all are computed from then
    on, which the log says.

    Args:
        model: Hugging Face model with a language-model head.
    """

    def __init__(self, model: nn.Module) -> None:
        network: Any = unwrapped(model)
        head = network.get_output_embeddings()
        plain = type(head) is nn.Linear and head.weight.is_floating_point()
        self._head: nn.Linear | None = head if plain else None
        self._compared = False

    def logits(self, run: Callable[[], Tensor], tokens: Tensor | None) -> Tensor:
        """[..., V] logits of a forward pass; with ``tokens``, NaN but for those where that saves work.

        Args:
            run: a forward pass of the model.
            tokens: [M] ids whose logits are wanted; None for all.
        """
        if tokens is None or self._head is None:
            return run()
        tokens = tokens.to(self._head.weight.device)
        if not self._compared:
            whole = run()
            self._compare(whole, run, tokens)
            return whole
        with _rows_alone(self._head, tokens):
            some = run()
        whole = some.new_full((*some.shape[:-1], self._head.out_features), torch.nan)
        return whole.index_copy(-1, tokens.to(some.device), some)

    @torch.no_grad()
    def _compare(self, whole: Tensor, run: Callable[[], Tensor], tokens: Tensor) -> None:
        assert self._head is not None
        with _rows_alone(self._head, tokens):
            some = run()
        wanted = whole[..., tokens.to(whole.device)].float()
        allowed = _LARGEST_DIFFERENCE.get(whole.dtype, _LARGEST_DIFFERENCE_IN_HALF) * whole.float().std()
        same = some.shape == wanted.shape and bool((some - wanted).abs().max() <= allowed)
        if whole.shape[-1] != self._head.out_features or not same:
            logger.info("all logits are computed: of this model a few alone are not the same")
            self._head = None
        self._compared = True


@contextmanager
def _rows_alone(head: nn.Linear, tokens: Tensor) -> Iterator[None]:
    weight = head.weight[tokens]
    bias = None if head.bias is None else head.bias[tokens]
    with forward_is(head, lambda hidden: nn.functional.linear(hidden, weight, bias)):
        yield


@contextmanager
def forward_is(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
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
