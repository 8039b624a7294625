"""Random generators from a seed and a purpose."""

from __future__ import annotations

from enum import IntEnum

import torch


class Draw(IntEnum):
    """What random numbers are for, so that no two purposes share a stream.

    The numbers are part of every result that is repeated from a seed: add new ones, and change none. Three
    numbers were given twice before they had names; none of those pairs meet in one training.
    """

    HELD_OUT = 0
    """Order of the held-out rows: which are queries, which are keys."""
    INFORMATION_ROWS = 0
    """Which rows are queries where information is measured."""
    POOL = 1
    """Order of the rows of a generation of the pool; then its number."""
    ESCAPE = 2
    """Which pair is turned, and how; then the number of the try."""
    FIRST_ROTATION = 3
    BASELINE = 4
    """Rotation of the random baseline."""
    MERGE_NULL = 5
    """Shuffled samples that ``merge_threshold="auto"`` compares with."""
    TOY_MODEL = 10
    TOY_DATA = 11
    TOY_ACTIVATIONS = 12
    TOY_START = 13
    """Rotation of a start of NDM on the toy; then its number."""
    TOY_SPLIT = 14
    RESTART = 15
    """Rotation of one of several starts; then its number."""
    PLANTED_MODEL = 20
    SURVEY_SAMPLE = 20
    """Which rows of an index a report looks at."""
    PLANTED_TEXT = 21
    SURVEY_CLUSTERS = 21
    """Where the clusters of a gallery begin."""
    INDUCTION_MODEL = 22
    INDUCTION_TEXT = 23
    INDUCTION_PROMPTS = 24
    PLANTED_PROMPTS = 30
    BOOTSTRAP = 40
    AUTOENCODER_CLUSTERS = 41
    CONNECTION_NULL = 42
    """Random rotations that composition scores are compared with."""
    ROWS = 50
    """Order of the rows of a file."""


def seeded(seed: int, *purpose: int) -> torch.Generator:
    """A generator on the CPU that depends on the seed and on what it is for, and on nothing else.

    Args:
        purpose: a :class:`Draw`, and numbers that tell several of one kind apart.
    """
    state = seed & 0xFFFFFFFF
    for number in purpose:
        state = (state * 6364136223846793005 + 1442695040888963407 + number) & 0x7FFFFFFFFFFFFFFF
    return torch.Generator().manual_seed(state)
