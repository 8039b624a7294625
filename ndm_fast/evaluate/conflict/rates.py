"""Knowledge conflict: which subspaces carry what the context says, and which what the model knows?

Patched from a run with a made-up entity in both places ("corrupt_param": nothing is known of it), or in the
first place only ("corrupt_context": nothing was said of the entity that is asked for).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ndm_fast.activations.site_rows import site_activations
from ndm_fast.config import HubOptions
from ndm_fast.errors import InputError
from ndm_fast.evaluate.baselines import STANDARD_BASELINES, baseline_partition
from ndm_fast.evaluate.circuits.bootstrap import DRAWS, interval, resampled_means
from ndm_fast.evaluate.conflict.prompts import Attributes, Conflict, make_conflicts
from ndm_fast.evaluate.patching.language_model import check_lengths, load_language_model
from ndm_fast.evaluate.patching.layers_above import LayersAbove
from ndm_fast.evaluate.patching.patching import patch_effects
from ndm_fast.evaluate.patching.prompts import pad_prompts
from ndm_fast.evaluate.revision import trained_on
from ndm_fast.partition import SubspacePartition

RUNS = ("corrupt_param", "corrupt_context")


def conflict_rates(
    model: nn.Module,
    site: str,
    partition: SubspacePartition,
    conflicts: list[Conflict],
    *,
    rows: int = 32,
    seed: int = 0,
) -> dict[str, Any]:
    """How often the answer is the context's or the parameters', as each subspace is patched everywhere.

    Args:
        rows: prompts in one forward pass.
        seed: of the resampling.

    Returns:
        ``original`` rates; ``patches``, one per subspace and first one for the whole activation
        (``subspace`` None): ``context_rate`` and ``param_rate`` under ``corrupt_param`` and
        ``corrupt_context``; ``separation``, see :func:`separation`, and ``separation_interval``, its 2.5 and
        97.5 % quantiles over resampled prompts.
    """
    device = next(model.parameters()).device
    prompts = pad_prompts([c.prompt for c in conflicts], device=device)
    answers = torch.tensor([[c.wrong, c.right] for c in conflicts], device=device)

    def metric(logits: Tensor, which: Tensor) -> Tensor:
        return (logits[:, 0].argmax(1)[:, None] == answers[which]).double()

    by_run, drops = {}, {}
    for run, answer in zip(RUNS, (1, 0), strict=True):
        others = pad_prompts([getattr(c, run) for c in conflicts], device=device)
        found = patch_effects(model, site, partition, prompts, others, metric, rows=rows)
        original = found.clean.mean(0)
        rates = original - torch.cat([found.whole[None], found.by_group]).mean(1)
        by_run[run] = rates.tolist()
        drops[run] = found.by_group[..., answer]
    patches = [
        {
            "subspace": None if number == 0 else number - 1,
            "width": partition.width if number == 0 else partition.widths[number - 1],
            **{run: _named(by_run[run][number]) for run in RUNS},
        }
        for number in range(len(partition) + 1)
    ]
    result = {"conflicts": len(conflicts), "original": _named(original.tolist()), "patches": patches}
    means = resampled_means(torch.cat([drops["corrupt_context"], drops["corrupt_param"]]), DRAWS, seed)
    bounds = interval(_separations(*means.chunk(2, 1)))
    return {**result, "separation": separation(result), "separation_interval": bounds}


def _named(rates: list[float]) -> dict[str, float]:
    return {"context_rate": rates[0], "param_rate": rates[1]}


def separation(result: dict[str, Any]) -> float:
    """How far apart the subspaces of context and parameters lie: 0 the same, 1 disjoint, NaN without effect.

    Half the summed difference of two distributions over subspaces: the fall of the context's rate without
    context, and of the parameters' rate without parameters, each as shares of its sum (rises count as 0).
    """
    context, parameters = (
        torch.tensor(
            [
                result["original"][rate] - patch[run][rate]
                for patch in result["patches"]
                if patch["subspace"] is not None
            ],
            dtype=torch.float64,
        )
        for run, rate in (("corrupt_context", "context_rate"), ("corrupt_param", "param_rate"))
    )
    return float(_separations(context, parameters))


def _separations(context: Tensor, parameters: Tensor) -> Tensor:
    """[...] of falls [..., S] of the two rates."""
    shares = [
        falls.clamp_min(0) / falls.clamp_min(0).sum(-1, keepdim=True) for falls in (context, parameters)
    ]
    return (shares[0] - shares[1]).abs().sum(-1) / 2


def run_conflict(
    partition: SubspacePartition,
    data: Attributes,
    attribute: str,
    *,
    model_name: str | None = None,
    site: str | None = None,
    count: int = 500,
    known_only: bool = True,
    text: str | None = None,
    seed: int = 0,
    rows: int = 32,
    device: str = "cpu",
    hub: HubOptions | None = None,
) -> dict[str, Any]:
    """:func:`conflict_rates` of a partition at its own site, beside the four baselines.

    Args:
        model_name, site: default those that the partition's ``source`` names.
        text: for principal components; default what the partition was trained on.
        seed: of prompts, baselines and resampling.
        hub: as for ``run_information``.

    Raises:
        InputError: as :func:`make_conflicts`; a partition that names no site, or of another width; no text.
    """
    name = model_name or partition.source.get("model", "")
    model, tokenizer = load_language_model(name, device, hub=trained_on(name, hub, partition.source))
    site = site or partition.source.get("site")
    if not site:
        raise InputError("the partition does not say which site it is for: give --site")
    LayersAbove(model, site).check_fits(partition)
    conflicts = make_conflicts(
        model, tokenizer, data, attribute, count=count, seed=seed, known_only=known_only
    )
    check_lengths(model, [conflict.prompt for conflict in conflicts])
    activations = site_activations(model, tokenizer, site, partition.source, data=text)
    methods = {"ndm": partition.to(device)} | {
        kind: baseline_partition(kind, partition.widths, activations, seed) for kind in STANDARD_BASELINES
    }
    return {
        kind: conflict_rates(model, site, one, conflicts, rows=rows, seed=seed)
        for kind, one in tqdm(methods.items(), "conflict", unit="partition", leave=False, disable=None)
    }


def conflict_table(result: dict[str, Any]) -> list[dict[str, Any]]:
    """One table row per patch of :func:`conflict_rates`, the unpatched run first."""
    original = dict.fromkeys(RUNS, result["original"])
    patches = [{"subspace": "none", "width": 0, **original}, *result["patches"]]
    return [
        {
            "subspace": "all" if patch["subspace"] is None else patch["subspace"],
            "width": patch["width"],
            **{f"{run}_{rate}": patch[run][rate] for run in RUNS for rate in ("context_rate", "param_rate")},
        }
        for patch in patches
    ]
