"""Minimal pairs in CausalGym's form (Arora et al. 2024): which subspace tells two sentences apart?

    base  The| guard| behind the managers    -> " is"
    src   The| guards| behind the managers   -> " are"

Each span of the base sentence takes a subspace from the same span of the source, at the last token of both.
The effect is the log odds ratio: the fall of log p(base label) - log p(source label).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from ndm_fast.activations.site_rows import site_activations
from ndm_fast.config import HubOptions
from ndm_fast.errors import InputError
from ndm_fast.evaluate.baselines import STANDARD_BASELINES, baseline_partition
from ndm_fast.evaluate.circuits.ioi import logit_difference
from ndm_fast.evaluate.gini import top_share
from ndm_fast.evaluate.minimal_pairs import MinimalPair, PairTokens, halves_of, pair_tokens
from ndm_fast.evaluate.patching.language_model import check_lengths, load_language_model
from ndm_fast.evaluate.patching.layers_above import LayersAbove
from ndm_fast.evaluate.patching.patching import patch_effects
from ndm_fast.evaluate.patching.prompts import pad_prompts
from ndm_fast.evaluate.revision import trained_on
from ndm_fast.partition import SubspacePartition


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
    best: dict[str, int]
    """Method -> subspace of the largest effect, on these pairs or on those that the span was chosen on."""


class _Group(NamedTuple):
    """The pairs of a task at one span."""

    span: int
    pairs: list[PairTokens]
    best: dict[str, int] | None = None
    """Method -> subspace that other pairs have chosen."""


def run_causalgym(
    partition: SubspacePartition,
    pairs: Sequence[MinimalPair],
    model_name: str,
    *,
    site: str | None = None,
    data: str | None = None,
    choose: bool = False,
    rows: int = 64,
    device: str = "cpu",
    hub: HubOptions | None = None,
) -> list[SpanEffects]:
    """Log odds ratios of every subspace at every span, by task, beside partitions of the same widths.

    Args:
        site: default the partition's own.
        data: text for principal components; default what the partition was trained on, and where that is not
            known either, PCA is left out.
        choose: of each task only the span where patching the whole activation has the largest effect, with
            each method's best subspace: both are chosen on every other sentence pair, and measured on those
            between. A pair and the same one with its sides swapped are one.
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
    usable = [tokens for pair in pairs if (tokens := pair_tokens(tokenizer, pair))]
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
    groups = _chosen(model, cut, methods, usable, rows) if choose else _spans(usable)
    with tqdm(total=len(groups) * len(methods), desc="causalgym", unit="span", disable=None) as bar:
        return [_span_effects(model, cut, methods, group, rows, bar) for group in groups]


def _spans(usable: Iterable[PairTokens]) -> list[_Group]:
    """Every span of every task, with the pairs that have it."""
    by_span: dict[tuple[str, int], list[PairTokens]] = {}
    for tokens in usable:
        for span, last in enumerate(tokens.last):
            if last is not None:
                by_span.setdefault((tokens.pair.task, span), []).append(tokens)
    return [_Group(span, some) for (_, span), some in sorted(by_span.items(), key=lambda item: item[0])]


def _chosen(
    model: Any,
    cut: LayersAbove,
    methods: dict[str, SubspacePartition],
    usable: Sequence[PairTokens],
    rows: int,
) -> list[_Group]:
    """Of each task the span where the whole activation does most on half of its pairs, with the others.

    Each method's best subspace there is chosen on the first half too.

    Raises:
        InputError: no task has pairs to halve.
    """
    width = methods["ndm"].width
    whole = {"whole": SubspacePartition(torch.eye(width), [width])}
    here, there = halves_of(usable)
    others = {(group.pairs[0].pair.task, group.span): group.pairs for group in _spans(there)}
    best: dict[str, tuple[float, _Group]] = {}
    with tqdm(desc="choose spans", unit="span", disable=None) as bar:
        for group in _spans(here):
            task = group.pairs[0].pair.task
            found = abs(_span_effects(model, cut, whole, group, rows, bar).whole)
            if (task, group.span) in others and (task not in best or found > best[task][0]):
                best[task] = (found, group)
        if not best:
            raise InputError("no task has two sentence pairs to halve: leave --choose-span away")
        chosen = []
        for task, (_, group) in best.items():
            effect = _span_effects(model, cut, methods, group, rows, bar).effect
            chosen.append(
                _Group(group.span, others[task, group.span], {k: _best(e) for k, e in effect.items()})
            )
    return chosen


def _best(effects: Sequence[float]) -> int:
    return max(range(len(effects)), key=lambda s: abs(effects[s]))


def _span_effects(
    model: Any,
    cut: LayersAbove,
    methods: dict[str, SubspacePartition],
    group: _Group,
    rows: int,
    bar: Any,
) -> SpanEffects:
    span, some = group.span, group.pairs
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
        group.best or {kind: _best(effects) for kind, effects in effect.items()},
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
            "best": found.best[kind],
            "log_odds_ratio": effects[found.best[kind]],
            "top_share": top_share(effects),
        }
        for found in results
        for kind, effects in found.effect.items()
    ]


def causalgym_json(results: Sequence[SpanEffects]) -> list[dict[str, Any]]:
    """Plain values."""
    return [asdict(found) for found in results]
