"""A language in which the only way to do well is induction, and a tiny transformer that learns it.

A sequence is BOS and a walk on a ring of different random tokens: mostly on to the next one, now and then
to any.

    ring k q a d f:   BOS  k q a d q a d f k d f k q ...

Every sequence has a ring of its own, and jumps leave no fixed distance to go by. What follows a token is what
followed it before: one head of the first block writes every token's predecessor beside it, and a head of the
second block looks for a place whose predecessor is the token that it stands on. Token 0 is BOS.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import Qwen2Config, Qwen2ForCausalLM

from ndm_fast.activations.hooks import collect_activations
from ndm_fast.seeds import Draw, seeded

SITE = "blocks.0.hook_resid_post"
"""Between the head that writes the previous token and the head that looks for it."""

_BATCH, _RATE, _WARMUP = 64, 5e-3, 50


@dataclass(frozen=True)
class InductionLanguage:
    """Walks on rings of different tokens."""

    tokens: int = 48
    ring: int = 10
    """Tokens in a ring."""
    jumps: float = 0.2
    """Share of the steps that go anywhere."""
    length: int = 40
    """Tokens of a sequence, BOS among them."""

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Sequences [N, length], and which of their tokens are told by what came before, [N, length] bool.

        A token is told where its step is no jump, and the same step was taken before.
        """
        steps = self.length - 1
        rings = 1 + torch.rand(count, self.tokens, generator=generator).argsort(1)[:, : self.ring]
        jumps = torch.rand(count, steps, generator=generator) < self.jumps
        jumps[:, 0] = True  # from BOS, which is nobody's predecessor
        by = torch.where(jumps, torch.randint(self.ring, (count, steps), generator=generator), 1)
        place = by.cumsum(1) % self.ring
        step = torch.where(jumps, -1, place)
        before = (step[:, :, None] == step[:, None, :]).tril(-1).any(2)
        told = (before & ~jumps)[:, 1:]
        return nn.functional.pad(rings.gather(1, place), (1, 0)), nn.functional.pad(told, (2, 0))


def train_induction_model(
    language: InductionLanguage,
    *,
    width: int = 64,
    heads: int = 4,
    steps: int = 600,
    seed: int = 0,
    mlp: bool = False,
) -> tuple[Any, float]:
    """A two-block Qwen2 trained on the language, and its last loss where the next token is told, in nats.

    Args:
        mlp: with MLPs; without, theirs are 0 and stay so.
    """
    torch.manual_seed(seeded(seed, Draw.INDUCTION_MODEL).initial_seed())
    config = Qwen2Config(
        vocab_size=1 + language.tokens,
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=2 * width,
        max_position_embeddings=language.length,
        initializer_range=0.1,
        tie_word_embeddings=False,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=2,
        use_sliding_window=True,
        max_window_layers=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    model: Any = Qwen2ForCausalLM(config).train()
    if not mlp:
        for weight in (weight for block in model.model.layers for weight in block.mlp.parameters()):
            weight.data.zero_()
            weight.requires_grad_(False)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    adam = torch.optim.AdamW(trained, lr=_RATE, weight_decay=0.01, betas=(0.9, 0.98))
    rate = torch.optim.lr_scheduler.LambdaLR(adam, lambda s: min((s + 1) / _WARMUP, 1 - s / steps))
    generator = seeded(seed, Draw.INDUCTION_TEXT)
    recent = 0.0
    for step in tqdm(range(steps), "induction model", disable=None, leave=False):
        tokens, told = language.draw(_BATCH, generator)
        logits = model(tokens).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits[told[:, 1:]], tokens[:, 1:][told[:, 1:]])
        adam.zero_grad()
        loss.backward()
        adam.step()
        rate.step()
        recent += (float(loss.detach()) - recent) / min(step + 1, 50)
    return model.eval().requires_grad_(False), recent


class Roles(NamedTuple):
    """[H] mean attention of the heads of a block to the places that a role names."""

    previous: list[float]
    """To the token before."""
    induction: list[float]
    """To what followed the same token before, where there is such a place."""


@torch.no_grad()
def head_roles(model: Any, language: InductionLanguage, *, count: int = 64, seed: int = 0) -> list[Roles]:
    """What the heads of each block look at."""
    tokens, _ = language.draw(count, seeded(seed, Draw.INDUCTION_TEXT, 1))
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")  # others do not tell their weights
    try:
        attention = model(tokens, output_attentions=True).attentions
    finally:
        model.set_attn_implementation(before)
    same = (tokens[:, :, None] == tokens[:, None, :]).float().tril(-1)
    follows = nn.functional.pad(same[:, :, :-1], (1, 0)).tril()
    has = follows.sum(2) > 0
    found = []
    for weights in attention:  # [N, H, T, T]
        previous = weights.diagonal(-1, 2, 3)[:, :, 1:].mean((0, 2))
        induction = (weights * follows[:, None]).sum(3).transpose(1, 2)[has].mean(0)
        found.append(Roles(previous.tolist(), induction.tolist()))
    return found


class Labelled(NamedTuple):
    """Activations at random places of sequences, one of each, with what is known of the place."""

    activations: Tensor
    """[N, d]"""
    labels: dict[str, Tensor]
    """``previous``, ``current``, ``position`` -> [N] int64."""


@torch.no_grad()
def labelled_activations(
    model: Any, language: InductionLanguage, rows: int, *, seed: int, site: str = SITE, batch: int = 2048
) -> Labelled:
    """Activations at a site of ``rows`` sequences, at places that have a predecessor."""
    generator = seeded(seed, Draw.INDUCTION_TEXT, 2)
    parts, labels = [], []
    for first in range(0, rows, batch):
        tokens, _ = language.draw(min(batch, rows - first), generator)
        place = torch.randint(2, language.length, (len(tokens),), generator=generator)
        with collect_activations(model, [site]) as captured:
            model(tokens)
        every = torch.arange(len(tokens))
        parts.append(captured[site][every, place])
        labels.append(torch.stack([tokens[every, place - 1], tokens[every, place], place]))
    names = ("previous", "current", "position")
    return Labelled(torch.cat(parts), dict(zip(names, torch.cat(labels, 1), strict=True)))
