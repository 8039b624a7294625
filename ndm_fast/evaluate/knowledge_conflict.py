"""Knowledge conflict: which subspaces carry what the context says, and which what the model knows?

    ENTITY attribute WRONG. OTHER attribute ITS-OWN. ENTITY attribute ...

The context says WRONG, the parameters say RIGHT. Patched from a run with a made-up entity in both places
("corrupt_param": nothing is known of it), or in the first place only ("corrupt_context": nothing was said of
the entity that is asked for).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ndm_fast.config import HubOptions
from ndm_fast.errors import InputError
from ndm_fast.evaluate.baselines import baseline_partition
from ndm_fast.evaluate.patching.answers import answer_token, prompt_tokens
from ndm_fast.evaluate.patching.language_model import check_lengths, load_language_model
from ndm_fast.evaluate.patching.layers_above import LayersAbove
from ndm_fast.evaluate.patching.patching import patch_effects
from ndm_fast.evaluate.patching.prompts import pad_prompts
from ndm_fast.evaluate.revision import trained_on
from ndm_fast.files import read_json
from ndm_fast.partition import SubspacePartition

_SYLLABLES = tuple(first + second for first in "bdfgklmnrstvz" for second in "aeiou")

_TRIES = 2000

_CANDIDATES = 32
"""Entities that the model is asked about in one forward pass."""

RUNS = ("corrupt_param", "corrupt_context")


class Attributes(NamedTuple):
    """RAVEL's two files of one kind of entity."""

    values: dict[str, dict[str, str]]
    """Entity -> attribute -> value."""
    prompts: dict[str, list[str]]
    """Attribute -> texts with ``%s`` for the entity, which the value follows."""


class Conflict(NamedTuple):
    """One prompt with its two counterfactuals, all of the same number of tokens."""

    prompt: list[int]
    corrupt_param: list[int]
    corrupt_context: list[int]
    wrong: int
    """First token of what the context says."""
    right: int
    """First token of what the model knows."""
    text: str


def read_ravel(entities: str | Path, prompts: str | Path) -> Attributes:
    """Read ``ravel_<kind>_entity_attributes.json`` and ``ravel_<kind>_attribute_to_prompts.json``.

    Raises:
        InputError: a file cannot be read or has another form.
    """
    values = _read(entities, {str: {str: str}}, "{entity: {attribute: value}}")
    return Attributes(values, _read(prompts, {str: [str]}, "{attribute: [texts with %s]}"))


def _read(path: str | Path, shape: Any, form: str) -> Any:
    remedy = f"give a JSON file of RAVEL's form, {form}"
    try:
        return read_json(Path(path), shape, remedy=remedy, seal=False)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path} is missing: {remedy}") from None


def make_conflicts(
    model: nn.Module,
    tokenizer: Any,
    data: Attributes,
    attribute: str,
    *,
    count: int = 500,
    seed: int = 0,
    known_only: bool = True,
) -> list[Conflict]:
    """Prompts about entities whose value the model knows.

    Known: after one true example of another entity, the first token of the value is the likeliest.

    Args:
        known_only: False keeps entities that the model does not know, to try the machinery on a random model.

    Raises:
        InputError: unknown attribute, or no entity is left.
    """
    texts = [text for text in data.prompts.get(attribute, []) if text.count("%s") == 1]
    values = {e: v[attribute].strip() for e, v in data.values.items() if v.get(attribute, "").strip()}
    if not texts or len(set(values.values())) < 3:
        raise InputError(
            f"attribute {attribute!r} needs a text with one %s and three different values: the files have "
            f"texts for {', '.join(data.prompts) or 'none'}"
        )
    draw = random.Random(f"conflict {seed}")
    order = list(values)
    draw.shuffle(order)
    found: list[Conflict] = []
    for first in range(0, len(order), _CANDIDATES):
        asked = [_ask(draw, texts, values, entity) for entity in order[first : first + _CANDIDATES]]
        if known_only:
            asked = _known(model, tokenizer, asked)
        for question in asked:
            wrong = draw.choice(sorted(set(values.values()) - {question.value, values[question.other]}))
            conflict = _conflict(tokenizer, question, wrong, draw)
            if conflict and len(found) < count:
                found.append(conflict)
        if len(found) == count:
            break
    if not found:
        raise InputError(
            f"the model knows {attribute!r} of none of {len(values)} entities, or no made-up name has as "
            "many tokens: take another attribute or model"
        )
    return found


class _Question(NamedTuple):
    """What is asked of an entity, after a true example of another one."""

    text: str
    entity: str
    value: str
    other: str
    example: str

    def written(self) -> str:
        """The example and the question, without a conflict."""
        return f"{self.example} {_filled(self.text, self.entity)}"


def _ask(draw: random.Random, texts: list[str], values: dict[str, str], entity: str) -> _Question:
    text = draw.choice(texts)
    other = draw.choice([e for e in values if values[e] != values[entity]])
    return _Question(text, entity, values[entity], other, f"{_filled(text, other)} {values[other]}.")


def _filled(text: str, entity: str) -> str:
    return text.replace("%s", entity).strip()


@torch.no_grad()
def _known(model: nn.Module, tokenizer: Any, asked: Sequence[_Question]) -> list[_Question]:
    """The questions whose answer's first token is the likeliest."""
    tokens = [prompt_tokens(tokenizer, question.written()) for question in asked]
    check_lengths(model, tokens)
    prompts = pad_prompts(tokens, device=next(model.parameters()).device)
    logits = model(**prompts.model_inputs(), use_cache=False, logits_to_keep=1).logits
    return [
        question
        for question, likeliest in zip(asked, logits[:, -1].argmax(1).tolist(), strict=True)
        if likeliest == answer_token(tokenizer, question.written(), f" {question.value}")
    ]


