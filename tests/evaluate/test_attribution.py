"""Integrated gradients: complete, and right where the answer is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, LlamaConfig, LlamaModel

from ndm_fast import InputError, SubspacePartition
from ndm_fast.evaluate.attribution import attribute_tokens
from ndm_fast.geometry.orthogonal import random_rotation

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH = 16
SIZES = {"vocab_size": 40, "initializer_range": 0.3}
FAMILIES: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: GPT2Model(GPT2Config(**SIZES, n_positions=16, n_embd=WIDTH, n_layer=2, n_head=2)),
    "bert": lambda: BertModel(
        BertConfig(
            **SIZES,
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
        )
    ),
    "llama": lambda: LlamaModel(
        LlamaConfig(
            **SIZES,
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=32,
        )
    ),
}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return FAMILIES[request.param]().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def partition() -> SubspacePartition:
    return SubspacePartition(random_rotation(WIDTH, torch.Generator().manual_seed(1)), [8, 4, 4])


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, 40, (7,), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("frozen", [False, True])
def test_attributions_sum_to_what_the_tokens_change(
    model: Any, partition: SubspacePartition, tokens: Tensor, frozen: bool
) -> None:
    before = model.config._attn_implementation
    found = attribute_tokens(
        model, "x1.post", tokens, 4, partition, steps=256, batch=64, freeze_attention=frozen
    )
    torch.testing.assert_close(found.tokens.sum(1), 1 - found.baseline, rtol=0.02, atol=0.02)
    assert model.config._attn_implementation == before
    if model.config.model_type != "bert":  # later tokens are not seen
        assert (found.tokens[:, 5:] == 0).all()
    assert (found.tokens[:, :5] != 0).all()


def test_freezing_changes_the_path_and_not_the_text(
    model: Any, partition: SubspacePartition, tokens: Tensor
) -> None:
    free, frozen = (
        attribute_tokens(model, "x1.post", tokens, 4, partition, steps=8, freeze_attention=choice)
        for choice in (False, True)
    )
    assert not torch.allclose(free.tokens, frozen.tokens, rtol=1e-2)


def test_embedding_output_is_explained_by_its_own_token(partition: SubspacePartition, tokens: Tensor) -> None:
    torch.manual_seed(0)
    model = FAMILIES["gpt2"]().eval().requires_grad_(False)
    found = attribute_tokens(model, "x0.pre", tokens, 3, partition, subspaces=[2, 0], steps=4, batch=3)
    assert found.tokens.shape == (2, 7)
    torch.testing.assert_close(found.tokens[:, 3], 1 - found.baseline)
    assert (found.tokens[:, [0, 1, 2, 4, 5, 6]] == 0).all()


def test_batches_do_not_change_the_result(model: Any, partition: SubspacePartition, tokens: Tensor) -> None:
    origin = torch.randn(WIDTH, generator=torch.Generator().manual_seed(3))
    one, two = (
        attribute_tokens(model, "x0.post", tokens, 6, partition, origin=origin, steps=9, batch=batch)
        for batch in (9, 2)
    )
    torch.testing.assert_close(one.tokens, two.tokens, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"position": 7}, "position 7"), ({"subspaces": [3]}, "0 to 2"), ({"steps": 0}, "at least 1")],
)
def test_bad_arguments_are_named(
    partition: SubspacePartition, tokens: Tensor, change: dict[str, Any], message: str
) -> None:
    arguments: dict[str, Any] = {"position": 3, **change}
    model = FAMILIES["gpt2"]()
    with pytest.raises(InputError, match=message):
        attribute_tokens(model, "x0.post", tokens, partition=partition, **arguments)
