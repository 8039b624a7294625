"""Random numbers: results repeat only as long as no purpose changes its number."""

from __future__ import annotations

from collections import Counter

from ndm_fast.seeds import Draw, seeded

NUMBERS = {
    "HELD_OUT": 0,
    "INFORMATION_ROWS": 0,
    "POOL": 1,
    "ESCAPE": 2,
    "FIRST_ROTATION": 3,
    "BASELINE": 4,
    "MERGE_NULL": 5,
    "TOY_MODEL": 10,
    "TOY_DATA": 11,
    "TOY_ACTIVATIONS": 12,
    "TOY_START": 13,
    "TOY_SPLIT": 14,
    "RESTART": 15,
    "PLANTED_MODEL": 20,
    "SURVEY_SAMPLE": 20,
    "PLANTED_TEXT": 21,
    "SURVEY_CLUSTERS": 21,
    "PLANTED_PROMPTS": 30,
    "BOOTSTRAP": 40,
    "AUTOENCODER_CLUSTERS": 41,
    "ROWS": 50,
}


def test_the_numbers_stay_and_no_other_is_shared() -> None:
    found = {name: int(draw) for name, draw in Draw.__members__.items()}
    assert {name: found[name] for name in NUMBERS} == NUMBERS
    counts = Counter(found.values())
    assert {number for number, count in counts.items() if count > 1} == {0, 20, 21}


def test_a_purpose_is_its_number() -> None:
    assert seeded(7, Draw.POOL, 3).initial_seed() == seeded(7, 1, 3).initial_seed()