def _conflict(tokenizer: Any, asked: _Question, wrong: str, draw: random.Random) -> Conflict | None:
    """None where the two answers begin alike, or no made-up entity fits."""

    def written(first: str, second: str) -> str:
        return f"{_filled(asked.text, first)} {wrong}. {asked.example} {_filled(asked.text, second)}"

    text = written(asked.entity, asked.entity)
    said, true = (answer_token(tokenizer, text, f" {value}") for value in (wrong, asked.value))
    if said is None or true is None or said == true:
        return None
    prompt = prompt_tokens(tokenizer, text)
    for _ in range(_TRIES):
        name = "".join(draw.choices(_SYLLABLES, k=draw.randint(1, 5))).capitalize()
        both, first = (prompt_tokens(tokenizer, written(name, second)) for second in (name, asked.entity))
        if len(both) == len(first) == len(prompt):
            return Conflict(prompt, both, first, said, true, text)
    return None


def conflict_rates(
    model: nn.Module, site: str, partition: SubspacePartition, conflicts: list[Conflict], *, rows: int = 32
) -> dict[str, Any]:
    """How often the answer is the context's or the parameters', as each subspace is patched everywhere.

    Returns:
        ``original`` rates; ``patches``, one per subspace and first one for the whole activation
        (``subspace`` None): ``context_rate`` and ``param_rate`` under ``corrupt_param`` and
        ``corrupt_context``; ``separation``, see :func:`separation`.
    """
    device = next(model.parameters()).device
    prompts = pad_prompts([c.prompt for c in conflicts], device=device)
    answers = torch.tensor([[c.wrong, c.right] for c in conflicts], device=device)

    def metric(logits: Tensor, which: Tensor) -> Tensor:
        return (logits[:, 0].argmax(1)[:, None] == answers[which]).double()

    by_run = {}
    for run in RUNS:
        others = pad_prompts([getattr(c, run) for c in conflicts], device=device)
        found = patch_effects(model, site, partition, prompts, others, metric, rows=rows)
        original = found.clean.mean(0)
        rates = original - torch.cat([found.whole[None], found.by_group]).mean(1)
        by_run[run] = rates.tolist()
    patches = [
        {
            "subspace": None if number == 0 else number - 1,
            "width": partition.width if number == 0 else partition.widths[number - 1],
            **{run: _named(by_run[run][number]) for run in RUNS},
        }
        for number in range(len(partition) + 1)
    ]
    result = {"conflicts": len(conflicts), "original": _named(original.tolist()), "patches": patches}
    return {**result, "separation": separation(result)}


def _named(rates: list[float]) -> dict[str, float]:
    return {"context_rate": rates[0], "param_rate": rates[1]}


def separation(result: dict[str, Any]) -> float:
    """How far apart the subspaces of context and parameters lie: 0 the same, 1 disjoint, NaN without effect.

    Half the summed difference of two distributions over subspaces: the fall of the context's rate without
    context, and of the parameters' rate without parameters, each as shares of its sum (rises count as 0).
    """
    shares = []
    for run, rate in (("corrupt_context", "context_rate"), ("corrupt_param", "param_rate")):
        drops = torch.tensor(
            [
                max(0.0, result["original"][rate] - patch[run][rate])
                for patch in result["patches"]
                if patch["subspace"] is not None
            ],
            dtype=torch.float64,
        )
        shares.append(drops / drops.sum())
    return float((shares[0] - shares[1]).abs().sum() / 2)


def run_conflict(
    partition: SubspacePartition,
    data: Attributes,
    attribute: str,
    *,
    model_name: str | None = None,
    site: str | None = None,
    count: int = 500,
    known_only: bool = True,
    seed: int = 0,
    rows: int = 32,
    device: str = "cpu",
    hub: HubOptions | None = None,
) -> dict[str, Any]:
    """:func:`conflict_rates` of a partition at its own site, beside identity and random.

    Args:
        model_name, site: default those that the partition's ``source`` names.
        hub: as for ``run_information``.

    Raises:
        InputError: as :func:`make_conflicts`; a partition that names no site, or of another width.
    """
    name = model_name or partition.source.get("model", "")
    model, tokenizer = load_language_model(name, device, hub=trained_on(name, hub, partition.source))
    site = site or partition.source.get("site")
    if not site:
        raise InputError("the partition does not say which site it is for: give --site")
    LayersAbove(model, site).check_fits(partition)
    conflicts = make_conflicts(
        model, tokenizer, data, attribute, count=count, seed=seed, known_only=known_only
    )
    check_lengths(model, [conflict.prompt for conflict in conflicts])
    nothing = torch.empty(0, partition.width, device=device)  # these baselines look at no activations
    methods = {"ndm": partition.to(device)} | {
        kind: baseline_partition(kind, partition.widths, nothing) for kind in ("identity", "random")
    }
    return {kind: conflict_rates(model, site, p, conflicts, rows=rows) for kind, p in methods.items()}


def conflict_table(result: dict[str, Any]) -> list[dict[str, Any]]:
    """One table row per patch of :func:`conflict_rates`, the unpatched run first."""
    original = dict.fromkeys(RUNS, result["original"])
    patches = [{"subspace": "none", "width": 0, **original}, *result["patches"]]
    return [
        {
            "subspace": "all" if patch["subspace"] is None else patch["subspace"],
            "width": patch["width"],
            **{f"{run}_{rate}": patch[run][rate] for run in RUNS for rate in ("context_rate", "param_rate")},
        }
        for patch in patches
    ]
