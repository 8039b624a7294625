"""A tiny model with its tokenizer, a small text, and the arguments of commands that take them."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

WIDTH = 32
"""Width of the tiny model's activations."""

_EOS = "<|endoftext|>"
_WORDS = "a red old cat dog bird tree house river sees eats likes and but then slowly never in"


def words(count: int, seed: int) -> str:
    """Text of ``count`` random words, the same for the same seed."""
    return " ".join(random.Random(seed).choices(_WORDS.split(), k=count))


def make_model(folder: Path, head: bool = False) -> Path:
    """A folder with a random GPT-2, 2 layers, 32 wide, 64 positions, and a trained BPE tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [words(2000, seed=0)],
        trainers.BpeTrainer(vocab_size=400, special_tokens=[_EOS], initial_alphabet=alphabet),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=_EOS, eos_token=_EOS)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=64,
        n_embd=WIDTH,
        n_layer=2,
        n_head=4,
        initializer_range=0.4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    (GPT2LMHeadModel if head else GPT2Model)(config).save_pretrained(folder)
    return folder


def make_corpus(folder: Path) -> Path:
    """A folder with 60 short text files, about 6,000 tokens."""
    for number in range(60):
        (folder / f"{number:02}.txt").write_text(words(70 + number, seed=number))
    return folder


TINY: dict[str, Any] = {
    "site": "x0.post",
    "context_length": 32,
    "rows_per_batch": 4,
    "unit_size": 8,
    "queries": 16,
    "keys": 256,
    "pool_rows": 640,
    "heldout_queries": 32,
    "heldout_keys": 256,
    "max_steps": 64,
    "search_every": 4,
    "warmup_steps": 4,
    "log_every": 4,
    "eval_every": 16,
    "checkpoint_every": 8,
    "mi_queries": 32,
    "mi_keys": 128,
}
"""Settings of a run that takes well under a second; the pool is filled three times."""

MERGING: dict[str, Any] = {
    "escape_tries": 2,
    "escape_steps": 8,
    "merge_start": 32,
    "merge_interval": 16,
    "merge_threshold": -1.0,
}
"""Settings that add escapes at steps 16 and 24, and merges at 32 and 48."""


def flags(settings: dict[str, Any]) -> list[str]:
    """Settings as flags of ``ndm-fast train``; None leaves one away."""
    given: list[str] = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if value is True or value is False:
            given.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            given += [f"--{flag}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return given


def train_command(
    model: Path, data: Path, out: Path | str, /, *, merging: bool = False, **changes: Any
) -> list[str]:
    """Arguments of a tiny ``ndm-fast train``; see ``TINY``."""
    settings = {"model": model, "data": data, **TINY, **(MERGING if merging else {}), **changes}
    return ["train", "--quiet", "--out", str(out), *flags(settings)]


def harvest_command(model: Path, data: Path, out: Path | str, /, **changes: Any) -> list[str]:
    """Arguments of a tiny ``ndm-fast harvest`` of three sites: 24 batches in 6 shards per site."""
    settings = {
        "model": model,
        "data": data,
        "site": ["blocks.0.hook_resid_mid", "blocks.1.hook_mlp_out", "blocks.1.hook_resid_post"],
        "rows": 3000,
        "context_length": 32,
        "rows_per_batch": 4,
        "shard_mib": 4 * 32 * 4 * WIDTH * 4 / 2**20,
        **changes,
    }
    return ["harvest", "--quiet", "--out", str(out), *flags(settings)]


def tokenizer_of(words: Iterable[str], split_digits: bool = False) -> Any:
    """Byte-level BPE whose merges make every word, with the space before it, one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {_EOS: 0}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[letter] = len(vocabulary)
    merges = []
    for word in words:
        built = word[0]
        for letter in word[1:]:
            if built + letter not in vocabulary:
                vocabulary[built + letter] = len(vocabulary)
                merges.append((built, letter))
            built += letter
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = [pre_tokenizers.Digits(individual_digits=True)] if split_digits else []
    bpe.pre_tokenizer = pre_tokenizers.Sequence([*digits, level])
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=_EOS, eos_token=_EOS)


def gpt2_like(split_digits: bool = False) -> Any:
    """A tokenizer with the words of the circuit tests."""
    from ndm_fast.evaluate.circuits import word_lists

    text = " ".join((*word_lists.IOI_TEMPLATES, word_lists.YEARS_TEMPLATE)).replace("{", "").replace("}", "")
    words = {*word_lists.NAMES, *word_lists.PLACES, *word_lists.THINGS, *word_lists.NOUNS, *text.split()}
    spaced = [f"Ġ{word}" for word in sorted(words)]
    return tokenizer_of(
        [*(f"Ġ{c}" for c in range(11, 19)), *(f"{y:02}" for y in range(100)), *spaced], split_digits
    )
