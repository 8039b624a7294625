"""A language with known variables, and a tiny GPT-2 that learns it: the truth to hold subspaces against.

A sequence is BOS, one cue per variable in random order, and then tokens drawn at random from the cues:

    BOS  b3 a7 c1   a7 c1 a7 b3 ...

To predict what may come, every position after the cues must hold the values of all variables at once
(docs/method.md). Token ``1 + variable * values + value``; 0 is BOS.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel

from ndm_fast.activations.hooks import collect_activations
from ndm_fast.errors import InputError
from ndm_fast.seeds import Draw, seeded

_BATCH, _RATE, _WARMUP = 128, 5e-3, 50


@dataclass(frozen=True)
class PlantedLanguage:
    """Independent variables that a sequence states once and then uses."""

    variables: int = 6
    values: int = 8
    tail: int = 10
    """Tokens after the cues."""

    def __post_init__(self) -> None:
        if min(self.variables, self.values) < 2 or self.tail < 2:
            raise InputError(
                f"{self.variables} variables of {self.values} values with {self.tail} tokens after the cues: "
                "give at least 2 of each"
            )

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        return 1 + self.variables * self.values

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return 1 + self.variables + self.tail

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Values [N, variables] and which variable stands where, [N, length - 1]; both uniform."""
        values = torch.randint(self.values, (count, self.variables), generator=generator)
        order = torch.rand(count, self.variables, generator=generator).argsort(1)
        later = torch.randint(self.variables, (count, self.tail), generator=generator)
        return values, torch.cat([order, later], 1)

    def tokens(self, values: Tensor, places: Tensor) -> Tensor:
        """[N, length] sequences of :meth:`draw`'s values and places."""
        tokens = 1 + places * self.values + values.gather(1, places)
        return nn.functional.pad(tokens, (1, 0))

    @property
    def floor(self) -> float:
        """Lowest possible mean loss after the cues, nats: the entropy of a uniform draw."""
        return float(torch.tensor(float(self.variables)).log())


def train_planted_model(
    language: PlantedLanguage, *, width: int = 64, layers: int = 2, steps: int = 1500, seed: int = 0
) -> tuple[Any, float]:
    """A GPT-2 trained from scratch on the language, and its last loss after the cues, in nats.

    Adam with a linear decay; the loss counts predictions after the cues only.
    """
    torch.manual_seed(seeded(seed, Draw.PLANTED_MODEL).initial_seed())
    config = GPT2Config(
        vocab_size=language.vocabulary,
        n_positions=language.length,
        n_embd=width,
        n_layer=layers,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    model: Any = GPT2LMHeadModel(config).train()
    adam = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.LambdaLR(adam, lambda s: min((s + 1) / _WARMUP, 1 - s / steps))
    generator = seeded(seed, Draw.PLANTED_TEXT)
    recent = 0.0
    for step in tqdm(range(steps), "planted model", disable=None, leave=False):
        tokens = language.tokens(*language.draw(_BATCH, generator))
        logits = model(tokens).logits[:, language.variables : -1]
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1), tokens[:, language.variables + 1 :].flatten()
        )
        adam.zero_grad()
        loss.backward()
        adam.step()
        rate.step()
        recent += (float(loss.detach()) - recent) / min(step + 1, 50)
    return model.eval().requires_grad_(False), recent


class PlantedRows(NamedTuple):
    """Activations of N sequences, at one position each, and what is known of them."""

    activations: Tensor
    """[N, d]"""
    values: Tensor
    """[N, variables] int64."""


@torch.no_grad()
def planted_activations(
    model: Any, language: PlantedLanguage, site: str, rows: int, *, seed: int, batch: int = 2048
) -> PlantedRows:
    """Activations at random positions after the cues, one of each sequence.

    Two positions of one sequence share all variables: each would be the other's nearest neighbor in any
    rotation.
    """
    generator = seeded(seed, Draw.PLANTED_TEXT, 1)
    parts, known = [], []
    for first in range(0, rows, batch):
        values, places = language.draw(min(batch, rows - first), generator)
        tokens = language.tokens(values, places)
        place = torch.randint(1 + language.variables, language.length, (len(tokens),), generator=generator)
        with collect_activations(model, [site]) as captured:
            model(tokens)
        parts.append(captured[site][torch.arange(len(tokens)), place])
        known.append(values)
    return PlantedRows(torch.cat(parts), torch.cat(known))
