"""The main job, as ``make demo`` runs it: a circuit of SmolLM2-135M, found without labels.

    python examples/demo.py [FOLDER] [SEED]

Six commands of ``ndm-fast`` in one process. The trace says after which block the indirect-object circuit's
previous-token information sits; NDM is trained there on Python's docstrings, and knows no prompt and no name.
Then every subspace is patched on prompts of the circuit, beside partitions of the same widths. A run that was
interrupted goes on where it stopped.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from ndm_fast.cli.main import main

MODEL, TEST = "smollm2", "1"
ROWS = ["--rows", "160000", "--context-length", "256", "--bos", "--max-norm-ratio", "3"]


def demo(folder: str = "runs/demo", seed: str = "0") -> int:
    """Exit code of the first command that fails, or 0."""
    began, out = time.monotonic(), Path(folder)
    traced = out / "trace" / "trace.json"
    if not traced.exists():
        trace = ["evaluate", "trace", "--model", MODEL, "--tests", TEST, "--prompts", "48"]
        if code := main([*trace, "--out", str(traced.parent)]):
            return code
    site = json.loads(traced.read_text())["sites"][TEST]
    run, acts = str(out / "run"), str(out / "activations")
    harvest = ["harvest", "--model", MODEL, "--site", site, "--data", "docstrings", *ROWS, "--out", acts]
    training = ["train", "--preset", "language-model", "--acts", acts, "--repeat-data", "--seed", seed]
    circuits = ["evaluate", "circuits", run, "--model", MODEL, "--tests", TEST, "--prompts", "64"]
    for command in (
        [*harvest, "--resume"],
        [*training, "--out", run, "--resume"],
        [*circuits, "--random-seeds", "2", "--no-complement", "--out", run],
        ["evaluate", "purity", run, "--baseline", "pca"],
        ["report", run],
    ):
        if code := main(command):
            return code
    print(f"the demo took {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(demo(*sys.argv[1:]))
