"""Random generators from a seed and a purpose."""

from __future__ import annotations

import torch


def seeded(seed: int, *purpose: int) -> torch.Generator:
    """A generator on the CPU that depends on the seed and on what it is for, and on nothing else."""
    state = seed & 0xFFFFFFFF
    for number in purpose:
        state = (state * 6364136223846793005 + 1442695040888963407 + number) & 0x7FFFFFFFFFFFFFFF
    return torch.Generator().manual_seed(state)
