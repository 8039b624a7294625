"""The command ``ndm-fast``: train, harvest, evaluate, report, index, explore, plan, toy, doctor."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from ndm_fast.config import DTYPES, HarvestConfig, from_flat
from ndm_fast.devices import check_device
from ndm_fast.errors import InputError, RanksError, StoppedError
from ndm_fast.evaluate.commands import add_evaluate
from ndm_fast.report.commands import add_report
from ndm_fast.settings import add_setting, add_settings, flags, run_settings
from ndm_fast.version import __version__

_EXIT_RANKS, _EXIT_INPUT, _EXIT_STOPPED = 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code.

    0, 1 where the ranks of a distributed run lost each other, 2 for bad input, 130 where it was interrupted.
    """
    try:
        options = _parser().parse_args(arguments)
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
    return 0


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
    _add_train(commands)
    _add_harvest(commands)
    add_evaluate(commands)
    add_report(commands)
    _add_plan(commands)
    _add_toy(commands)
    doctor = commands.add_parser("doctor", help="what is installed, which backend runs, and why")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_train(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="learn a partition of a model's activations",
        description="Learn a partition. Settings: defaults, then --preset, then --config, then flags.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    train.add_argument("--out", required=True, help="folder of the run")
    train.add_argument("--resume", action="store_true", help="go on with the run in --out, if there is one")
    train.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ...")
    train.add_argument("--quiet", action="store_true", help="no progress bars")
    train.add_argument(
        "--keep-activations", action="store_true", help="several sites: leave OUT/activations for later runs"
    )
    add_settings(train)
    train.set_defaults(run=_train)


def _train(options: argparse.Namespace) -> None:
    from ndm_fast.ranks import launched
    from ndm_fast.report.table import text_table
    from ndm_fast.run import train_run

    config = run_settings(options)
    device = launched().device(options.device)
    check_device(device)
    for folder in train_run(
        config,
        options.out,
        resume=options.resume,
        device=device,
        show_progress=not options.quiet,
        keep_activations=options.keep_activations,
    ):
        result = folder.result()
        columns = zip(result["widths"], result["variance_share"], result["heldout_distance"], strict=True)
        rows = [
            {"subspace": s, "width": width, "variance_share": share, "heldout_distance": distance}
            for s, (width, share, distance) in enumerate(columns)
        ]
        print(f"\n{config.harvest.model} {folder.partition().source['site']}, {result['steps']} steps")
        print(text_table(rows))
        print(f"held-out distance {result['heldout_loss']:.4f}; partition saved in {folder.partition_folder}")


def _add_harvest(commands: Any) -> None:
    harvest = commands.add_parser(
        "harvest",
        help="write activations to disk, to train from",
        description="Write the activations of one or more sites to a folder in one pass over the text; "
        "`ndm-fast train --acts DIR` trains from it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    harvest.add_argument("--out", required=True, help="folder of the activations")
    harvest.add_argument("--rows", type=int, default=None, help="activations of each site")
    harvest.add_argument(
        "--store-dtype", choices=DTYPES, default=None, help="dtype on disk; none: that of the model (--dtype)"
    )
    harvest.add_argument("--shard-mib", type=float, default=None, help="size of a file in MiB; none: 64")
    harvest.add_argument("--resume", action="store_true", help="go on, and write damaged files anew")
    harvest.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ...")
    harvest.add_argument("--quiet", action="store_true", help="no progress bar")
    for field in dataclasses.fields(HarvestConfig):
        add_setting(harvest, field)
    harvest.set_defaults(run=_harvest)


def _harvest(options: argparse.Namespace) -> None:
    from ndm_fast.activation_cache import MANIFEST, held_rows, read_manifest
    from ndm_fast.cache_writer import SHARD_MIB
    from ndm_fast.cached_runs import harvest_run

    out = Path(options.out)
    begun = read_manifest(out) if options.resume and (out / MANIFEST).exists() else {}
    rows = options.rows or begun.get("rows")
    if rows is None:
        raise InputError("no number of rows given: pass --rows, for instance 1000000")
    check_device(options.device)
    cache = harvest_run(
        from_flat({**begun.get("settings", {}), **flags(options)}).harvest,
        out,
        rows,
        store_dtype=options.store_dtype or begun.get("dtype"),
        shard_mib=options.shard_mib or begun.get("shard_mib", SHARD_MIB),
        resume=options.resume,
        device=options.device,
        show_progress=not options.quiet,
    )
    held = held_rows(cache.manifest)
    ended = f"; the text ended before {rows:,}" if held < rows else ""
    print(f"{held:,} activations each of {', '.join(cache.sites)} in {out}{ended}")


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser(
        "plan",
        help="what a run would cost: FLOPs, time, memory, disk",
        description="Predict a run from the model's config alone. Settings as for `ndm-fast train`.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    plan.add_argument("--device", default="cpu", help="cpu (measured now), or H200, H100, A100, L40S, 4090")
    plan.add_argument("--json", action="store_true", help="print JSON instead of a table")
    add_settings(plan)
    plan.set_defaults(run=_plan)


def _plan(options: argparse.Namespace) -> None:
    from ndm_fast.hardware import machine_of
    from ndm_fast.plan import describe, make_plan, model_shape

    config = run_settings(options)
    if not config.harvest.site:
        raise InputError("no site given: pass --site, for instance blocks.4.hook_resid_post")
    shape = model_shape(config.harvest.model, config.harvest.site[0])
    machine = machine_of(options.device)
    plan = make_plan(config, shape, machine)
    print(json.dumps(dataclasses.asdict(plan), indent=2) if options.json else describe(plan, machine))


def _add_toy(commands: Any) -> None:
    toy = commands.add_parser("toy", help="train the paper's toy model of superposition and take it apart")
    toy.add_argument("--groups", default="20,20", help="features in each group, for instance 20,20")
    toy.add_argument("--dim", type=int, default=12, help="width of the hidden layer")
    toy.add_argument("--seed", type=int, default=0, help="seed of model, data and escapes")
    toy.add_argument("--out", default=None, help="folder for result.json and the figure; default: runs/toy")
    toy.add_argument("--json", action="store_true", help="print JSON instead of a table")
    toy.set_defaults(run=_toy)


def _toy(options: argparse.Namespace) -> None:
    from ndm_fast.report.table import text_table
    from ndm_fast.toy import run_toy

    try:
        groups = [int(size) for size in options.groups.split(",")]
    except ValueError:
        raise InputError(
            f"--groups {options.groups!r} is no list of sizes: write for instance 20,20"
        ) from None
    result = run_toy(groups, options.dim, seed=options.seed, out=Path(options.out or "runs/toy"))
    if options.json:
        print(json.dumps(result, indent=2))
        return
    print(text_table(result["groups"]))
    print(f"subspaces {result['widths']}; figure in {result['figure']}")


def _doctor(options: argparse.Namespace) -> None:
    from ndm_fast.backends import describe
    from ndm_fast.provenance import provenance

    about = provenance()
    for package, number in about["versions"].items():
        print(f"{package:14} {number}")
    for name in ("commit", "machine", "threads", "gpu"):
        print(f"{name:14} {about[name] if about[name] is not None else 'none'}")
    for line in describe():
        print(line)
