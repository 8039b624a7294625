"""Of how many families of transformers are the named sites known? Every language model, built small.

OMP_NUM_THREADS=1 python bench/claims/families.py
"""

from __future__ import annotations

import json
import logging
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

import torch
from tiny_families import FAMILIES, build, vocabulary

from ndm_fast.activations.families import family_of
from ndm_fast.activations.sites import list_sites
from ndm_fast.activations.structure import structure_of
from ndm_fast.errors import InputError
from ndm_fast.provenance import provenance

OUT = Path("bench/results/families.json")
_SECONDS = 60
"""Of CPU time; a family that takes longer to build and run is counted as not built."""


class _Late(BaseException):
    """No Exception: a model's run takes those for its own, and tries another way to call it."""


def examine(name: str) -> dict[str, Any]:
    """What became of one family: ``not built``, ``does not run``, ``refused``, or its points."""
    try:
        model = build(name)
    except Exception as error:
        return {"status": "not built", "why": _line(error)}
    tokens = torch.arange(3, 19).view(2, 8) % vocabulary(model)
    try:
        with torch.no_grad():
            model(input_ids=tokens)
    except Exception as error:
        return {"status": "does not run", "why": _line(error)}
    try:
        if family_of(model) is None:
            structure_of(model)
    except InputError as error:
        return {"status": "refused", "why": str(error)}
    blocks: dict[str, list[str]] = {}
    for site in list_sites(model):
        _, number, point = site.split(".")
        blocks.setdefault(number, []).append(point.removeprefix("hook_"))
    points = Counter(" ".join(found) for found in blocks.values())
    return {"status": "table" if family_of(model) else "structure", "blocks": dict(points)}


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def _late(*_: object) -> None:
    raise _Late(f"more than {_SECONDS} s of CPU time")


def main() -> None:
    """Examine all families, print the count, write the file."""
    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGVTALRM, _late)
    families: dict[str, Any] = {}
    for name in FAMILIES:
        signal.setitimer(signal.ITIMER_VIRTUAL, _SECONDS)
        try:
            families[name] = examine(name)
        except _Late as late:
            families[name] = {"status": "not built", "why": str(late)}
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        print(name, *families[name].values(), sep="\t", flush=True)
    status = Counter(found["status"] for found in families.values())
    named = [found for found in families.values() if "blocks" in found]
    count = {
        "families": len(families),
        "not built": status["not built"],
        "do not run": status["does not run"],
        "build and run": len(named) + status["refused"],
        "named residual points": len(named),
        "of these in the table": status["table"],
        "with resid_mid in some block": sum("resid_mid" in " ".join(f["blocks"]) for f in named),
        "with attn_out and mlp_out in some block": sum(
            any("attn_out" in b and "mlp_out" in b for b in f["blocks"]) for f in named
        ),
        "refused": status["refused"],
    }
    count["share with named residual points"] = round(len(named) / count["build and run"], 4)
    OUT.write_text(
        json.dumps({"count": count, "families": families, "made_with": provenance()}, indent=1) + "\n"
    )
    for what, number in count.items():
        print(f"{number:>8} {what}")


if __name__ == "__main__":
    main()
