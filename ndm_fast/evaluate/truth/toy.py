"""The paper's toy model of superposition taken apart: learn its subspaces, and compare with the truth.

Each group of features has a subspace of its own in the hidden layer (``toy_model.py``). That is what NDM has
to find in ``h = x W`` without being told of groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ndm_fast.config import MergeConfig, RunSettings, TrainConfig
from ndm_fast.errors import InputError
from ndm_fast.evaluate.truth.one_thread import one_thread
from ndm_fast.evaluate.truth.toy_model import check_sizes, sample_features, train_toy_model
from ndm_fast.files import write_json
from ndm_fast.geometry.orthogonal import random_rotation
from ndm_fast.partition import SubspacePartition
from ndm_fast.seeds import Draw, seeded
from ndm_fast.train.merge.mutual_information import mutual_information
from ndm_fast.train.restarts import Trained, best, train_on


@dataclass(frozen=True)
class ToySettings:
    """How the toy's subspaces are looked for."""

    unit: int = 3
    """Width of the subspaces at the start. In 1 or 2 dimensions the points of two groups fill the space as
    densely as those of one, and the loss hardly tells them apart (20,20 -> 12: units of 2 stay mixed)."""
    starts: int = 4
    """Random starts, of which the one of the lowest held-out loss goes on."""
    few_keys: int = 512
    """Before the choice: few keys show the way from afar, where many see a flat loss (16,384 leave
    20,20 -> 12 mixed)."""
    few_tries: int = 5
    """Escapes per pair of units, before the choice."""
    keys: int = 2048
    """After the choice: more keys see the finer structure."""
    tries: int = 2
    """Escapes per pair of units, after the choice."""
    first_steps: int = 300
    """Before the first escape."""
    escape_steps: int = 80
    rate: float = 5e-2
    split_below: float = 0.5
    """Nats between the two parts of a unit. Measured: units of one group 1.1 to 3.2, of two mostly 0.0 to
    0.4."""
    merge_above: float = 0.1
    """MI / (p_a + p_b), nats. Measured: parts of one group 0.36 to 0.93, of two groups 0.00 to 0.09."""
    merge_first: int = 100
    """Step of the first merge."""
    merge_interval: int = 200
    merge_rate: float = 1e-2
    queries: int = 128
    batch: int = 8192
    jitter: float = 1e-3
    """Noise on the activations. Without it a silent group is one point: where two groups are silent at once
    the estimate of information meets exact ties and counts ln N nats, 0.5 too many in the mean."""


_SETTINGS = ToySettings()

_FIGURE = "toy.png"


class GroupRow(NamedTuple):
    """Where a group of features ended."""

    group: int
    features: int
    subspace: int
    """The one that holds most of its energy."""
    width: int
    """Of that subspace."""
    energy_share: float
    """That it holds."""


@dataclass(frozen=True)
class ToyResult:
    """What came of a toy model."""

    toy: dict[str, Any]
    """Sizes of the groups, width of the hidden layer, seed."""
    groups: list[GroupRow]
    widths: list[int]
    """Of the subspaces."""
    energy: list[list[float]]
    """[G, S] share of each group's energy in each subspace."""
    model_loss: float
    heldout_loss: float
    figure: str
    """Its path."""

    def record(self) -> dict[str, Any]:
        """Plain JSON values: what ``result.json`` holds."""
        return {**vars(self), "groups": [row._asdict() for row in self.groups]}


def energy_shares(weight: Tensor, groups: Sequence[int], partition: SubspacePartition) -> Tensor:
    """[G, S] share of each group's energy in each subspace: ``sum |W_i R_s|^2 / sum |W_i|^2``; rows sum to 1.

    Args:
        weight: [n, dim] feature directions. groups: G sizes, sum n.
    """
    by_feature = torch.stack([part.square().sum(1) for part in partition.split(weight.double())], 1)
    energy = torch.stack([part.sum(0) for part in by_feature.split(list(groups))])
    return energy / energy.sum(1, keepdim=True)


