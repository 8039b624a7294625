"""The paper's toy model of superposition taken apart: learn its subspaces, and compare with the truth.

Each group of features has a subspace of its own in the hidden layer (``toy_model.py``). That is what NDM has
to find in ``h = x W`` without being told of groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ndm_fast.config import MergeConfig, TrainConfig
from ndm_fast.errors import InputError
from ndm_fast.evaluate.truth.toy_model import check_sizes, sample_features, train_toy_model
from ndm_fast.files import write_json
from ndm_fast.geometry.orthogonal import random_rotation
from ndm_fast.partition import SubspacePartition
from ndm_fast.seeds import seeded
from ndm_fast.train.merge.mutual_information import mutual_information
from ndm_fast.train.restarts import Trained, best, train_on

_UNIT = 3
"""Width of the subspaces at the start. In 1 or 2 dimensions the points of two groups fill the space as
densely as those of one, and the loss hardly tells them apart (20,20 -> 12: units of 2 stay mixed)."""

_STARTS, _FEW_KEYS, _FEW_TRIES, _KEYS, _TRIES = 4, 512, 5, 2048, 2
"""Random starts, of which the one of the lowest held-out loss goes on; keys, and escapes per pair of units,
before and after the choice. Few keys show the way from afar, where many see a flat loss (16,384 leave
20,20 -> 12 mixed); more keys then see the finer structure."""

_FIRST_STEPS, _ESCAPE_STEPS, _RATE = 300, 80, 5e-2


_MERGE_FIRST, _MERGE_INTERVAL, _MERGE_RATE = 100, 200, 1e-2

_SPLIT_BELOW = 0.5
"""Nats between the two parts of a unit. Measured: units of one group 1.1 to 3.2, of two mostly 0.0 to 0.4."""

_MERGE_ABOVE = 0.1
"""MI / (p_a + p_b), nats. Measured: parts of one group 0.36 to 0.93, of two groups 0.00 to 0.09."""

_QUERIES, _BATCH, _FIGURE = 128, 8192, "toy.png"

_JITTER = 1e-3
"""Noise on the activations. Without it a silent group is one point: where two groups are silent at once
the estimate of information meets exact ties and counts ln N nats, 0.5 too many in the mean."""

_ACTIVATIONS, _START, _SPLIT = range(12, 15)
"""What the random numbers are for."""


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
    if dim <= _UNIT:
        return (dim - 1, 1)
    threes, rest = divmod(dim, _UNIT)
    return (*(_UNIT,) * (threes - 1), 2, 2) if rest == 1 else (*(_UNIT,) * threes, *(2,) * (rest == 2))


def find_subspaces(weight: Tensor, groups: Sequence[int], seed: int = 0) -> Trained:
    """NDM on the hidden activations of a toy model, and its held-out loss.

    Narrow units from random starts, with escapes from local minima; then units that hold two groups are split
    (the widths of the groups need not be multiples of the unit), and what shares information is merged.

    Args:
        weight: [n, dim]. groups: sizes of the feature groups; they only make the inputs.
    """
    widths = initial_widths(weight.shape[1])
    pairs = len(widths) * (len(widths) - 1) // 2
    last = _MERGE_FIRST + sum(widths) * _MERGE_INTERVAL  # enough to merge, pair after pair, into one
    activations = _activations(weight, groups, max(last, _steps(_FEW_TRIES * pairs)), seed)
    tried = []
    for number in tqdm(range(_STARTS), "starts of NDM", disable=None, leave=False):
        start = SubspacePartition(random_rotation(sum(widths), seeded(seed, _START, number)), widths)
        tried.append(_escape(activations, start, _FEW_KEYS, _FEW_TRIES * pairs, seed + number))
    escaped = _escape(activations, best(tried).partition, _KEYS, _TRIES * pairs, seed)
    units = split_units(escaped.partition, activations, seeded(seed, _SPLIT))
    merge = MergeConfig(_MERGE_ABOVE, _MERGE_FIRST, _MERGE_INTERVAL, mi_queries=512, mi_keys=_KEYS)
    return _train(activations, units, merge, _KEYS, last, lr=_MERGE_RATE, seed=seed)


def _steps(tries: int) -> int:
    return _FIRST_STEPS + tries * _ESCAPE_STEPS


def _escape(activations: Tensor, start: SubspacePartition, keys: int, tries: int, seed: int) -> Trained:
    settings = {"escape_tries": tries, "escape_steps": _ESCAPE_STEPS, "lr": _RATE, "seed": seed}
    return _train(activations, start, MergeConfig(), keys, _steps(tries), **settings)


def split_units(
    partition: SubspacePartition, activations: Tensor, generator: torch.Generator, limit: float = _SPLIT_BELOW
) -> SubspacePartition:
    """Split every subspace that falls into a line and a rest that share less than ``limit`` nats.

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
            if information < limit:
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
        queries=_QUERIES,
        search_every=8,
        max_steps=steps,
        pool_rows=steps * _QUERIES + keys,  # one filling: every query is a fresh one
        heldout_keys=keys,
        eval_every=steps,
        checkpoint_every=steps,
        **settings,
    )
    return train_on(start, activations, train, merge, batch=_BATCH)


