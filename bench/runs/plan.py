"""``ndm-fast plan`` against measured runs on this CPU: four small configurations, within 25 %.

    python bench/runs/plan.py [--out FILE]

The demo's model and text at two sites and three settings, and two random blocks of GPT-2's width; each is
predicted just before it runs.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

from transformers import GPT2Config, GPT2Model

sys.path.append(str(Path(__file__).resolve().parents[1]))  # not the root: its `kernels` hides another

from measuring import result_file, seconds, verdict, write_results
from timed import TimedStream, TimedTrainer

from ndm_fast.activations.docstrings import all_docstrings
from ndm_fast.activations.documents import open_documents
from ndm_fast.activations.models import load_model
from ndm_fast.activations.stream import ActivationStream
from ndm_fast.config import RunConfig, from_flat
from ndm_fast.run.hardware import machine_of
from ndm_fast.run.plan import make_plan, model_shape
from ndm_fast.run.presets import preset
from ndm_fast.table import text_table

WITHIN = 0.25
BASE: dict[str, Any] = {**preset("minilm"), "heldout_keys": 16384, "pool_rows": 65536, "eval_every": 100}
RUNS: dict[str, dict[str, Any]] = {
    "demo, 200 steps, one merge check": {"max_steps": 200, "merge_start": 150},
    "lazy, 4,096 keys, layer 1": {
        "site": ["blocks.1.hook_resid_post"],
        "rotation": "lazy",
        "keys": 4096,
        "search_every": 8,
        "queries": 256,
        "max_steps": 200,
        "merge_start": None,
    },
    "fp32, 16,384 keys, a search a step": {
        "keys": 16384,
        "search_every": 1,
        "precision": "fp32",
        "max_steps": 100,
        "merge_start": None,
    },
}
WIDE: dict[str, Any] = {
    "site": ["blocks.1.hook_resid_post"],
    "unit_size": 32,
    "context_length": 128,
    "rotation": "lazy",
    "keys": 16384,
    "search_every": 32,
    "max_steps": 256,
    "merge_start": None,
}


def wide_model(folder: Path) -> str:
    """GPT-2's width with two random blocks, and the demo's tokenizer."""
    _, tokenizer = load_model("minilm")
    shape = {"n_embd": 768, "n_layer": 2, "n_head": 12, "vocab_size": len(tokenizer), "n_positions": 128}
    tokenizer.save_pretrained(folder)
    GPT2Model(GPT2Config(**shape)).save_pretrained(folder)
    return str(folder)


def compare(name: str, config: RunConfig) -> dict[str, Any]:
    """Predicted and measured seconds of a run, by part; memory of the process so far beside it."""
    shape = model_shape(config.harvest.model, config.harvest.site[0])
    plan = make_plan(config, shape, machine_of("cpu"))
    model, tokenizer = load_model(config.harvest.model)
    documents = open_documents(config.harvest.data, seed=config.train.seed)
    stream = TimedStream(
        ActivationStream(model, tokenizer, config.harvest.site[0], documents, config.harvest)
    )
    trainers: list[TimedTrainer] = []

    all_docstrings.cache_clear()  # every run reads its text, as a command does

    def run() -> None:
        trainers.append(TimedTrainer(stream, config.train, config.merge, config.run))
        trainers[0].run()

    total = seconds(run)
    measured = {"harvest": stream.seconds, **trainers[0].split()}
    predicted = {part.name: part.seconds for part in plan.parts}
    predicted["update"] += predicted.pop("gradient")
    return {
        "run": name,
        "predicted_s": plan.seconds,
        "measured_s": total,
        "off": plan.seconds / total - 1,
        "predicted": predicted,
        "measured": measured,
        "predicted_gb": plan.peak / 1e9,
        "process_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=result_file("plan"))
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        wide = {"model": wide_model(Path(folder)), **WIDE}
        for name, changes in {**RUNS, "d 768, lazy, 32 steps a search": wide}.items():
            rows.append(compare(name, from_flat({**BASE, **changes})))
            print(rows[-1], flush=True)
    print(text_table([{k: v for k, v in row.items() if not isinstance(v, dict)} for row in rows]))
    for row in rows:
        print(f"{row['run']}: {100 * row['off']:+.0f} % ({verdict(abs(row['off']), WITHIN, at_most=True)})")
    write_results(options.out, rows)


if __name__ == "__main__":
    main()
