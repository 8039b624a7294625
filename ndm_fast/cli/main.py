"""The command ``ndm-fast``: train, harvest, evaluate, report, index, explore, hub, plan, toy, doctor."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from ndm_fast.cli.evaluate import add_evaluate
from ndm_fast.cli.report import add_report
from ndm_fast.cli.train import add_harvest, add_plan, add_train
from ndm_fast.errors import InputError, RanksError, StoppedError
from ndm_fast.files import check_writable
from ndm_fast.version import __version__

_EXIT_RANKS, _EXIT_INPUT, _EXIT_STOPPED = 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code.

    0, 1 where the ranks of a distributed run lost each other, 2 for bad input, 130 where it was interrupted.
    """
    try:
        options = _parser().parse_args(arguments)
        _check_places(options)
        _quiet_monitor(options)
        options.run(options)
    except InputError as error:
        return _failed(error, _EXIT_INPUT)
    except RanksError as error:
        return _failed(error, _EXIT_RANKS)
    except StoppedError as stopped:
        return _failed(stopped, _EXIT_STOPPED)
    except KeyboardInterrupt:
        message = "interrupted before the next checkpoint; what was saved before is whole"
        return _failed(message, _EXIT_STOPPED)
    except BrokenPipeError:  # the reader of our output left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, MemoryError, RuntimeError) as error:
        said = _of_the_machine(error)
        if said is None:
            raise
        return _failed(said, _EXIT_INPUT)
    return 0


def _of_the_machine(error: Exception) -> str | None:
    """What to say of an error of disk or memory; None for any other."""
    if isinstance(error, OSError):
        where = f" {error.filename}" if error.filename else ""
        return f"cannot use{where} ({error.strerror or error}): check that it is there, yours and not full"
    no_memory = ("can't allocate memory", "not enough memory", "out of memory")
    if isinstance(error, MemoryError) or any(words in str(error) for words in no_memory):
        return "not enough memory: lower --pool-rows, --keys or --rows-per-batch, or end other programs"
    return None


def _check_places(options: argparse.Namespace) -> None:
    """Refuse folders that the command will write to, but cannot, before its work."""
    if getattr(options, "out", None):
        check_writable(Path(options.out))
    elif options.command in ("report", "index") or getattr(options, "kind", None) == "purity":
        check_writable(Path(options.folder))


def _quiet_monitor(options: argparse.Namespace) -> None:
    """Without bars there is no need of the thread that tqdm starts for them."""
    if getattr(options, "quiet", False):
        from tqdm import tqdm

        tqdm.monitor_interval = 0


def _failed(message: object, code: int) -> int:
    """The exit code, after printing one line; of torchrun's processes only the first to fail prints."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        from ndm_fast.distributed import first_to_fail

        if not first_to_fail():
            return code
    print(f"ndm-fast: {' '.join(str(message).split())}", file=sys.stderr)  # one line, whatever it quotes
    return code


class _Parser(argparse.ArgumentParser):
    """Reports bad arguments as every other bad input: one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}: see `{self.prog} --help`")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="ndm-fast", description="Find the interpretable subspaces of a transformer's activations."
    )
    parser.add_argument("--version", action="version", version=f"ndm-fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_train(commands)
    add_harvest(commands)
    add_evaluate(commands)
    add_report(commands)
    add_plan(commands)
    _add_toy(commands)
    doctor = commands.add_parser("doctor", help="what is installed, which backend runs, and why")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_toy(commands: Any) -> None:
    toy = commands.add_parser("toy", help="train the paper's toy model of superposition and take it apart")
    toy.add_argument("--groups", default="20,20", help="features in each group, for instance 20,20")
    toy.add_argument("--dim", type=int, default=12, help="width of the hidden layer")
    toy.add_argument("--seed", type=int, default=0, help="seed of model, data and escapes")
    toy.add_argument("--out", default=None, help="folder for result.json and the figure; default: runs/toy")
    toy.add_argument("--json", action="store_true", help="print JSON instead of a table")
    toy.set_defaults(run=_toy)


def _toy(options: argparse.Namespace) -> None:
    from ndm_fast.evaluate.truth.toy import run_toy
    from ndm_fast.table import text_table

    try:
        groups = [int(size) for size in options.groups.split(",")]
    except ValueError:
        raise InputError(
            f"--groups {options.groups!r} is no list of sizes: write for instance 20,20"
        ) from None
    result = run_toy(groups, options.dim, seed=options.seed, out=Path(options.out or "runs/toy"))
    if options.json:
        print(json.dumps(result.record(), indent=2))
        return
    print(text_table([row._asdict() for row in result.groups]))
    print(f"subspaces {result.widths}; figure in {result.figure}")


def _doctor(options: argparse.Namespace) -> None:
    from ndm_fast.ops.backends import describe
    from ndm_fast.provenance import provenance

    about = provenance()
    for package, number in about["versions"].items():
        print(f"{package:14} {number}")
    for name in ("commit", "machine", "threads", "gpu"):
        print(f"{name:14} {about[name] if about[name] is not None else 'none'}")
    for line in describe():
        print(line)
