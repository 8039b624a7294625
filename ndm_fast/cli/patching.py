"""The kinds of ``ndm-fast evaluate`` that patch subspaces: circuits, conflict and shift."""

from __future__ import annotations

import argparse
from typing import Any

from ndm_fast.cli.options import add_hub_flags, add_kind, hub_choice, print_json, save_json


def add_trace(kinds: Any) -> None:
    """Add ``trace``."""
    about = "patch the whole activation after every block: where does each circuit test's information sit?"
    trace = add_kind(kinds, "trace", about, _trace)
    trace.add_argument("--model", default="gpt2", help="Hugging Face name or folder, with its head")
    add_hub_flags(trace)
    trace.add_argument("--tests", nargs="+", default=None, metavar="TEST", help="of 1 2 3 3b 4; default: all")
    trace.add_argument("--prompts", type=int, default=48, help="prompts of each test")
    trace.add_argument("--layers", type=int, nargs="+", default=None, help="blocks; default: all")
    trace.add_argument("--positions", action="store_true", help="also each kind of position by itself")
    trace.add_argument("--templates", default="all", help="a, b or all: two disjoint sets of templates")
    trace.add_argument("--seed", type=int, default=0, help="seed of the prompts")
    trace.add_argument("--rows", type=int, default=48, help="prompts in one forward pass")
    trace.add_argument("--out", default="runs/trace", help="folder for trace.json and trace.png")


def _trace(options: argparse.Namespace) -> None:
    from ndm_fast.evaluate.circuits.figure import draw_trace
    from ndm_fast.evaluate.circuits.trace import run_trace, trace_rows
    from ndm_fast.table import text_table

    found = run_trace(
        options.model,
        tests=options.tests,
        prompts=options.prompts,
        seed=options.seed,
        templates=options.templates,
        layers=options.layers,
        kinds=options.positions,
        rows=options.rows,
        device=options.device,
        hub=hub_choice(options),
    )
    out = save_json(found.to_json(), options.out, "trace")
    draw_trace(found, out.with_suffix(".png"))
    if options.json:
        print_json(found.to_json())
        return
    print(text_table(trace_rows(found)))
    for test, site in found.sites.items():
        print(f"train for test {test} at {site}")
    print(f"{out}, {out.with_suffix('.png')}")


def add_circuits(kinds: Any) -> None:
    """Add ``circuits``."""
    about = "effects of patching each subspace on IOI and greater-than prompts"
    circuits = add_kind(kinds, "circuits", about, _circuits)
    circuits.add_argument(
        "partitions", nargs="+", metavar="RUN", help="run folder, saved partition, or R-<model>-<site>.pt"
    )
    circuits.add_argument("--model", default="gpt2", help="Hugging Face name or folder, with its head")
    add_hub_flags(circuits)
    circuits.add_argument(
        "--tests", nargs="+", default=None, metavar="TEST", help="1 2 3 3b 4; default: those for the site"
    )
    circuits.add_argument("--site", default=None, help="where to patch; default: the partition's own site")
    circuits.add_argument(
        "--trace", default=None, metavar="FILE", help="trace.json of `evaluate trace`: its peaks choose tests"
    )
    circuits.add_argument("--prompts", type=int, default=1000, help="prompts of each test")
    circuits.add_argument("--templates", default="all", help="a, b or all: two disjoint sets of templates")
    circuits.add_argument("--seed", type=int, default=0, help="seed of prompts, intervals and DAS")
    circuits.add_argument(
        "--no-complement", action="store_true", help="do not patch all subspaces but one too; halves the time"
    )
    circuits.add_argument("--random-seeds", type=int, default=5, help="random rotations to average")
    circuits.add_argument(
        "--yardsticks",
        action="store_true",
        help="also subspaces made with the labels: DAS, SVD, mean difference",
    )
    circuits.add_argument("--das-steps", type=int, default=200, help="steps of training DAS")
    circuits.add_argument(
        "--data", default=None, help="text for variances and PCA; default: what the run was trained on"
    )
    circuits.add_argument("--context-length", type=int, default=None, help="tokens in a row of that text")
    circuits.add_argument("--rows", type=int, default=64, help="prompts in one forward pass")
    circuits.add_argument("--out", default="runs/circuits", help="folder for circuits.json and circuits.png")


def _circuits(options: argparse.Namespace) -> None:
    from ndm_fast.evaluate.circuits.circuits import CircuitOptions, run_circuits
    from ndm_fast.evaluate.circuits.figure import draw_effects
    from ndm_fast.evaluate.circuits.results import circuit_rows, mean_ginis, results_to_json
    from ndm_fast.evaluate.circuits.trace import read_trace
    from ndm_fast.run.load import load_partition
    from ndm_fast.table import text_table

    results = run_circuits(
        {path: load_partition(path) for path in options.partitions},
        options.model,
        tests=options.tests,
        site=options.site,
        trace=read_trace(options.trace) if options.trace else None,
        data=options.data,
        context_length=options.context_length,
        device=options.device,
        hub=hub_choice(options),
        options=CircuitOptions(
            prompts=options.prompts,
            seed=options.seed,
            templates=options.templates,
            rows=options.rows,
            complement=not options.no_complement,
            random_seeds=options.random_seeds,
            yardsticks=options.yardsticks,
            das_steps=options.das_steps,
        ),
    )
    out = save_json(results_to_json(results), options.out, "circuits")
    draw_effects(results, out.with_suffix(".png"))
    if options.json:
        print_json(results_to_json(results))
        return
    print(text_table(circuit_rows(results)))
    means = ", ".join(f"{kind} {value:.3f}" for kind, value in mean_ginis(results).items())
    print(f"mean Gini over tests and normalisations: {means}\n{out}, {out.with_suffix('.png')}")


