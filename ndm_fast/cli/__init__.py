"""The command line: arguments and printed tables."""

from ndm_fast.cli.main import main

__all__ = ["main"]
