"""Options that several commands share: devices, settings, output."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_origin

from ndm_fast.config import GROUPS, HarvestConfig, HubOptions, RunConfig, from_flat
from ndm_fast.errors import InputError
from ndm_fast.fields import alternatives, kinds, meanings, words
from ndm_fast.run.presets import PRESETS, preset


def check_device(name: str) -> None:
    """Refuse a device name that torch does not know, or a GPU that is not there."""
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"unknown device {name!r}: take cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"--device {name}, but torch sees no GPU: use --device cpu or install a CUDA build of torch"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise InputError(f"--device {name}, but torch sees {count} GPU(s): they count from cuda:0")


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


def add_hub_flags(parser: argparse.ArgumentParser) -> None:
    """Add ``--revision`` and ``--trust-remote-code``, with the meanings that ``train`` gives them."""
    about = meanings(HarvestConfig)
    parser.add_argument("--revision", default=None, help=about["revision"].removesuffix("."))
    parser.add_argument(
        "--trust-remote-code", action="store_true", help=about["trust_remote_code"].removesuffix(".")
    )


def hub_choice(options: argparse.Namespace) -> HubOptions:
    """What :func:`add_hub_flags` read."""
    return {"revision": options.revision, "trust_remote_code": options.trust_remote_code}


def print_json(content: Any) -> None:
    """What ``--json`` prints."""
    print(json.dumps(content, indent=2))


def save_json(content: Any, folder: str, name: str) -> Path:
    """Write ``folder/name.json``, and the folder where there is none.

    Raises:
        InputError: it cannot be written.
    """
    from ndm_fast.files import unwritable, write_json

    path = Path(folder) / f"{name}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(path.parent, error) from None
    write_json(path, content, seal=isinstance(content, dict))
    return path


def add_settings(command: argparse.ArgumentParser) -> None:
    """Add ``--preset``, ``--config`` and every setting of a run to a command."""
    command.add_argument("--preset", choices=sorted(PRESETS), default=None, help="settings to start from")
    command.add_argument("--config", default=None, help="YAML or JSON file with settings")
    for name, cls in GROUPS.items():
        group = command.add_argument_group(f"{name} settings")
        add_group(group, cls)


def add_group(group: Any, cls: type) -> None:
    """Add the flags of a group of settings to a command or a group of its flags."""
    for field in dataclasses.fields(cls):
        kind, meaning = kinds(cls)[field.name], meanings(cls)[field.name].removesuffix(".")
        choices = "" if float in alternatives(kind) else ", ".join(words(kind))
        meaning += f": {choices}" if choices else ""
        about = f"{meaning} (default: {_shown(field.default)})".replace("%", "%%")
        _add_flag(group, field.name, kind, about)


def _add_flag(group: Any, name: str, kind: Any, about: str) -> None:
    flag = "--" + name.replace("_", "-")
    common: dict[str, Any] = {"dest": f"set_{name}", "default": argparse.SUPPRESS, "help": about}
    one = next(one for one in alternatives(kind))
    if one is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
    elif get_origin(one) is tuple:
        item = get_args(one)[0]
        group.add_argument(flag, nargs="+", type=item, metavar=item.__name__.upper(), **common)
    elif words(kind):  # a number in words is one too
        group.add_argument(flag, type=str, metavar="STR" if one is not float else "FLOAT|STR", **common)
    else:
        group.add_argument(flag, type=one, metavar=one.__name__.upper(), **common)


def _shown(default: Any) -> str:
    if default in (None, "", ()):
        return "none"
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)


def run_settings(options: argparse.Namespace) -> RunConfig:
    """Settings in their order: defaults, preset, file, flags; a run that is resumed comes first of all.

    Raises:
        InputError: a value is not allowed, or ``--config`` cannot be read.
    """
    from ndm_fast.run.folder import RunFolder

    begun: dict[str, Any] = {}
    if getattr(options, "resume", False) and (folder := RunFolder(options.out)).config_file.exists():
        begun = folder.config().flat()
    chosen = preset(options.preset) if options.preset else {}
    written = _read_settings(Path(options.config)) if options.config else {}
    given = {**begun, **written, **flags(options)}
    if given.get("acts") or given.get("rows"):  # which model and text, the activations know
        chosen = {
            n: v for n, v in chosen.items() if n not in {f.name for f in dataclasses.fields(HarvestConfig)}
        }
    return from_flat({**begun, **chosen, **written, **flags(options)})


def flags(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given as flags, by name."""
    return {name.removeprefix("set_"): v for name, v in vars(options).items() if name.startswith("set_")}


def _read_settings(path: Path) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML too
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot read --config {path} ({str(error).splitlines()[0]}): give a YAML or JSON file"
        ) from None
    if not isinstance(values, dict):
        raise InputError(f"--config {path} holds no settings: write one `name: value` per line")
    return values
