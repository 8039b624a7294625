"""The paper's toy model of superposition: train it, learn its subspaces, and compare with the truth.

``n`` features in groups; features of one group exclude each other, groups are independent. The model
squeezes them into ``dim < n`` hidden dimensions and must give them back, ``ReLU(x W W' + b)``. Features
that never meet may share a direction's neighbourhood, so each group gets a subspace of its own: the
structure that NDM has to find in ``h = x W`` without being told of groups.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ndm_fast.checkpoint import write_atomic
from ndm_fast.config import MergeConfig, TrainConfig
from ndm_fast.errors import InputError
from ndm_fast.partition import SubspacePartition
from ndm_fast.pool import TensorStream, seeded
from ndm_fast.trainer import Observer, Trainer

SILENT = 0.25
"""Probability that no feature of a group is on."""

_MODEL_STEPS, _MODEL_BATCH, _MODEL_RATE = 2000, 512, 0.1
"""At a rate of 0.01 some groups of unequal size still overlap after 4,000 steps."""

_UNIT = 3
"""Width of the subspaces at the start. In 1 or 2 dimensions the points of two groups fill the space as
densely as those of one, and the loss hardly tells them apart (20,20 -> 12: units of 2 stay mixed)."""

_KEYS = 2048
"""Fewer keys (256, 512) see too little of the structure, more (16,384) make the way there flat: both left
20,20 -> 12 mixed where 2,048 and 4,096 took it apart."""

_THRESHOLD = 0.3
"""Merge above this MI / (p_a + p_b). Measured on 20,20 -> 12 with 2,048 to 4,096 keys: two halves of one
group 0.8 to 1.2, different groups 0.06 to 0.07."""

_ESCAPES, _ESCAPE_STEPS, _MERGE_START, _MERGE_INTERVAL = 20, 100, 2300, 300

_MODEL, _DATA, _ACTIVATIONS = 10, 11, 12
"""What the random numbers are for."""


class ToyModel(NamedTuple):
    """A trained model of superposition."""

    weight: Tensor
    """[n, dim] fp32; row i is the direction of feature i."""
    bias: Tensor
    """[n] fp32."""
    loss: float
    """Mean over the last batches of the squared error summed over features."""


def sample_features(groups: Sequence[int], rows: int, generator: torch.Generator) -> Tensor:
    """[rows, n] inputs: each group silent with probability 0.25, else one feature uniform in (0, 1].

    Args:
        groups: sizes of the feature groups, sum n.
    """
    parts = []
    for size in groups:
        part = torch.zeros(rows, size)
        value = 1 - torch.rand(rows, 1, generator=generator)
        value *= torch.rand(rows, 1, generator=generator) >= SILENT
        parts.append(part.scatter_(1, torch.randint(size, (rows, 1), generator=generator), value))
    return torch.cat(parts, 1)


def train_toy_model(groups: Sequence[int], dim: int, *, seed: int = 0, steps: int = _MODEL_STEPS) -> ToyModel:
    """Train ``ReLU(x W W' + b)`` to give back its input: Adam, rate decaying linearly to 0.

    Args:
        groups: sizes of the feature groups. dim: width of the hidden layer.

    Raises:
        InputError: sizes that make no toy model.
    """
    _check(groups, dim)
    start, data = seeded(seed, _MODEL), seeded(seed, _DATA)
    weight = (torch.randn(sum(groups), dim, generator=start) / dim**0.5).requires_grad_()
    bias = torch.zeros(sum(groups), requires_grad=True)
    adam = torch.optim.Adam([weight, bias], lr=_MODEL_RATE)
    decay = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - step / steps)
    recent = []
    for step in tqdm(range(steps), "toy model", disable=None, leave=False):
        features = sample_features(groups, _MODEL_BATCH, data)
        loss = (torch.relu(features @ weight @ weight.T + bias) - features).square().sum(1).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        decay.step()
        if step >= steps - 100:
            recent.append(loss.item())
    return ToyModel(weight.detach(), bias.detach(), sum(recent) / len(recent))


def energy_shares(weight: Tensor, groups: Sequence[int], partition: SubspacePartition) -> Tensor:
    """[G, S] share of each group's energy in each subspace: ``sum |W_i R_s|^2 / sum |W_i|^2``; rows sum to 1.

    Args:
        weight: [n, dim] feature directions. groups: G sizes, sum n.
    """
    by_feature = torch.stack([part.double().square().sum(1) for part in partition.split(weight)], 1)
    energy = torch.stack([part.sum(0) for part in by_feature.split(list(groups))])
    return energy / energy.sum(1, keepdim=True)


def initial_widths(dim: int) -> tuple[int, ...]:
    """Widths at the start for a hidden layer: 3 each, two of 2 or one where 3 does not divide; at least two."""
    if dim <= _UNIT:
        return (dim - 1, 1)
    threes, rest = divmod(dim, _UNIT)
    return (*(_UNIT,) * (threes - 1), 2, 2) if rest == 1 else (*(_UNIT,) * threes, *(2,) * (rest == 2))


def find_subspaces(weight: Tensor, groups: Sequence[int], *, seed: int = 0) -> tuple[SubspacePartition, float]:
    """NDM on the hidden activations of a toy model, and its held-out loss.

    Random start, narrow units, escapes from local minima, then merging.

    Args:
        weight: [n, dim]. groups: sizes of the feature groups; they only make the inputs.
    """
    widths = initial_widths(weight.shape[1])
    merge = MergeConfig(
        merge_threshold=_THRESHOLD,
        merge_start=_MERGE_START,
        merge_interval=_MERGE_INTERVAL,
        mi_queries=512,
        mi_keys=_KEYS,
    )
    steps = _MERGE_START + len(widths) * _MERGE_INTERVAL  # enough to merge, pair after pair, into one
    train = TrainConfig(
        initial_widths=widths,
        start="random",
        keys=_KEYS,
        search_every=8,
        max_steps=steps,
        lr=5e-2,
        pool_rows=steps * 128 + _KEYS,  # one filling: every query is a fresh one
        heldout_queries=1024,
        heldout_keys=_KEYS,
        escape_tries=_ESCAPES,
        escape_steps=_ESCAPE_STEPS,
        eval_every=steps,
        checkpoint_every=steps,
        seed=seed,
    )
    rows = train.pool_rows + train.heldout_queries + train.heldout_keys
    trainer = Trainer(TensorStream(list(_activations(weight, groups, rows, seed))), train, merge)
    with tqdm(total=steps, desc="subspaces", disable=None, leave=False) as bar:
        partition = trainer.run(_Bar(bar))
    return partition, trainer.heldout_loss


class _Bar(Observer):
    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def progress(self, trainer: Trainer) -> None:
        self._bar.update(trainer.step - self._bar.n)


def _activations(weight: Tensor, groups: Sequence[int], rows: int, seed: int) -> Iterator[Tensor]:
    generator = seeded(seed, _ACTIVATIONS)
    for _ in range(0, rows + 16384, 8192):  # one batch more, as held-out rows and pool share none
        yield sample_features(groups, 8192, generator) @ weight


def run_toy(groups: Sequence[int], dim: int, *, seed: int = 0, out: Path | str) -> dict[str, Any]:
    """Train the toy model, find its subspaces, and write ``result.json`` and ``toy.png`` into a folder.

    Args:
        groups: sizes of the feature groups. dim: width of the hidden layer.
        seed: of model, data, start and escapes.
        out: folder, made if missing.

    Returns:
        What ``result.json`` holds: ``groups``, a row per feature group with its best subspace and the share
        of its energy there; ``widths``; ``energy`` [G, S]; the two losses; ``figure``, its path.

    Raises:
        InputError: sizes that make no toy model; a folder that holds something else; no matplotlib.
    """
    from ndm_fast.report.drawing import style
    from ndm_fast.report.figures import draw_toy

    _check(groups, dim)
    with style():  # says now, not after the training, that matplotlib is missing
        folder = _prepared(Path(out))
    model = train_toy_model(groups, dim, seed=seed)
    partition, heldout_loss = find_subspaces(model.weight, groups, seed=seed)
    energy = energy_shares(model.weight, groups, partition)
    figure = folder / "toy.png"
    result = {
        "toy": {"sizes": list(groups), "dim": dim, "seed": seed},
        "groups": _rows(groups, partition, energy),
        "widths": list(partition.widths),
        "energy": energy.tolist(),
        "model_loss": model.loss,
        "heldout_loss": heldout_loss,
        "figure": str(figure),
    }
    write_atomic(folder / "result.json", (json.dumps(result, indent=2) + "\n").encode())
    draw_toy(model.weight, partition.rotate(model.weight), groups, partition.widths, figure)
    return result


def _rows(groups: Sequence[int], partition: SubspacePartition, energy: Tensor) -> list[dict[str, Any]]:
    best = energy.argmax(1).tolist()
    return [
        {
            "group": number,
            "features": size,
            "subspace": subspace,
            "width": partition.widths[subspace],
            "energy_share": float(energy[number, subspace]),
        }
        for number, (size, subspace) in enumerate(zip(groups, best, strict=True))
    ]


def _prepared(folder: Path) -> Path:
    """The folder, there and free for a result of the toy."""
    result = folder / "result.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        other = result.exists() and "toy" not in json.loads(result.read_text())
    except OSError as error:
        raise InputError(f"cannot write into {folder} ({error.strerror}): choose another --out") from None
    except ValueError:
        other = True
    if other or (folder / "config.json").exists():
        raise InputError(f"{folder} holds another run: choose another --out")
    return folder


def _check(groups: Sequence[int], dim: int) -> None:
    if not groups or min(groups) < 2:
        raise InputError(f"groups {list(groups)} must be sizes of at least 2 features: write for instance 20,20")
    if not 2 <= dim < sum(groups):
        raise InputError(
            f"dim is {dim}: give at least 2 and fewer than the {sum(groups)} features, or nothing is superposed"
        )
