"""Builds the tables of the page Benchmarks from the JSON records in ``bench/results``, at build time.

A line ``<!-- record: NAME -->`` in a page becomes a table of ``bench/results/NAME.json``, under a line that
says on what it was measured. Records that no line names follow where ``<!-- other records -->`` stands, with
every number they hold. mkdocs calls ``on_page_markdown`` and ``on_page_content``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "bench" / "results"

COLUMNS: dict[str, dict[str, str]] = {
    "connections": {
        "seed": "seed",
        "mlp": "with MLPs",
        "partitions.ndm.weights.K": "NDM: rank by weights",
        "partitions.ndm.data.K": "rank by patching",
        "partitions.ndm.area": "area",
        "partitions.labels.weights.K": "labels: rank by weights",
        "partitions.labels.data.K": "rank by patching, labels",
        "partitions.labels.area": "area, labels",
        "partitions.pca.weights.K": "PCA: rank by weights",
        "partitions.pca.data.K": "rank by patching, PCA",
        "partitions.pca.area": "area, PCA",
    },
    "demo-minilm": {
        "seed": "seed",
        "widths": "widths",
        "position_within_3": "position within 3, in its subspace",
        "same_position": "same position, there",
        "others_within_3": "within 3, largest elsewhere",
        "heldout_distance": "held-out distance",
    },
    "distributed": {
        "parallel": "shared",
        "ranks": "ranks",
        "before_merging": "loss before merging",
        "before_merging_relative": "relative",
        "at_the_end": "at the end",
        "at_the_end_relative": "relative, at the end",
        "widths": "widths",
    },
    "harvest": {
        "way": "way",
        "rows_per_core_second": "activations a site and core second",
        "over_one_site": "time over one site",
    },
    "mi": {
        "S": "S",
        "d": "d",
        "pairs": "pairs",
        "seconds.eager.median": "eager torch, s",
        "seconds.ours.median": "ours, s",
        "seconds.eager": "eager torch, s",
        "seconds.kernels only": "ours, rotated rows, s",
        "times_eager": "times",
        "speedup_kernels": "times",
        "speedup": "times, rotation counted",
        "times_eager_from_raw": "times, both rotating",
        "goal": "goal",
    },
    "ops": {
        "model": "activations",
        "partition": "partition",
        "kind": "product",
        "d": "d",
        "width": "p",
        "queries": "Q",
        "keys": "K",
        "k": "k",
        "pairs": "pairs",
        "form": "rows",
        "precision": "search",
        "ms.ours.median": "ours, ms",
        "unit": "unit",
        "rates.ours": "ours",
        "rates.ceiling": "ceiling",
        "of_ceiling": "of the ceiling",
        "best_peer": "best peer",
        "times_best_peer": "times the best peer",
        "times.torch baddbmm+argmin": "times torch's baddbmm and argmin",
        "times.torch cdist+topk": "times torch's cdist and topk",
        "times.faiss": "times faiss",
        "extra_mb": "extra MB",
    },
    "patching": {
        "test": "test",
        "layer": "layer",
        "tokens": "tokens",
        "ours_per_s": "ours, patches/s",
        "full_one_by_one_per_s": "one full pass each",
        "times_one_by_one": "times",
        "full_batched_per_s": "full passes in batches",
        "times_batched": "times, batched",
    },
    "plan": {
        "run": "run",
        "predicted_s": "predicted, s",
        "measured_s": "measured, s",
        "off": "off",
        "predicted_gb": "predicted, GB",
        "process_gb": "process, GB",
    },
    "planted": {
        "planted.seed": "seed",
        "starts": "starts",
        "methods.ndm.gini": "NDM",
        "methods.ndm_merged.gini": "NDM, merged from 4-wide units",
        "methods.pca_descending.gini": "PCA",
        "methods.identity.gini": "identity",
        "methods.random.gini": "random",
        "largest_gini": "largest possible",
    },
    "profile-step": {
        "rotation": "rotation",
        "d": "d",
        "ms_per_step": "ms a step",
        "blas": "share BLAS",
        "ours": "share our ops",
        "elementwise": "share torch's elementwise",
        "python": "share Python",
    },
    "quality": {
        "mode": "rotation / steps a search",
        "heldout": "held-out distance, mean",
        "by_seed": "by seed",
        "relative_to_published": "relative to published",
        "ms_per_step": "ms a step",
    },
    "restarts": {"seed": "seed", "way": "way", "heldout_loss": "held-out loss", "seconds": "seconds"},
    "search": {
        "d": "d",
        "p": "p",
        "Q": "Q",
        "K": "K",
        "isa": "instructions",
        "gflops.sgemm": "sgemm, GFLOP/s",
        "gflops.ours": "ours",
        "gflops.ours bf16": "ours, bf16",
        "of_sgemm": "of sgemm",
        "best_other": "best other",
        "times_best_other": "times best other",
        "extra_mb": "extra MB",
    },
    "shadow-counts": {
        "rows": "rows",
        "partition": "partition",
        "width": "p",
        "keys": "K",
        "most_times_groups_32_in_order": "groups of 32, in order",
        "most_times_groups_16_left": "groups of 16, best known",
        "most_times_groups_16_left_in_stages": "in stages",
        "most_times_keys_left_in_stages": "single keys, best known, in stages",
    },
    "time-to-loss": {
        "mode": "settings",
        "steps": "steps",
        "run_seconds": "seconds of the run",
        "final_loss": "final held-out loss",
        "seconds_to_target": "seconds to the published loss",
        "times_published": "times",
    },
    "train": {
        "d": "d",
        "K": "K",
        "Q": "Q",
        "rotation": "rotation",
        "search_ms": "search, ms",
        "update_ms": "update, ms",
        "step_ms": "a step, ms",
        "published_ms": "published, ms",
        "times_published": "times",
    },
    "training-step": {
        "precision": "search",
        "ms_per_step.published.median": "published, ms",
        "ours_ms": "ours, ms",
        "times_published": "times",
        "heldout_difference": "held-out loss against published",
    },
}
"""Columns shown of a record: path in a row -> heading. One without an entry shows every number it holds."""

_LEFT_OUT = ("spread", "curve", "made_with", "machine", "settings", "purity", "intervals", "by_subspace")
_LISTS = ("rows", "runs", "cases", "modes", "benchmarks")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page with its tables."""
    named = set(re.findall(r"<!-- record: (\S+) -->", markdown))
    markdown = re.sub(r"<!-- record: (\S+) -->", lambda found: table(RESULTS / f"{found[1]}.json"), markdown)
    if "<!-- other records -->" not in markdown:
        return markdown
    others = [path for path in sorted(RESULTS.glob("*.json")) if path.stem not in named]
    parts = [f"### {path.stem}\n\n{table(path)}" for path in others]
    return markdown.replace("<!-- other records -->", "\n\n".join(parts) or "None.")


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings say ``:func:`name``` for what a page shows as code."""
    return re.sub(r":(?:func|class|meth|attr|mod):(?=<code>)", "", html)


def table(path: Path) -> str:
    """A record as Markdown: what it was measured on, then a row for each of its rows, a table for each op."""
    record = json.loads(path.read_text(encoding="utf-8"))
    rows = [flat(row) for row in rows_of(record)]
    base = re.sub(r"(-full)?(-(avx2|avx512|avx512bf16))?$", "", path.stem)
    parts = [f"`bench/results/{path.name}`: {measured_on(record)}"]
    for op in dict.fromkeys(row.get("op") for row in rows):
        if op:
            parts.append(f"`{op}`")
        of_op = [{name: row[name] for name in row if name != "op"} for row in rows if row.get("op") == op]
        columns = COLUMNS.get(base)
        shown_rows = [row for row in of_op if columns is None or sum(name in row for name in columns) > 1]
        parts.append(_table(shown_rows, columns))
        if others := [row for row in of_op if row not in shown_rows]:  # a record may end with a summary
            parts.append(_table(others, None))
    return "\n\n".join(parts)


def _table(rows: list[dict[str, Any]], columns: dict[str, str] | None) -> str:
    if columns is None:
        columns = {name: name for row in rows for name in row if not name.endswith((".min", ".max"))}
    columns = {name: heading for name, heading in columns.items() if any(name in row for row in rows)}
    lines = [f"| {' | '.join(columns.values())} |", "|---" * len(columns) + "|"]
    lines += [f"| {' | '.join(shown(row.get(name)) for name in columns)} |" for row in rows]
    return "\n".join(lines)


def rows_of(record: Any) -> list[dict[str, Any]]:
    """The rows of a record, whichever of its shapes it has."""
    if isinstance(record, list):
        return record
    for name in _LISTS:
        if isinstance(record.get(name), list):
            rows = record[name]
            for row in rows:
                if isinstance(row.get("ms_per_step"), dict):
                    row["ours_ms"] = row["ms_per_step"].get(row.get("precision"), {}).get("median")
            return rows
    if "shifts" in record:
        return [{"moved by": by, **row} for by, rows in record["shifts"].items() for row in rows]
    return [record]


def flat(row: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of a row by dotted path; a list of records becomes their number."""
    found: dict[str, Any] = {}
    for name, value in row.items():
        if name in _LEFT_OUT:
            continue
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            found[prefix + name] = len(value)
        else:
            found[prefix + name] = value
    return found