def add_conflict(kinds: Any) -> None:
    """Add ``conflict``."""
    about = "which subspaces carry what the context says, and which what the model knows"
    conflict = add_kind(kinds, "conflict", about, _conflict)
    conflict.add_argument("partition", metavar="RUN", help="run folder, saved partition, or R-....pt")
    conflict.add_argument("--model", default=None, help="default: the one that the partition names")
    add_hub_flags(conflict)
    conflict.add_argument("--site", default=None, help="where to patch; default: the partition's own site")
    conflict.add_argument("--entities", required=True, help="RAVEL's ravel_<kind>_entity_attributes.json")
    conflict.add_argument("--texts", required=True, help="RAVEL's ravel_<kind>_attribute_to_prompts.json")
    conflict.add_argument("--attribute", required=True, help="for instance Country")
    conflict.add_argument("--prompts", type=int, default=500, help="most prompts to make")
    conflict.add_argument("--unknown", action="store_true", help="keep entities that the model does not know")
    conflict.add_argument("--data", default=None, help="text for PCA; default: what the run was trained on")
    conflict.add_argument("--seed", type=int, default=0, help="seed of prompts and intervals")
    conflict.add_argument("--rows", type=int, default=32, help="prompts in one forward pass")
    conflict.add_argument("--out", default="runs/conflict", help="folder for conflict.json")


def _conflict(options: argparse.Namespace) -> None:
    from ndm_fast.evaluate.conflict.prompts import read_ravel
    from ndm_fast.evaluate.conflict.rates import conflict_table, run_conflict
    from ndm_fast.run.load import load_partition
    from ndm_fast.table import text_table

    found = run_conflict(
        load_partition(options.partition),
        read_ravel(options.entities, options.texts),
        options.attribute,
        model_name=options.model,
        site=options.site,
        count=options.prompts,
        known_only=not options.unknown,
        text=options.data,
        seed=options.seed,
        rows=options.rows,
        device=options.device,
        hub=hub_choice(options),
    )
    path = save_json(found, options.out, "conflict")
    if options.json:
        print_json(found)
        return
    for kind, result in found.items():
        low, high = result["separation_interval"]
        apart = f"separation {result['separation']:.3f} ({low:.3f} to {high:.3f})"
        print(f"\n{kind}: {apart}, {result['conflicts']} prompts")
        print(text_table(conflict_table(result)))
    print(path)


def add_causalgym(kinds: Any) -> None:
    """Add ``causalgym``."""
    about = "log odds ratio of patching each subspace at each aligned span of minimal pairs"
    gym = add_kind(kinds, "causalgym", about, _causalgym)
    gym.add_argument("pairs", metavar="PATH", help="JSON list or lines: base, src, base_label, src_label ...")
    gym.add_argument(
        "--partition", required=True, metavar="RUN", help="run folder, saved partition, or R-....pt"
    )
    gym.add_argument("--model", required=True, help="Hugging Face name or folder, with its head")
    add_hub_flags(gym)
    gym.add_argument("--site", default=None, help="where to patch; default: the partition's own site")
    gym.add_argument("--data", default=None, help="text for PCA; default: what the run was trained on")
    gym.add_argument(
        "--choose-span",
        action="store_true",
        help="of each task only the span that does most on one half of the pairs, measured on the other",
    )
    gym.add_argument("--rows", type=int, default=64, help="prompts in one forward pass")
    gym.add_argument("--out", default="runs/causalgym", help="folder for causalgym.json")


def _causalgym(options: argparse.Namespace) -> None:
    from ndm_fast.evaluate.causalgym import causalgym_json, causalgym_rows, run_causalgym
    from ndm_fast.evaluate.minimal_pairs import read_pairs
    from ndm_fast.run.load import load_partition
    from ndm_fast.table import text_table

    pairs = read_pairs(options.pairs)
    found = run_causalgym(
        load_partition(options.partition),
        pairs,
        options.model,
        site=options.site,
        data=options.data,
        choose=options.choose_span,
        rows=options.rows,
        device=options.device,
        hub=hub_choice(options),
    )
    path = save_json(causalgym_json(found), options.out, "causalgym")
    if options.json:
        print_json(causalgym_json(found))
        return
    print(text_table(causalgym_rows(found)))
    print(path)


def add_shift(kinds: Any) -> None:
    """Add ``shift``."""
    about = "patch each subspace from the text moved by some tokens; does the model's position follow?"
    shift = add_kind(kinds, "shift", about, _shift)
    shift.add_argument("folder", metavar="RUN", help="folder of a finished run")
    shift.add_argument("--tokens", type=int, default=5, help="tokens to move the text by")
    shift.add_argument(
        "--later", default=None, help="site to read positions at; default: the last block's output"
    )
    shift.add_argument("--rows", type=int, default=48, help="rows of text to patch")
    shift.add_argument("--references", type=int, default=512, help="rows of text to read positions from")


def _shift(options: argparse.Namespace) -> None:
    from ndm_fast.evaluate.position_shift import run_position_shift
    from ndm_fast.table import text_table

    found = run_position_shift(
        options.folder,
        options.tokens,
        later=options.later,
        references=options.references,
        rows=options.rows,
        device=options.device,
    )
    if options.json:
        print_json(found)
        return
    print(f"text moved by {options.tokens} tokens; position read minus true position, mean over tokens")
    print(text_table(found))
