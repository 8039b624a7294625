"""Keys and values of the tokens before a patch: nothing there changes, so they are computed once."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ndm_fast.evaluate.patching.prompts import Prompts

_LARGEST_DIFFERENCE = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Of logits, over their spread, between a pass over whole prompts and one that goes on from a prefix."""


_LARGEST_DIFFERENCE_IN_HALF = 0.1


class Prefix(NamedTuple):
    """What a model remembers of the first ``columns`` columns of N padded prompts."""

    columns: int
    cache: Any
    """transformers' ``DynamicCache``."""

    def rows(self, which: Tensor) -> Prefix:
        """The prefix of some of the prompts."""
        found = self.again()
        found.cache.batch_select_indices(which)
        return found

    def again(self) -> Prefix:
        """The same keys and values for one more forward pass, which adds to what it is given."""
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        return Prefix(self.columns, cache)

    def rest_of(self, prompts: Prompts) -> dict[str, Any]:
        """Arguments of a model that goes on after the prefix of these whole prompts."""
        inputs = prompts.model_inputs()
        return {
            "input_ids": inputs["input_ids"][:, self.columns :],
            "attention_mask": inputs["attention_mask"],
            "position_ids": inputs["position_ids"][:, self.columns :],
            "past_key_values": self.cache,
            "use_cache": True,
        }


class PrefixReader:
    """Computes prefixes where the model can go on from them.

    Not every family can: the first prefix asked for is compared with a pass over the whole prompts, and where
    it is not the same there are none. Results are the same with and without, only slower without.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._usable: bool | None = None

    @torch.no_grad()
    def read(self, prompts: Prompts, columns: int) -> Prefix | None:
        """The prefix that ends before a column; None where there is none, or the model cannot use it.

        Every prompt must have a token before the column, as a row of padding alone has no attention.
        """
        if columns < 2 or self._usable is False or int(prompts.starts.max()) >= columns:
            return None
        inputs = {name: value[:, :columns] for name, value in prompts.model_inputs().items()}
        output = self._model(**inputs, use_cache=True, logits_to_keep=1)
        cache = getattr(output, "past_key_values", None)
        if not hasattr(cache, "layers") or not hasattr(cache, "batch_select_indices"):
            self._usable = False
            return None
        prefix = Prefix(columns, cache)
        if self._usable is None:
            self._usable = self._is_same(prompts, prefix)
        return prefix if self._usable else None

    def _is_same(self, prompts: Prompts, prefix: Prefix) -> bool:
        whole = self._model(**prompts.model_inputs(), use_cache=False, logits_to_keep=1).logits
        every = torch.arange(len(prompts.tokens), device=prompts.tokens.device)
        try:
            rest = self._model(**prefix.rows(every).rest_of(prompts), logits_to_keep=1).logits
        except (RuntimeError, ValueError, IndexError, TypeError, AttributeError, NotImplementedError):
            return False  # a family whose cache does not work in parts
        allowed = _LARGEST_DIFFERENCE.get(whole.dtype, _LARGEST_DIFFERENCE_IN_HALF)
        return bool((whole - rest).abs().max() <= allowed * whole.float().std())
