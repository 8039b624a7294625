"""The command ``ndm-fast``, also as ``python -m ndm_fast``."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def command() -> int:
    """Run the command; Ctrl-C ends it with one line, also while its libraries are still being loaded."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell has us ignore it
        signal.signal(signal.SIGINT, _interrupted)
    from ndm_fast.cli.main import main

    return main()


def _interrupted(number: int, frame: FrameType | None) -> None:
    """End at once: an exception would be taken for one of its own by a library that is being loaded."""
    if os.environ.get("RANK", "0") == "0":  # of torchrun's processes one is enough
        os.write(2, b"ndm-fast: interrupted; what was saved before is whole\n")
    os._exit(130)


if __name__ == "__main__":
    sys.exit(command())
