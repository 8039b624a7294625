"""The circuit tests by name, and what each patches where in GPT-2 small."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ndm_fast.errors import InputError
from ndm_fast.evaluate.circuits.ioi import indirect_object
from ndm_fast.evaluate.circuits.words import CircuitPrompts
from ndm_fast.evaluate.circuits.years import greater_than


@dataclass(frozen=True)
class CircuitTest:
    """One test of the paper, at its site in GPT-2 small."""

    name: str
    what: str
    site: str
    make: Callable[[Any, int, int, str], CircuitPrompts]

    def build(self, tokenizer: Any, count: int, seed: int, templates: str = "all") -> CircuitPrompts:
        """Prompts; the same arguments give the same ones.

        Args:
            templates: one of ``TEMPLATE_SETS``.

        Raises:
            InputError: no prompt asked for, an unknown set, a tokenizer that splits the words.
        """
        if count < 1:
            raise InputError(f"{count} prompts are too few: give at least 1")
        return self.make(tokenizer, count, seed, templates)


TESTS = {
    name: CircuitTest(name, what, f"blocks.{block}.hook_resid_post", make)
    for name, what, block, make in (
        ("1", "IOI previous token, IO+1 and S1+1", 4, partial(indirect_object, kind="previous")),
        ("2", "IOI induction, S2", 6, partial(indirect_object, kind="second")),
        ("3", "IOI position of S, END", 8, partial(indirect_object, kind="position")),
        ("3b", "IOI name of S, END", 8, partial(indirect_object, kind="name")),
        ("4", "greater-than, END", 9, greater_than),
    )
}
"""Effects are of logit(IO) - logit(S), in test 4 of the probability of what comes later."""


def chosen_tests(names: Sequence[str]) -> list[CircuitTest]:
    """Tests by name.

    Raises:
        InputError: an unknown name.
    """
    unknown = [name for name in names if name not in TESTS]
    if unknown:
        raise InputError(f"unknown circuit test {unknown[0]!r}: take of {', '.join(TESTS)}")
    return [TESTS[name] for name in names]
