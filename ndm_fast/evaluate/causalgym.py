"""Minimal pairs in CausalGym's form (Arora et al. 2024): which subspace tells two sentences apart?

    base  The| guard| behind the managers    -> " is"
    src   The| guards| behind the managers   -> " are"

Each span of the base sentence takes a subspace from the same span of the source, at the last token of both.
The effect is the log odds ratio: the fall of log p(base label) - log p(source label).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from ndm_fast.activations.site_rows import site_activations
from ndm_fast.config import HubOptions
from ndm_fast.errors import InputError
from ndm_fast.evaluate.baselines import STANDARD_BASELINES, baseline_partition
from ndm_fast.evaluate.circuits.ioi import logit_difference
from ndm_fast.evaluate.gini import top_share
from ndm_fast.evaluate.patching.answers import answer_token, prompt_tokens
from ndm_fast.evaluate.patching.language_model import check_lengths, load_language_model
from ndm_fast.evaluate.patching.layers_above import LayersAbove
from ndm_fast.evaluate.patching.patching import patch_effects
from ndm_fast.evaluate.patching.prompts import pad_prompts
from ndm_fast.evaluate.revision import trained_on
from ndm_fast.partition import SubspacePartition

_FIELDS = ("base", "src", "base_type", "src_type", "base_label", "src_label")

_BOS = "<|endoftext|>"
"""What their first span begins with; the tokenizer's own BOS takes its place."""


class MinimalPair(NamedTuple):
    """Two sentences in aligned spans, which differ in one feature, and what follows each."""

    task: str
    base: list[str]
    src: list[str]
    base_label: str
    src_label: str


class _Tokens(NamedTuple):
    """A pair in one tokenizer."""

    pair: MinimalPair
    base: list[int]
    src: list[int]
    last: list[tuple[int, int] | None]
    """Per span its last token in base and source; None where a side has none."""
    labels: tuple[int, int]


@dataclass(frozen=True)
class SpanEffects:
    """Log odds ratios of one span, mean over its pairs."""

    task: str
    span: int
    text: str
    """The span in the first pair's base."""
    pairs: int
    right: float
    """Share of pairs whose base sentence the model continues with the base label rather than the other."""
    clean: float
    """Log odds of the base label without a patch."""
    whole: float
    """Log odds ratio where the whole activation is patched."""
    effect: dict[str, list[float]]
    """Method -> [S] log odds ratio of each subspace."""