def measured_on(record: Any) -> str:
    """One line: processor, threads, instructions, load, versions, commit, date, as far as the record says."""
    notes = list(_notes(record))
    if not notes:
        return "the record does not say on what it was measured."
    note = notes[0]
    versions = note.get("versions", {n: note[n] for n in ("python", "torch") if n in note})
    commits = sorted(
        {str(each["commit"])[:7] + "-dirty" * ("dirty" in str(each["commit"])) for each in notes}
    )
    load = note.get("load")
    parts = [
        str(note.get("gpu") or note.get("cpu", "")),
        f"{note['threads']} threads" if note.get("threads") != 1 else "1 thread",
        note.get("isa"),
        f"load {load[0] if isinstance(load, list) else load:.1f} at the start" if load is not None else None,
        ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "triton") if name in versions),
        f"commit {', '.join(commits)}",
        note.get("date"),
    ]
    return "; ".join(str(part) for part in parts if part) + "."


def _notes(record: Any) -> Iterator[dict[str, Any]]:
    """Every note on how a record, or a part of it, was made."""
    if isinstance(record, dict):
        if "commit" in record and "threads" in record:
            yield record
        for value in record.values():
            yield from _notes(value)
    elif isinstance(record, list):
        for value in record:
            yield from _notes(value)


def shown(value: Any) -> str:
    """A cell: three digits of a number, a dash for what is not there."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " ".join(shown(each) for each in value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value).replace("|", "\\|")