def initial_widths(dim: int) -> tuple[int, ...]:
    """Widths of the units at the start: 3 each, the last 2 or the last two 2 where 3 does not divide."""
    if dim <= _SETTINGS.unit:
        return (dim - 1, 1)
    threes, rest = divmod(dim, _SETTINGS.unit)
    return (
        (*(_SETTINGS.unit,) * (threes - 1), 2, 2)
        if rest == 1
        else (*(_SETTINGS.unit,) * threes, *(2,) * (rest == 2))
    )


def find_subspaces(weight: Tensor, groups: Sequence[int], seed: int = 0) -> Trained:
    """NDM on the hidden activations of a toy model, and its held-out loss.

    Narrow units from random starts, with escapes from local minima; then units that hold two groups are split
    (the widths of the groups need not be multiples of the unit), and what shares information is merged.

    Args:
        weight: [n, dim]. groups: sizes of the feature groups; they only make the inputs.
    """
    widths = initial_widths(weight.shape[1])
    pairs = len(widths) * (len(widths) - 1) // 2
    last = (
        _SETTINGS.merge_first + sum(widths) * _SETTINGS.merge_interval
    )  # enough to merge, pair after pair, into one
    activations = _activations(weight, groups, max(last, _steps(_SETTINGS.few_tries * pairs)), seed)
    tried = []
    for number in tqdm(range(_SETTINGS.starts), "starts of NDM", disable=None, leave=False):
        start = SubspacePartition(random_rotation(sum(widths), seeded(seed, Draw.TOY_START, number)), widths)
        tried.append(
            _escape(activations, start, _SETTINGS.few_keys, _SETTINGS.few_tries * pairs, seed + number)
        )
    escaped = _escape(activations, best(tried).partition, _SETTINGS.keys, _SETTINGS.tries * pairs, seed)
    units = split_units(escaped.partition, activations, seeded(seed, Draw.TOY_SPLIT))
    merge = MergeConfig(
        _SETTINGS.merge_above,
        _SETTINGS.merge_first,
        _SETTINGS.merge_interval,
        mi_queries=512,
        mi_keys=_SETTINGS.keys,
    )
    return _train(activations, units, merge, _SETTINGS.keys, last, lr=_SETTINGS.merge_rate, seed=seed)


def _steps(tries: int) -> int:
    return _SETTINGS.first_steps + tries * _SETTINGS.escape_steps


def _escape(activations: Tensor, start: SubspacePartition, keys: int, tries: int, seed: int) -> Trained:
    settings = {
        "escape_tries": tries,
        "escape_steps": _SETTINGS.escape_steps,
        "lr": _SETTINGS.rate,
        "seed": seed,
    }
    return _train(activations, start, MergeConfig(), keys, _steps(tries), **settings)


def split_units(
    partition: SubspacePartition, activations: Tensor, generator: torch.Generator
) -> SubspacePartition:
    """Split every subspace that falls into a line and a rest that share little (``split_below``).

    Args:
        activations: [N, d], N at least 1,280; the first are used.
    """
    waiting = list(partition.rotation.split(list(partition.widths), 1))
    whole = []
    while waiting:
        basis = waiting.pop(0)
        width = basis.shape[1]
        if width > 1:
            frame, information = _least_informed(activations[:1280] @ basis, generator)
            if information < _SETTINGS.split_below:
                waiting[:0] = (basis @ frame).split([width - 1, 1], 1)
                continue
        whole.append(basis)
    whole.sort(key=lambda basis: -basis.shape[1])
    return SubspacePartition(torch.cat(whole, 1), [basis.shape[1] for basis in whole], partition.source)