def read_pairs(path: str | Path) -> list[MinimalPair]:
    """Pairs from a JSON list, or a file with one JSON object a line.

    Each has ``base`` and ``src`` (equally long lists of spans that join to the sentence, or single texts),
    ``base_type``, ``src_type``, ``base_label``, ``src_label`` and perhaps ``task``.

    Raises:
        InputError: the file cannot be read or has another form.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        records = json.loads(text) if text.lstrip().startswith("[") else _lines(text)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read {path} ({error}): give a JSON file of CausalGym's form") from None
    if not records:
        raise InputError(f"{path} holds no pair: give objects with {', '.join(_FIELDS)}")
    return [_pair(record, f"pair {number} of {path}") for number, record in enumerate(records)]


def _lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def _pair(record: Any, where: str) -> MinimalPair:
    missing = [n for n in _FIELDS if n not in record] if isinstance(record, dict) else list(_FIELDS)
    if missing:
        raise InputError(f"{where} has no {missing[0]!r}: give objects with {', '.join(_FIELDS)}")
    base, src = (record[n] if isinstance(record[n], list) else [record[n]] for n in ("base", "src"))
    labels = record["base_label"], record["src_label"]
    if len(base) != len(src) or not base or not all(isinstance(t, str) for t in (*base, *src, *labels)):
        raise InputError(f"{where} is not of CausalGym's form: base and src are lists of as many texts")
    return MinimalPair(str(record.get("task", "")), base, src, *labels)


def _tokens(tokenizer: Any, pair: MinimalPair) -> _Tokens | None:
    """None where the labels begin alike or change the last token of their sentence."""
    sides = []
    for spans in (pair.base, pair.src):
        spans = [spans[0].removeprefix(_BOS), *spans[1:]]
        text = "".join(spans)
        sides.append((prompt_tokens(tokenizer, text), _last_tokens(tokenizer, spans), text))
    (base, base_last, text), (src, src_last, _) = sides
    labels = [answer_token(tokenizer, text, label) for label in (pair.base_label, pair.src_label)]
    if None in labels or labels[0] == labels[1] or not base or not src:
        return None
    last = [None if b is None or s is None else (b, s) for b, s in zip(base_last, src_last, strict=True)]
    return _Tokens(pair, base, src, last, (int(labels[0] or 0), int(labels[1] or 0)))


def _last_tokens(tokenizer: Any, spans: Sequence[str]) -> list[int | None]:
    """Number of the last token that ends inside each span."""
    if not getattr(tokenizer, "is_fast", False):
        raise InputError("minimal pairs need a fast tokenizer, which knows where each token lies in the text")
    encoded = tokenizer("".join(spans), add_special_tokens=False, return_offsets_mapping=True)
    before = 0 if tokenizer.bos_token_id is None else 1
    found: list[int | None] = []
    begin = 0
    for span in spans:
        end = begin + len(span)
        inside = [n for n, (_, last) in enumerate(encoded["offset_mapping"]) if begin < last <= end]
        found.append(inside[-1] + before if inside else None)
        begin = end
    return found


def run_causalgym(
    partition: SubspacePartition,
    pairs: Sequence[MinimalPair],
    model_name: str,
    *,
    site: str | None = None,
    data: str | None = None,
    rows: int = 64,
    device: str = "cpu",
    hub: HubOptions | None = None,
) -> list[SpanEffects]:
    """Log odds ratios of every subspace at every span, by task, beside partitions of the same widths.

    Args:
        site: default the partition's own.
        data: text for principal components; default what the partition was trained on, and where that is not
            known either, PCA is left out.
        hub: the model's revision, default the one that the partition was trained on, and whether its own code
            may run.

    Raises:
        InputError: no site, a partition of another width, no usable pair, a prompt that is too long.
    """
    model, tokenizer = load_language_model(
        model_name, device, hub=trained_on(model_name, hub, partition.source)
    )
    where = site or partition.source.get("site")
    if not where:
        raise InputError("the partition does not say which site it is for: give --site")
    cut = LayersAbove(model, where)
    cut.check_fits(partition)
    usable = [tokens for pair in pairs if (tokens := _tokens(tokenizer, pair))]
    if not usable:
        raise InputError(
            f"in this model's tokenizer the two labels begin alike in all of {len(pairs)} pairs: take others"
        )
    check_lengths(model, [tokens.base for tokens in usable] + [tokens.src for tokens in usable])
    text = data or partition.source.get("data")
    kinds = STANDARD_BASELINES if text else STANDARD_BASELINES[:2]
    activations = (
        site_activations(model, tokenizer, cut.site.name, partition.source, data=text)
        if text
        else torch.empty(0, partition.width, device=device)  # the other two look at none
    )
    methods = {"ndm": partition.to(device)} | {
        kind: baseline_partition(kind, partition.widths, activations) for kind in kinds
    }
    groups = list(_spans(usable))
    with tqdm(total=len(groups) * len(methods), desc="causalgym", unit="span", disable=None) as bar:
        return [_span_effects(model, cut, methods, span, some, rows, bar) for span, some in groups]


def _spans(usable: Iterable[_Tokens]) -> Iterable[tuple[int, list[_Tokens]]]:
    """Span number and the pairs of one task that have it, for every task."""
    by_span: dict[tuple[str, int], list[_Tokens]] = {}
    for tokens in usable:
        for span, last in enumerate(tokens.last):
            if last is not None:
                by_span.setdefault((tokens.pair.task, span), []).append(tokens)
    return ((span, some) for (_, span), some in sorted(by_span.items(), key=lambda item: item[0]))


def _span_effects(
    model: Any,
    cut: LayersAbove,
    methods: dict[str, SubspacePartition],
    span: int,
    some: list[_Tokens],
    rows: int,
    bar: Any,
) -> SpanEffects:
    device = next(model.parameters()).device
    last = [places for tokens in some if (places := tokens.last[span])]
    prompts, sources = (
        pad_prompts([getattr(tokens, side) for tokens in some], device=device) for side in ("base", "src")
    )
    metric = logit_difference([t.labels[0] for t in some], [t.labels[1] for t in some])
    effect: dict[str, list[float]] = {}
    for kind, method in methods.items():
        found = patch_effects(
            model,
            cut.site.name,
            method,
            prompts,
            sources,
            metric,
            positions=[[base] for base, _ in last],
            counterfactual_positions=[[src] for _, src in last],
            rows=rows,
        )
        effect[kind] = found.means.tolist()
        bar.update()
    return SpanEffects(
        some[0].pair.task,
        span,
        some[0].pair.base[span],
        len(some),
        float((found.clean > 0).double().mean()),
        float(found.clean.double().mean()),
        float(found.whole.double().mean()),
        effect,
    )


def causalgym_rows(results: Sequence[SpanEffects]) -> list[dict[str, Any]]:
    """One table row per span and method."""
    return [
        {
            "task": found.task,
            "span": f"{found.span} {found.text.strip()[:24]!r}",
            "pairs": found.pairs,
            "right": found.right,
            "method": kind,
            "whole": found.whole,
            "best": max(range(len(effects)), key=lambda s: abs(effects[s])),
            "log_odds_ratio": max(effects, key=abs),
            "top_share": top_share(effects),
        }
        for found in results
        for kind, effects in found.effect.items()
    ]


def causalgym_json(results: Sequence[SpanEffects]) -> list[dict[str, Any]]:
    """Plain values."""
    return [asdict(found) for found in results]
