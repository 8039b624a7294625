"""Activations per second: one site, three sites in one pass, three passes; and training from a cache.

    python bench/runs/harvest.py

MiniLM on Python's docstrings, rows of 40 tokens. Each way reads the same text; that the rows are the same is
checked first. Ratios are within a round, and of this process's core seconds, which other work on the machine
changes less than the clock.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # not the root: its `kernels` hides another

from measuring import result_file, seconds, spread, times_faster, write_results

from ndm_fast.activations.documents import open_documents
from ndm_fast.activations.models import load_model
from ndm_fast.activations.packing import pack
from ndm_fast.activations.stream import ActivationStream, Harvester
from ndm_fast.config import HarvestConfig, from_flat
from ndm_fast.run.presets import preset
from ndm_fast.run.source import harvest_run
from ndm_fast.run.train import train_run
from ndm_fast.table import text_table

SITES = ("blocks.1.hook_resid_post", "blocks.2.hook_resid_post", "blocks.3.hook_resid_post")
CONFIG = HarvestConfig(model="minilm", site=SITES, data="docstrings", context_length=40)


def harvest_rows(repeats: int, batches: int) -> list[dict[str, object]]:
    """Harvesting in memory, without the disk."""
    model, tokenizer = load_model("minilm")
    documents = open_documents("docstrings")

    def harvester(*sites: str, **changes: object) -> Harvester:
        config = dataclasses.replace(CONFIG, **changes)
        return Harvester(model, tokenizer, sites, documents, config)

    def read(source: Harvester) -> None:
        for _ in islice(source.batches(), batches):
            pass

    def packed() -> None:
        for _ in islice(pack(documents(), tokenizer, 40, CONFIG.rows_per_batch), batches):
            pass

    together = next(harvester(*SITES).batches())
    for site in SITES:
        alone = next(ActivationStream(model, tokenizer, site, documents, CONFIG).batches())
        assert torch.equal(together[site].rows.activations, alone)
    rows = sum(len(found[SITES[2]].rows.token) for found in islice(harvester(SITES[2]).batches(), batches))
    ways = {
        "one site": lambda: read(harvester(SITES[2])),
        "three sites, one pass": lambda: read(harvester(*SITES)),
        "three sites, three passes": lambda: [read(harvester(site)) for site in SITES],
        "one site, autocast bfloat16": lambda: read(harvester(SITES[2], autocast="bfloat16")),
        "packing alone": packed,
    }
    clock: dict[str, list[float]] = {name: [] for name in ways}
    core: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            began = time.process_time()
            spent = seconds(way)
            if turn:  # the first one warms up
                clock[name].append(spent)
                core[name].append(time.process_time() - began)
    return [
        {
            "way": name,
            "rows_per_site": rows,
            "seconds": spread(clock[name])["median"],
            "core_seconds": spread(core[name])["median"],
            "core_seconds_min": min(core[name]),
            "core_seconds_max": max(core[name]),
            "rows_per_core_second": rows / spread(core[name])["median"],
            "over_one_site": 1 / times_faster(core, name, "one site"),
        }
        for name in ways
    ]


def train_rows(steps: int) -> list[dict[str, object]]:
    """The demo with few steps and held-out keys: from the model, and from a cache harvested before."""
    changed = {"max_steps": steps, "merge_start": None, "heldout_keys": 16_384}
    config = from_flat({**preset("minilm"), **changed})
    train = config.train
    needed = train.heldout_queries + train.heldout_keys + steps * train.queries + train.keys + 2000
    with tempfile.TemporaryDirectory() as scratch:
        acts, model, cache = (Path(scratch) / name for name in ("acts", "model", "cache"))
        spent = {
            "harvest to disk": seconds(
                lambda: harvest_run(config.harvest, acts, needed, show_progress=False)
            ),
            "train from the model": seconds(lambda: train_run(config, model, show_progress=False)),
        }
        cached = dataclasses.replace(config, train=dataclasses.replace(train, acts=str(acts)))
        spent["train from the cache"] = seconds(lambda: train_run(cached, cache, show_progress=False))
        weights = "partition/partition.safetensors"
        assert (model / weights).read_bytes() == (cache / weights).read_bytes()
        size = sum(path.stat().st_size for path in acts.rglob("*.safetensors")) / 2**20
    return [
        {"way": f"{name}, {steps} steps", "rows_per_site": needed, "seconds": time, "cache_mib": size}
        for name, time in spent.items()
    ]


def main() -> None:
    """Time every way and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batches", type=int, default=25)
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args()
    harvested = harvest_rows(options.repeats, options.batches)
    print(text_table(harvested))
    trained = train_rows(options.steps)
    print(text_table(trained))
    write_results(result_file("harvest"), [*harvested, *trained])


if __name__ == "__main__":
    main()
