"""``ndm-fast train``, ``harvest`` and ``plan``."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from ndm_fast.cli.options import add_group, add_settings, check_device, flags, run_settings
from ndm_fast.config import DTYPES, HarvestConfig, from_flat
from ndm_fast.errors import InputError


def add_train(commands: Any) -> None:
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
    train.add_argument(
        "--report-to", nargs="+", default=None, metavar="TOOL", help="curves in tensorboard, trackio, wandb"
    )
    add_settings(train)
    train.set_defaults(run=_train)


def _train(options: argparse.Namespace) -> None:
    from ndm_fast.ranks import launched
    from ndm_fast.run.train import train_run
    from ndm_fast.table import text_table

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
        report_to=options.report_to or (),
    ):
        result = folder.result()
        columns = zip(result["widths"], result["variance_share"], result["heldout_distance"], strict=True)
        rows = [
            {"subspace": s, "width": width, "variance_share": share, "heldout_distance": distance}
            for s, (width, share, distance) in enumerate(columns)
        ]
        source = folder.partition().source
        trained_on = source["rows"] if "rows" in source else f"{source['model']} {source['site']}"
        print(f"\n{trained_on}, {result['steps']} steps")
        print(text_table(rows))
        print(f"held-out distance {result['heldout_loss']:.4f}; partition saved in {folder.partition_folder}")


def add_harvest(commands: Any) -> None:
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
    add_group(harvest, HarvestConfig)
    harvest.set_defaults(run=_harvest)


def _harvest(options: argparse.Namespace) -> None:
    from ndm_fast.activations.cache import MANIFEST, held_rows, read_manifest
    from ndm_fast.activations.cache_writer import SHARD_MIB
    from ndm_fast.run.source import harvest_run

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


def add_plan(commands: Any) -> None:
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
    from ndm_fast.run.hardware import machine_of
    from ndm_fast.run.plan import compared, describe, make_plan, model_shape
    from ndm_fast.run.presets import TWINS

    config = run_settings(options)
    if config.run.rows:
        raise InputError("plan predicts runs on a model's activations: leave --rows away, and name --model")
    if not config.harvest.site:
        raise InputError("no site given: pass --site, for instance blocks.4.hook_resid_post")
    shape = model_shape(config.harvest.model, config.harvest.site[0], **config.harvest.hub_options)
    machine = machine_of(options.device)
    plan = make_plan(config, shape, machine)
    plans = {options.preset: plan}
    twin = TWINS.get(options.preset)
    if twin:
        options.preset = twin
        plans[twin] = make_plan(run_settings(options), shape, machine)
    if options.json:
        both = {"presets": compared(plans)} if twin else {}
        print(json.dumps({**dataclasses.asdict(plan), **both}, indent=2))
        return
    print(describe(plan, machine))
    if twin:
        times = plans[twin].seconds / plan.seconds
        for name, cost in compared(plans).items():
            print(f"with --preset {name}: {cost['seconds']:.1f} s, {cost['memory'] / 1e9:.2f} GB")
        print(f"so --preset {twin} takes {times:.1f} times as long")
