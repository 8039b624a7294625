"""A sentence encoder, as ``make demo-minilm`` runs it: train on Python's docstrings, measure, report.

    python examples/demo_minilm.py [FOLDER] [SEED]

Three commands of ``ndm-fast`` in one process, so that packages are imported and the text is read once. A run
that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import sys
import time

from ndm_fast.cli.main import main


def demo(folder: str = "runs/demo-minilm", seed: str = "0") -> int:
    """Exit code of the first command that fails, or 0."""
    began = time.monotonic()
    for command in (
        ["train", "--preset", "minilm", "--seed", seed, "--out", folder, "--resume"],
        ["evaluate", "purity", folder, "--baseline", "identity"],
        ["report", folder],
    ):
        if code := main(command):
            return code
    print(f"the demo took {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(demo(*sys.argv[1:]))