def _activations(weight: Tensor, groups: Sequence[int], steps: int, seed: int) -> Tensor:
    """[N, dim] hidden activations, as many as a training of this many steps needs."""
    batches = steps * _QUERIES // _BATCH + 4  # held-out rows and pool share no batch
    generator = seeded(seed, _ACTIVATIONS)
    hidden = torch.cat([sample_features(groups, _BATCH, generator) @ weight for _ in range(batches)])
    return hidden + _JITTER * torch.randn(hidden.shape, generator=generator)


def run_toy(groups: Sequence[int], dim: int, *, seed: int = 0, out: Path | str) -> dict[str, Any]:
    """Train the toy model, find its subspaces, and write ``result.json`` and ``toy.png`` into a folder.

    Args:
        groups: sizes of the feature groups. dim: width of the hidden layer.
        seed: of model, data, start and escapes.
        out: folder, made if missing.

    Returns:
        What ``result.json`` holds: ``groups``, a row each with its best subspace and share of energy there;
        ``widths``; ``energy`` [G, S]; losses of model and subspaces; ``figure``, its path.

    Raises:
        InputError: sizes that make no toy model; a folder that holds something else; no matplotlib.
    """
    from ndm_fast.drawing import style
    from ndm_fast.evaluate.truth.toy_figure import draw_toy

    check_sizes(groups, dim)
    with style():  # says now, not after the training, that matplotlib is missing
        folder = _prepared(Path(out))
    with _one_thread():
        model = train_toy_model(groups, dim, seed=seed)
        partition, heldout_loss = find_subspaces(model.weight, groups, seed=seed)
    energy = energy_shares(model.weight, groups, partition)
    figure = folder / _FIGURE
    result = {
        "toy": {"sizes": list(groups), "dim": dim, "seed": seed},
        "groups": _rows(groups, partition, energy),
        "widths": list(partition.widths),
        "energy": energy.tolist(),
        "model_loss": model.loss,
        "heldout_loss": heldout_loss,
        "figure": str(figure),
    }
    draw_toy(model.weight, partition.rotate(model.weight), groups, partition.widths, figure)
    write_json(folder / "result.json", result)
    return result


@contextmanager
def _one_thread() -> Iterator[None]:
    """Matrices this small gain nothing from a second thread, and lose much to waiting on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _rows(groups: Sequence[int], partition: SubspacePartition, energy: Tensor) -> list[dict[str, Any]]:
    return [
        {
            "group": number,
            "features": size,
            "subspace": int(shares.argmax()),
            "width": partition.widths[int(shares.argmax())],
            "energy_share": float(shares.max()),
        }
        for number, (size, shares) in enumerate(zip(groups, energy, strict=True))
    ]


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
