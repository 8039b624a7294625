"""``ndm-fast evaluate``: its arguments, and what it prints."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ndm_fast.cli.connections import add_connections
from ndm_fast.cli.options import add_hub_flags, add_kind, hub_choice, print_json, save_json
from ndm_fast.cli.patching import add_causalgym, add_circuits, add_conflict, add_shift, add_trace
from ndm_fast.errors import InputError


def add_evaluate(commands: Any) -> None:
    """Add ``evaluate`` and its kinds to the command line."""
    evaluate = commands.add_parser("evaluate", help="measure what the subspaces of a run carry")
    kinds = evaluate.add_subparsers(dest="kind", required=True, metavar="KIND")
    for add in (
        _add_purity,
        _add_planted,
        add_trace,
        add_circuits,
        add_conflict,
        add_causalgym,
        add_connections,
        _add_mi,
        add_shift,
        _add_stability,
        _add_sae,
    ):
        add(kinds)


def _add_purity(kinds: Any) -> None:
    about = "what a query shares with its nearest neighbor in each subspace"
    purity = add_kind(kinds, "purity", about, _purity)
    purity.add_argument("folder", metavar="RUN", help="folder of a finished run")
    purity.add_argument(
        "--baseline", nargs="*", default=[], metavar="KIND", help="identity, random, pca, pca_ascending"
    )
    purity.add_argument("--top", type=int, default=1, help="nearest neighbors that count")
    purity.add_argument(
        "--labels", default=None, metavar="FILE", help="JSON {token: label}; adds the share of the same label"
    )


def _purity(options: argparse.Namespace) -> None:
    from ndm_fast.evaluate.purity.purity import run_purity
    from ndm_fast.table import text_table

    tables = run_purity(
        options.folder, options.baseline, top=options.top, labels=options.labels, device=options.device
    )
    if options.json:
        print_json(tables)
        return
    for name, rows in tables.items():
        nearest = "whose nearest neighbor has" if options.top == 1 else f"and {options.top} neighbors with"
        print(f"\n{name}: share of queries {nearest} the same ...")
        print(text_table([{k: v for k, v in row.items() if k != "intervals"} for row in rows]))


def _add_mi(kinds: Any) -> None:
    about = "mutual information between subspaces, beside identity and random"
    mi = add_kind(kinds, "mi", about, _mi)
    mi.add_argument("partition", metavar="RUN", help="run folder, saved partition, or R-<model>-<site>.pt")
    mi.add_argument("--model", default=None, help="default: the one that the partition names")
    add_hub_flags(mi)
    mi.add_argument("--data", default=None, help="text; default: what the run was trained on")
    mi.add_argument("--context-length", type=int, default=None, help="tokens in a row of text")
    mi.add_argument("--queries", type=int, default=512, help="queries of the estimate")
    mi.add_argument("--keys", type=int, default=16384, help="keys of the estimate")


def _mi(options: argparse.Namespace) -> None:
    from ndm_fast.evaluate.information import run_information
    from ndm_fast.run.load import load_partition
    from ndm_fast.table import text_table

    found = run_information(
        load_partition(options.partition),
        model_name=options.model,
        data=options.data,
        queries=options.queries,
        keys=options.keys,
        context_length=options.context_length,
        device=options.device,
        hub=hub_choice(options),
    )
    if options.json:
        print_json(found)
        return
    print(text_table([{k: v for k, v in row.items() if k != "matrix"} for row in found]))


def _add_stability(kinds: Any) -> None:
    about = "whether several runs, for instance of several seeds, found the same subspaces"
    stability = add_kind(kinds, "stability", about, _stability)
    stability.add_argument("partitions", nargs="+", metavar="RUN", help="run folders or saved partitions")
    stability.add_argument("--out", default="runs/stability", help="folder for stability.json and .png")


def _stability(options: argparse.Namespace) -> None:
    from ndm_fast.evaluate.stability import draw_stability, stability
    from ndm_fast.run.load import load_partition
    from ndm_fast.table import text_table

    found = stability({path: load_partition(path) for path in options.partitions})
    out = save_json(found, options.out, "stability")
    draw_stability(found, out.with_suffix(".png"))
    if options.json:
        print_json(found)
        return
    names = ("first", "second", "score", "chance")
    print(text_table([{name: pair[name] for name in names} for pair in found["pairs"]]))
    print(f"mean score {found['score']:.3f}, chance {found['chance']:.3f}; {out}, {out.with_suffix('.png')}")


def _add_sae(kinds: Any) -> None:
    about = "whether the features of a sparse autoencoder lie inside single subspaces"
    sae = add_kind(kinds, "sae", about, _sae)
    sae.add_argument("partition", metavar="RUN", help="run folder, saved partition, or R-....pt")
    sae.add_argument(
        "--decoder", required=True, metavar="FILE", help="safetensors file, or a folder of SAELens"
    )
    sae.add_argument("--tensor", default=None, help="name of the decoder in it; default: W_dec and the like")


def _sae(options: argparse.Namespace) -> None:
    from ndm_fast.evaluate.autoencoder import compare_autoencoder, decoder_site, read_decoder, same_place
    from ndm_fast.run.load import load_partition
    from ndm_fast.table import text_table

    partition = load_partition(options.partition)
    decoder = read_decoder(options.decoder, partition.width, options.tensor)
    site, ours = decoder_site(options.decoder), partition.source.get("site")
    if site and ours and not same_place(site, ours):
        print(f"ndm-fast: the autoencoder is of {site}, the partition of {ours}", file=sys.stderr)
    found = compare_autoencoder(partition, decoder)
    if options.json:
        print_json(found)
        return
    print(text_table(found))


def _add_planted(kinds: Any) -> None:
    about = "train a tiny GPT-2 with known variables, and see whether NDM finds them"
    planted = add_kind(kinds, "planted", about, _planted)
    planted.add_argument("--variables", type=int, default=6, help="independent variables")
    planted.add_argument("--values", type=int, default=8, help="values of each")
    planted.add_argument("--seed", type=int, default=0, help="seed of model, data and starts")
    planted.add_argument("--merge", action="store_true", help="also merge 4-wide units by the auto threshold")
    planted.add_argument("--starts", type=int, default=4, help="random starts, of which the three best go on")
    planted.add_argument("--out", default="runs/planted", help="folder for planted.json")


def _planted(options: argparse.Namespace) -> None:
    from ndm_fast.evaluate.truth.planted import planted_rows, run_planted
    from ndm_fast.table import text_table

    if options.device != "cpu":
        raise InputError("the planted model is too small for a GPU: leave --device away")
    found = run_planted(
        options.variables, options.values, seed=options.seed, starts=options.starts, merge=options.merge
    )
    path = save_json(found.record(), options.out, "planted")
    if options.json:
        print_json(found.record())
        return
    print(text_table(planted_rows(found)))
    print(f"largest possible Gini {found.largest_gini:.3f}; {found.seconds:.0f} s; {path}")
