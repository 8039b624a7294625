"""Uniform registers that compiled code reads before anything has written them: an assembler's fault.

ptxas 12.8.93, which triton 3.6 brings, hoisted the address of a product's operand out of a loop and left
out its first term. So wgmma read shared memory at whatever lay in the register: other bits at every run, or
an illegal address. No test of results without a card can see that; a walk through the code does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_NO_TARGET = ("UISETP", "UPLOP3", "UPSETP", "UFSETP", "UTMA", "UBLKCP", "UTC")
"""Of the uniform path, but without a uniform register as result."""
_TARGET = ("S2UR", "R2UR", "CS2UR", "VOTEU", "REDUX", "CREDUX", "LDCU", "UP2UR")
"""Not of the uniform path by their names, but with one."""
_WIDE = {".64": 2, ".WIDE": 2, ".128": 4}


def undefined(assembly: str) -> list[str]:
    """Instructions that read a uniform register which no way there has written, with their addresses.

    Ways that may never be taken count too, so what is listed is certain, and not all there may be.

    Args:
        assembly: of ``cuobjdump -sass``, of one kernel.
    """
    code = [
        (int(at, 16), text.strip()) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;/]+);", assembly)
    ]
    if not code:
        return []
    uses = [_uses(text) for _, text in code]
    written: list[set[int] | None] = [set(), *[None] * (len(code) - 1)]
    after = _after(code)
    waiting = [0]
    while waiting:
        place = waiting.pop()
        known = (written[place] or set()) | uses[place][0]
        for target in after[place]:
            before = written[target]
            if before is None or not known <= before:
                written[target] = known | (before or set())
                waiting.append(target)
    return [
        f"{at:#06x} {text}"
        for (at, text), (_, read), there in zip(code, uses, written, strict=True)
        if there is not None and read - there
    ]


def _after(code: Sequence[tuple[int, str]]) -> list[list[int]]:
    """Where each instruction may lead."""
    places = {at: place for place, (at, _) in enumerate(code)}
    found: list[list[int]] = []
    for place, (_, text) in enumerate(code):
        name, operands = _parts(text)
        onward = [place + 1] if place + 1 < len(code) else []
        if name.startswith("EXIT"):
            found.append(onward if text.startswith("@") else [])
        elif name.startswith(("BRA", "JMP")):
            jump = re.search(r"0x[0-9a-f]+", text)
            target = [places[int(jump[0], 16)]] if jump and int(jump[0], 16) in places else []
            sure = not text.startswith("@") and len(operands) == 1 and ".DIV" not in name
            found.append(target if sure else target + onward)
        else:
            found.append(onward)
    return found


def _parts(text: str) -> tuple[str, list[str]]:
    """Name and operands, without the predicate before them."""
    name, _, rest = re.sub(r"^@!?U?P\w+\s+", "", text).partition(" ")
    return name, [operand.strip() for operand in rest.split(",")] if rest else []


def _uses(text: str) -> tuple[set[int], set[int]]:
    """Numbers of the uniform registers that an instruction writes, and of those that it reads."""
    name, operands = _parts(text)
    base = name.split(".")[0]
    has_target = (base.startswith("U") and not base.startswith(_NO_TARGET)) or base in _TARGET
    if name == "MOV.SPILL":  # a pair is kept whole, also where half of it is in use
        return set(), set()
    written: set[int] = set()
    read: set[int] = set()
    for operand in operands:
        for description, number in re.findall(r"(gdesc\[)?\bUR(\d+)\b", operand):
            first = int(number)
            if has_target and not written and re.fullmatch(r"UR\d+(\.\w+)*", operand):
                width = next((count for mark, count in _WIDE.items() if mark in name), 1)
                written = set(range(first, first + width))
            elif description and base == "HGMMA":  # the left operand's address, then the right one's
                left = operands[1].startswith("R")
                read |= {first + 2, first + 3} if left else set(range(first, first + 4))
            elif description:
                read |= {first, first + 1}
            else:
                read.add(first)
    return written, read
