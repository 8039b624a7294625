"""``ndm-fast evaluate connections``: its arguments, and what it prints."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ndm_fast.cli.options import add_hub_flags, add_kind, hub_choice, print_json, save_json

if TYPE_CHECKING:
    from ndm_fast.evaluate.connections.results import Tested


def add_connections(kinds: Any) -> None:
    """Add ``connections``."""
    about = "which subspace writes to which: heads and MLPs between the sites of several runs of one model"
    kind = add_kind(kinds, "connections", about, _connections)
    kind.add_argument(
        "partitions",
        nargs="+",
        metavar="RUN",
        help="run folders or saved partitions, one a site, two or more",
    )
    kind.add_argument("--model", required=True, help="Hugging Face name or folder, with its head")
    add_hub_flags(kind)
    kind.add_argument(
        "--tests",
        nargs="+",
        default=None,
        metavar="TEST",
        help="1 2 3 3b 4: also patch every edge on these circuit tests, one for each pair of sites from "
        "below to above, or one for all; default: weights alone",
    )
    kind.add_argument("--prompts", type=int, default=8, help="prompts of each test")
    kind.add_argument("--templates", default="all", help="a, b or all: two disjoint sets of templates")
    kind.add_argument("--seed", type=int, default=0, help="seed of the prompts and of the random rotations")
    kind.add_argument("--rows", type=int, default=8, help="prompts in one forward pass, for each head")
    kind.add_argument(
        "--exact",
        action="store_true",
        help="run every edge through all layers above; default: only those that change what their head "
        "writes by a tenth of the largest change, the others to first order there",
    )
    kind.add_argument("--top", type=int, default=12, help="edges of each pair of sites to print")
    kind.add_argument(
        "--out", default="runs/connections", help="folder for connections.json and connections.svg"
    )


def _connections(options: argparse.Namespace) -> None:
    from ndm_fast.evaluate.connections.connections import run_connections
    from ndm_fast.evaluate.connections.measured import ConnectionOptions
    from ndm_fast.evaluate.connections.results import NAME, connection_rows
    from ndm_fast.report.connections import write_picture
    from ndm_fast.run.load import load_partition
    from ndm_fast.table import text_table

    found = run_connections(
        {path: load_partition(path) for path in options.partitions},
        options.model,
        tests=options.tests,
        device=options.device,
        hub=hub_choice(options),
        options=ConnectionOptions(
            options.prompts, options.seed, options.templates, options.rows, options.exact
        ),
    )
    out = save_json(found.to_json(), options.out, NAME)
    write_picture(out, out.with_suffix(".svg"))
    if options.json:
        print_json(found.to_json())
        return
    print(text_table(connection_rows(found, options.top)))
    for pair in found.pairs:
        if pair.tested:
            print("\n".join(_said(pair.tested, found.sites[pair.below].site, found.sites[pair.above].site)))
    for what in found.left_out:
        print(f"weights leave out {what}")
    print(f"{out}, {out.with_suffix('.svg')}")


def _said(tested: Tested, below: str, above: str) -> Iterator[str]:
    """How far weights and first order agree with patches, and what the skip connection carries."""
    where = f"{below} to {above}, test {tested.test}"
    for what, same in (("heads", tested.agreement), ("MLPs", tested.mlp_agreement)):
        if same:
            weights, gradient = (
                "not known" if area is None else f"{area:.3f}" for area in (same.weights, same.attribution)
            )
            yield (
                f"{where}: of {same.edges} edges into {what} {same.found} have a tenth of the largest "
                f"effect; area under the curve by weights {weights}, by gradient times difference {gradient}"
            )
    yield (
        f"{where}: straight through the skip connection goes {tested.skip.whole:.3f} of the effect "
        f"{tested.whole:.3f} of the whole activation"
    )
