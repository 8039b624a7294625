"""Sequences of the planted language, and others that differ in the value of one variable alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ndm_fast.evaluate.patching.patching import Metric
from ndm_fast.evaluate.patching.prompts import Prompts
from ndm_fast.evaluate.truth.planted_model import PlantedLanguage
from ndm_fast.seeds import Draw, seeded


class PlantedPairs(NamedTuple):
    """N prompts with counterfactuals in which one variable has another value."""

    prompts: Prompts
    counterfactuals: Prompts
    position: Tensor
    """[N, 1] where the prediction is read: after the cues, at a token that tells of another variable."""
    metric: Metric
    """logit(true value) - logit(counterfactual value)."""


def planted_pairs(language: PlantedLanguage, variable: int, count: int, seed: int) -> PlantedPairs:
    """Prompts for one variable.

    The token at the position that is read is the same in prompt and counterfactual.
    """
    generator = seeded(seed, Draw.PLANTED_PROMPTS, variable)
    values, places = language.draw(count, generator)
    others = values.clone()
    shift = torch.randint(1, language.values, (count,), generator=generator)
    others[:, variable] = (values[:, variable] + shift) % language.values
    position = torch.randint(1 + language.variables, language.length, (count,), generator=generator)
    elsewhere = torch.randint(1, language.variables, (count,), generator=generator)
    # `places` starts after BOS; the position's own token is one of the other variables.
    places[torch.arange(count), position - 1] = (variable + elsewhere) % language.variables
    first = 1 + variable * language.values
    right, wrong = first + values[:, variable], first + others[:, variable]

    def difference(logits: Tensor, rows: Tensor) -> Tensor:
        at = logits[:, 0]
        return (at.gather(1, right[rows, None]) - at.gather(1, wrong[rows, None]))[:, 0]

    here, there = language.tokens(values, places), language.tokens(others, places)
    mask = torch.ones_like(here)
    return PlantedPairs(Prompts(here, mask), Prompts(there, mask), position[:, None], difference)
