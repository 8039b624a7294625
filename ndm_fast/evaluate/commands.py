"""``ndm-fast evaluate``: its arguments, and what it prints."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ndm_fast.devices import check_device
from ndm_fast.errors import InputError


def add_evaluate(commands: Any) -> None:
    """Add ``evaluate`` and its kinds to the command line."""
    evaluate = commands.add_parser("evaluate", help="measure what the subspaces of a run carry")
    kinds = evaluate.add_subparsers(dest="kind", required=True, metavar="KIND")
    for add in (
        _add_purity,
        _add_planted,
        _add_circuits,
        _add_conflict,
        _add_mi,
        _add_shift,
        _add_stability,
        _add_sae,
        _add_sensitivity,
    ):
        add(kinds)


def _kind(kinds: Any, name: str, about: str, run: Callable[[argparse.Namespace], None]) -> Any:
    parser = kinds.add_parser(name, help=about, description=about)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ...")

    def checked(options: argparse.Namespace) -> None:
        check_device(options.device)
        run(options)

    parser.set_defaults(run=checked)
    return parser


def _print_json(content: Any) -> None:
    print(json.dumps(content, indent=2))


def _add_purity(kinds: Any) -> None:
    about = "what a query shares with its nearest neighbour in each subspace"
    purity = _kind(kinds, "purity", about, _purity)
    purity.add_argument("folder", metavar="RUN", help="folder of a finished run")
    purity.add_argument(
        "--baseline", nargs="*", default=[], metavar="KIND", help="identity, random, pca, pca_ascending"
    )
    purity.add_argument("--top", type=int, default=1, help="nearest neighbours that count")
    purity.add_argument(
        "--labels", default=None, metavar="FILE", help="JSON {token: label}; adds the share of the same label"
    )


def _purity(options: argparse.Namespace) -> None:
    from ndm_fast.evaluate.purity import run_purity
    from ndm_fast.report.table import text_table

    tables = run_purity(
        options.folder, options.baseline, top=options.top, labels=options.labels, device=options.device
    )
    if options.json:
        _print_json(tables)
        return
    for name, rows in tables.items():
        nearest = "whose nearest neighbour has" if options.top == 1 else f"and {options.top} neighbours with"
        print(f"\n{name}: share of queries {nearest} the same ...")
        print(text_table([{k: v for k, v in row.items() if k != "intervals"} for row in rows]))


def _add_circuits(kinds: Any) -> None:
    about = "effects of patching each subspace on IOI and greater-than prompts"
    circuits = _kind(kinds, "circuits", about, _circuits)
    circuits.add_argument(
        "partitions", nargs="+", metavar="RUN", help="run folder, saved partition, or R-<model>-<site>.pt"
    )
    circuits.add_argument("--model", default="gpt2", help="Hugging Face name or folder, with its head")
    circuits.add_argument(
        "--tests", nargs="+", default=None, metavar="TEST", help="1 2 3 3b 4; default: those for the site"
    )
    circuits.add_argument("--prompts", type=int, default=1000, help="prompts of each test")
    circuits.add_argument("--seed", type=int, default=0, help="seed of the prompts")
    circuits.add_argument(
        "--data", default=None, help="text for variances and PCA; default: what the run was trained on"
    )
    circuits.add_argument("--context-length", type=int, default=None, help="tokens in a row of that text")
    circuits.add_argument("--rows", type=int, default=64, help="prompts in one forward pass")
    circuits.add_argument("--out", default="runs/circuits", help="folder for circuits.json and circuits.png")


def _circuits(options: argparse.Namespace) -> None:
    from ndm_fast.evaluate.circuits import circuit_rows, mean_ginis, run_circuits
    from ndm_fast.evaluate.effect_figure import draw_effects
    from ndm_fast.evaluate.published import load_partition
    from ndm_fast.report.table import text_table

    results = run_circuits(
        {path: load_partition(path) for path in options.partitions},
        options.model,
        tests=options.tests,
        prompts=options.prompts,
        seed=options.seed,
        data=options.data,
        rows=options.rows,
        device=options.device,
        context_length=options.context_length,
    )
    out = _save(results, options.out, "circuits")
    draw_effects(results, out.with_suffix(".png"))
    if options.json:
        _print_json(results)
        return
    print(text_table(circuit_rows(results)))
    means = ", ".join(f"{kind} {value:.3f}" for kind, value in mean_ginis(results).items())
    print(f"mean Gini over tests and normalisations: {means}\n{out}, {out.with_suffix('.png')}")


def _save(content: Any, folder: str, name: str) -> Path:
    from ndm_fast.checkpoint import unwritable, write_json

    path = Path(folder) / f"{name}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(path.parent, error) from None
    write_json(path, content)
    return path


def _add_mi(kinds: Any) -> None:
    about = "mutual information between subspaces, beside identity and random"
    mi = _kind(kinds, "mi", about, _mi)
    mi.add_argument("partition", metavar="RUN", help="run folder, saved partition, or R-<model>-<site>.pt")
    mi.add_argument("--model", default=None, help="default: the one that the partition names")
    mi.add_argument("--data", default=None, help="text; default: what the run was trained on")
    mi.add_argument("--context-length", type=int, default=None, help="tokens in a row of text")
    mi.add_argument("--queries", type=int, default=512, help="queries of the estimate")
    mi.add_argument("--keys", type=int, default=16384, help="keys of the estimate")


def _mi(options: argparse.Namespace) -> None:
    from ndm_fast.evaluate.information import run_information
    from ndm_fast.evaluate.published import load_partition
    from ndm_fast.report.table import text_table

    found = run_information(
        load_partition(options.partition),
        model_name=options.model,
        data=options.data,
        queries=options.queries,
        keys=options.keys,
        context_length=options.context_length,
        device=options.device,
    )
    if options.json:
        _print_json(found)
        return
    print(text_table([{k: v for k, v in row.items() if k != "matrix"} for row in found]))


def _add_conflict(kinds: Any) -> None:
    about = "which subspaces carry what the context says, and which what the model knows"
    conflict = _kind(kinds, "conflict", about, _conflict)
    conflict.add_argument("partition", metavar="RUN", help="run folder, saved partition, or R-....pt")
    conflict.add_argument("--model", default=None, help="default: the one that the partition names")
    conflict.add_argument("--entities", required=True, help="RAVEL's ravel_<kind>_entity_attributes.json")
    conflict.add_argument("--texts", required=True, help="RAVEL's ravel_<kind>_attribute_to_prompts.json")
    conflict.add_argument("--attribute", required=True, help="for instance Country")
    conflict.add_argument("--prompts", type=int, default=500, help="most prompts to make")
    conflict.add_argument("--unknown", action="store_true", help="keep entities that the model does not know")
    conflict.add_argument("--seed", type=int, default=0, help="seed of the prompts")
    conflict.add_argument("--rows", type=int, default=32, help="prompts in one forward pass")
    conflict.add_argument("--out", default="runs/conflict", help="folder for conflict.json")


def _conflict(options: argparse.Namespace) -> None:
    from ndm_fast.evaluate.knowledge_conflict import conflict_table, read_ravel, run_conflict
    from ndm_fast.evaluate.published import load_partition
    from ndm_fast.report.table import text_table

    found = run_conflict(
        load_partition(options.partition),
        read_ravel(options.entities, options.texts),
        options.attribute,
        model_name=options.model,
        count=options.prompts,
        known_only=not options.unknown,
        seed=options.seed,
        rows=options.rows,
        device=options.device,
    )
    path = _save(found, options.out, "conflict")
    if options.json:
        _print_json(found)
        return
    for kind, result in found.items():
        print(f"\n{kind}: separation {result['separation']:.3f}, {result['conflicts']} prompts")
        print(text_table(conflict_table(result)))
    print(path)


def _add_shift(kinds: Any) -> None:
    about = "patch each subspace from the text moved by some tokens; does the model's position follow?"
    shift = _kind(kinds, "shift", about, _shift)
    shift.add_argument("folder", metavar="RUN", help="folder of a finished run")
    shift.add_argument("--tokens", type=int, default=5, help="tokens to move the text by")
    shift.add_argument(
        "--later", default=None, help="site to read positions at; default: the last block's output"
    )
    shift.add_argument("--rows", type=int, default=48, help="rows of text to patch")
    shift.add_argument("--references", type=int, default=512, help="rows of text to read positions from")


def _shift(options: argparse.Namespace) -> None:
    from ndm_fast.evaluate.position_shift import run_position_shift
    from ndm_fast.report.table import text_table

    found = run_position_shift(
        options.folder,
        options.tokens,
        later=options.later,
        references=options.references,
        rows=options.rows,
        device=options.device,
    )
    if options.json:
        _print_json(found)
        return
    print(f"text moved by {options.tokens} tokens; position read minus true position, mean over tokens")
    print(text_table(found))


def _add_stability(kinds: Any) -> None:
    about = "whether several runs, for instance of several seeds, found the same subspaces"
    stability = _kind(kinds, "stability", about, _stability)
    stability.add_argument("partitions", nargs="+", metavar="RUN", help="run folders or saved partitions")
    stability.add_argument("--out", default="runs/stability", help="folder for stability.json and .png")


def _stability(options: argparse.Namespace) -> None:
    from ndm_fast.evaluate.published import load_partition
    from ndm_fast.evaluate.stability import draw_stability, stability
    from ndm_fast.report.table import text_table

    found = stability({path: load_partition(path) for path in options.partitions})
    out = _save(found, options.out, "stability")
    draw_stability(found, out.with_suffix(".png"))
    if options.json:
        _print_json(found)
        return
    names = ("first", "second", "score", "chance")
    print(text_table([{name: pair[name] for name in names} for pair in found["pairs"]]))
    print(f"mean score {found['score']:.3f}, chance {found['chance']:.3f}; {out}, {out.with_suffix('.png')}")


def _add_sae(kinds: Any) -> None:
    about = "whether the features of a sparse autoencoder lie inside single subspaces"
    sae = _kind(kinds, "sae", about, _sae)
    sae.add_argument("partition", metavar="RUN", help="run folder, saved partition, or R-....pt")
    sae.add_argument("--decoder", required=True, metavar="FILE", help="safetensors file of the autoencoder")
    sae.add_argument("--tensor", default=None, help="name of the decoder in it; default: W_dec and the like")


def _sae(options: argparse.Namespace) -> None:
    from ndm_fast.evaluate.autoencoder import compare_autoencoder, read_decoder
    from ndm_fast.evaluate.published import load_partition
    from ndm_fast.report.table import text_table

    partition = load_partition(options.partition)
    found = compare_autoencoder(partition, read_decoder(options.decoder, partition.width, options.tensor))
    if options.json:
        _print_json(found)
        return
    print(text_table(found))


def _add_sensitivity(kinds: Any) -> None:
    about = "how the result depends on keys, threshold and width of the units, for equal steps"
    sensitivity = _kind(kinds, "sensitivity", about, _sensitivity)
    sensitivity.add_argument("folder", metavar="RUN", help="folder of a run, whose settings are varied")
    sensitivity.add_argument("--keys", type=int, nargs="+", default=[], help="numbers of keys to try")
    sensitivity.add_argument(
        "--thresholds", type=float, nargs="+", default=[], help="merge thresholds to try"
    )
    sensitivity.add_argument("--units", type=int, nargs="+", default=[], help="unit sizes to try")
    sensitivity.add_argument("--steps", type=int, default=None, help="steps of each; default: the run's")
    sensitivity.add_argument("--out", default="runs/sensitivity", help="folder for sensitivity.json and .png")


def _sensitivity(options: argparse.Namespace) -> None:
    from ndm_fast.evaluate.sensitivity import draw_sensitivity, run_sensitivity
    from ndm_fast.report.table import text_table

    found = run_sensitivity(
        options.folder,
        keys=options.keys,
        thresholds=options.thresholds,
        units=options.units,
        steps=options.steps,
        device=options.device,
    )
    out = _save(found, options.out, "sensitivity")
    draw_sensitivity(found, out.with_suffix(".png"))
    if options.json:
        _print_json(found)
        return
    print(text_table([{name: v for name, v in row.items() if name != "widths"} for row in found]))
    print(f"{out}, {out.with_suffix('.png')}")


def _add_planted(kinds: Any) -> None:
    about = "train a tiny GPT-2 with known variables, and see whether NDM finds them"
    planted = _kind(kinds, "planted", about, _planted)
    planted.add_argument("--variables", type=int, default=6, help="independent variables")
    planted.add_argument("--values", type=int, default=8, help="values of each")
    planted.add_argument("--seed", type=int, default=0, help="seed of model, data and starts")
    planted.add_argument("--merge", action="store_true", help="also merge 4-wide units by the auto threshold")
    planted.add_argument("--starts", type=int, default=4, help="random starts, of which the three best go on")
    planted.add_argument("--out", default="runs/planted", help="folder for planted.json")


def _planted(options: argparse.Namespace) -> None:
    from ndm_fast.evaluate.planted import planted_rows, run_planted
    from ndm_fast.report.table import text_table

    if options.device != "cpu":
        raise InputError("the planted model is too small for a GPU: leave --device away")
    found = run_planted(
        options.variables, options.values, seed=options.seed, starts=options.starts, merge=options.merge
    )
    path = _save(found, options.out, "planted")
    if options.json:
        _print_json(found)
        return
    print(text_table(planted_rows(found)))
    print(f"largest possible Gini {found['largest_gini']:.3f}; {found['seconds']:.0f} s; {path}")
