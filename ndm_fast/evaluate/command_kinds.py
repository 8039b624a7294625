"""What every kind of ``ndm-fast evaluate`` has: its parser, and ways to give its result as JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ndm_fast.devices import check_device


def add_kind(kinds: Any, name: str, about: str, run: Callable[[argparse.Namespace], None]) -> Any:
    """Add a kind with the options that all share.

    Args:
        kinds: the subparsers of ``evaluate``.
        about: one line of help.
        run: gets the parsed options, of which ``device`` was checked.

    Returns:
        The parser, for the kind's own options.
    """
    parser = kinds.add_parser(name, help=about, description=about)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ...")

    def checked(options: argparse.Namespace) -> None:
        check_device(options.device)
        run(options)

    parser.set_defaults(run=checked)
    return parser


def print_json(content: Any) -> None:
    """What ``--json`` prints."""
    print(json.dumps(content, indent=2))


def save_json(content: Any, folder: str, name: str) -> Path:
    """Write ``folder/name.json``, and the folder where there is none.

    Raises:
        InputError: it cannot be written.
    """
    from ndm_fast.checkpoint import unwritable, write_json

    path = Path(folder) / f"{name}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(path.parent, error) from None
    write_json(path, content)
    return path