def _least_informed(rows: Tensor, generator: torch.Generator, tries: int = 150) -> tuple[Tensor, float]:
    """[p, p] rotation of [1280, p] rows whose last axis shares least with the others, and how much, in nats.

    Random rotations first, then ever smaller turns of the best.
    """
    width = rows.shape[1]
    best, least = torch.eye(width), torch.inf
    for number in range(2 * tries):
        frame = random_rotation(width, generator)
        if number >= tries:
            turn = torch.randn(width, width, generator=generator) * 0.5 ** (1 + 5 * (number - tries) / tries)
            frame = best @ torch.linalg.matrix_exp(turn - turn.T)
        shared = mutual_information(rows[:256], rows[256:], frame, (width - 1, 1))
        if float(shared[0, 1]) < least:
            best, least = frame, float(shared[0, 1])
    return best, least


def _train(
    activations: Tensor, start: SubspacePartition, merge: MergeConfig, keys: int, steps: int, **settings: Any
) -> Trained:
    """Train on from a partition, with as many keys in the pool as held out."""
    train = TrainConfig(
        keys=keys,
        queries=_SETTINGS.queries,
        search_every=8,
        max_steps=steps,
        pool_rows=steps * _SETTINGS.queries + keys,  # one filling: every query is a fresh one
        heldout_keys=keys,
        **settings,
    )
    rarely = RunSettings(eval_every=steps, checkpoint_every=steps)
    return train_on(start, activations, train, merge, rarely, batch=_SETTINGS.batch)


def _activations(weight: Tensor, groups: Sequence[int], steps: int, seed: int) -> Tensor:
    """[N, dim] hidden activations, as many as a training of this many steps needs."""
    batches = steps * _SETTINGS.queries // _SETTINGS.batch + 4  # held-out rows and pool share no batch
    generator = seeded(seed, Draw.TOY_ACTIVATIONS)
    hidden = torch.cat([sample_features(groups, _SETTINGS.batch, generator) @ weight for _ in range(batches)])
    return hidden + _SETTINGS.jitter * torch.randn(hidden.shape, generator=generator)


def run_toy(groups: Sequence[int], dim: int, *, seed: int = 0, out: Path | str) -> ToyResult:
    """Train the toy model, find its subspaces, and write ``result.json`` and ``toy.png`` into a folder.

    Args:
        groups: sizes of the feature groups. dim: width of the hidden layer.
        seed: of model, data, start and escapes.
        out: folder, made if missing.

    Raises:
        InputError: sizes that make no toy model; a folder that holds something else; no matplotlib.
    """
    from ndm_fast.drawing import style
    from ndm_fast.evaluate.truth.toy_figure import draw_toy

    check_sizes(groups, dim)
    with style():  # says now, not after the training, that matplotlib is missing
        folder = _prepared(Path(out))
    with one_thread():
        model = train_toy_model(groups, dim, seed=seed)
        partition, heldout_loss = find_subspaces(model.weight, groups, seed=seed)
    energy = energy_shares(model.weight, groups, partition)
    figure = folder / _FIGURE
    result = ToyResult(
        toy={"sizes": list(groups), "dim": dim, "seed": seed},
        groups=_rows(groups, partition, energy),
        widths=list(partition.widths),
        energy=energy.tolist(),
        model_loss=model.loss,
        heldout_loss=heldout_loss,
        figure=str(figure),
    )
    draw_toy(model.weight, partition.rotate(model.weight), groups, partition.widths, figure)
    write_json(folder / "result.json", result.record())
    return result


def _rows(groups: Sequence[int], partition: SubspacePartition, energy: Tensor) -> list[GroupRow]:
    rows = []
    for number, (size, shares) in enumerate(zip(groups, energy, strict=True)):
        best_of = int(shares.argmax())
        rows.append(GroupRow(number, size, best_of, partition.widths[best_of], float(shares.max())))
    return rows


def _prepared(folder: Path) -> Path:
    """The folder, there and free for a result of the toy."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot make the folder {folder} ({error.strerror}): choose another --out"
        ) from None
    foreign = (folder / "result.json").exists() and not (folder / _FIGURE).exists()
    if foreign or (folder / "config.json").exists():
        raise InputError(f"{folder} holds another run: choose another --out")
    return folder
