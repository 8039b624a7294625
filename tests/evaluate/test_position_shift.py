"""Reading positions, and moving them by patching the subspace that holds them."""

import pytest
import torch
from transformers import GPT2Config, GPT2Model

from ndm_fast.errors import InputError
from ndm_fast.evaluate.position_shift import PositionReader, position_shift
from ndm_fast.geometry.orthogonal import random_rotation
from ndm_fast.partition import SubspacePartition

WIDTH, LENGTH = 32, 24
ROTATION = random_rotation(WIDTH, torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Tiny tensors."""


@pytest.fixture(scope="module")
def model():
    """Positions lie in the first four directions of ROTATION, tokens in the others; blocks add little."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_positions=LENGTH, n_embd=WIDTH, n_layer=2, n_head=2)
    built = GPT2Model(config).eval().requires_grad_(False)
    built.wpe.weight.copy_(3 * torch.randn(LENGTH, 4) @ ROTATION[:, :4].T)
    built.wte.weight.copy_(torch.randn(50, WIDTH - 4) @ ROTATION[:, 4:].T)
    return built


def test_positions_move_with_the_subspace_that_holds_them(model):
    tokens = torch.randint(50, (60, LENGTH), generator=torch.Generator().manual_seed(1))
    partition = SubspacePartition(torch.cat([ROTATION[:, 4:], ROTATION[:, :4]], 1), [14, 14, 4])
    rows = position_shift(model, "x0.post", "x1.post", partition, tokens, 5, references=50)
    by_name = {row["subspace"]: row for row in rows}
    assert list(by_name) == ["none", "all", 0, 1, 2]
    assert by_name[2]["share_moved"] > 0.9
    assert by_name["all"]["share_moved"] > 0.9
    for still in ("none", 0, 1):
        assert by_name[still]["share_still"] > 0.9
    assert by_name[2]["moved"] == pytest.approx(5, abs=0.5)


def test_positions_are_read_from_means():
    generator = torch.Generator().manual_seed(2)
    track = torch.arange(12.0)[:, None] * torch.tensor([1.0, 0, 0, 0])
    rows = track + 0.05 * torch.randn(40, 12, 4, generator=generator)
    reader = PositionReader(rows[:30])
    assert torch.equal(reader.read(rows[30:]), torch.arange(12).expand(10, 12))


@pytest.mark.parametrize(("shift", "references"), [(0, 1), (12, 1), (3, 4), (3, 0)])
def test_shifts_that_leave_nothing_are_refused(model, shift, references):
    partition = SubspacePartition(ROTATION, [WIDTH])
    tokens = torch.zeros(4, LENGTH, dtype=torch.int64)
    with pytest.raises(InputError, match="give a shift from 1 to 11"):
        position_shift(model, "x0.post", "x1.post", partition, tokens, shift, references=references)
