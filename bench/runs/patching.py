"""Prompts per second of subspace patching against one full pass per prompt and subspace, GPT-2 small's shape.

    python bench/runs/patching.py --out bench/results/patching.json

Random weights: the time is that of the real model. Per circuit test: its layer, its length of prompt.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from ndm_fast.activations.hooks import collect_activations, replace_activations
from ndm_fast.evaluate.patching.patching import logit_of, patch_effects, subspace_patch
from ndm_fast.evaluate.patching.prompts import Prompts, pad_prompts
from ndm_fast.geometry.orthogonal import random_rotation
from ndm_fast.partition import SubspacePartition
from ndm_fast.provenance import provenance
from ndm_fast.seeds import seeded
from ndm_fast.table import text_table

WIDTHS = (128, 128, 96, 96, 64, 64, 64, 32, 32, 32, 32)
CASES = (("1", 4, 20, [4, 6]), ("2", 6, 20, [13]), ("3", 8, 20, [-1]), ("4", 9, 12, [-1]))


@torch.no_grad()
def full_passes(model, site, partition, prompts: Prompts, others: Prompts, places, rows: int) -> torch.Tensor:
    """[S, N] logits of token 7, by a whole forward pass for every prompt and subspace."""
    with collect_activations(model, [site]) as captured:
        model(**others.model_inputs(), use_cache=False)
    values = []
    for subspace in range(len(partition)):
        parts = []
        for batch in torch.arange(len(prompts.tokens)).split(rows):
            some = prompts.rows(batch)
            change = subspace_patch(partition, [subspace], captured[site][batch], some, [places] * len(batch))
            with replace_activations(model, {site: change}):
                parts.append(model(**some.model_inputs(), use_cache=False).logits[:, -1, 7])
        values.append(torch.cat(parts))
    return torch.stack(values)


def main() -> None:
    """Time every case, checking first that both ways agree."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("bench/results/patching.json"))
    options = parser.parse_args()
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).eval().requires_grad_(False)
    partition = SubspacePartition(random_rotation(768, seeded(0, 0)), WIDTHS)
    table = []
    for test, layer, length, places in CASES:
        tokens = torch.randint(50_000, (2, options.prompts, length), generator=seeded(0, 1))
        prompts, others = (pad_prompts(part.tolist()) for part in tokens)
        site = f"blocks.{layer}.hook_resid_post"
        arguments = (model, site, partition, prompts, others, places)
        ways = {
            "ours": partial(_ours, *arguments),
            "full_one_by_one": partial(full_passes, *arguments, 1),
            "full_batched": partial(full_passes, *arguments, options.prompts),
        }
        seconds, values = {}, {}
        for name, run in ways.items():
            began = time.perf_counter()
            values[name] = run()
            seconds[name] = time.perf_counter() - began
        for name in ("full_one_by_one", "full_batched"):
            torch.testing.assert_close(values["ours"], values[name], rtol=1e-3, atol=1e-3)
        rate = {name: options.prompts * len(partition) / spent for name, spent in seconds.items()}
        table.append(
            {
                "test": test,
                "layer": layer,
                "tokens": length,
                **{f"{name}_per_s": value for name, value in rate.items()},
                "times_one_by_one": rate["ours"] / rate["full_one_by_one"],
                "times_batched": rate["ours"] / rate["full_batched"],
            }
        )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    about = {"prompts": options.prompts, "subspaces": len(partition), "threads": torch.get_num_threads()}
    content = {**about, "cases": table, "made_with": provenance()}
    options.out.write_text(json.dumps(content, indent=1) + "\n")
    print(text_table(table))


def _ours(model, site, partition, prompts, others, places) -> torch.Tensor:
    count = len(prompts.tokens)
    found = patch_effects(
        model,
        site,
        partition,
        prompts,
        others,
        logit_of([7] * count),
        positions=[places] * count,
    )
    return found.clean - found.by_group


if __name__ == "__main__":
    main()
