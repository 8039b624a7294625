"""The loop of NDM, and nothing else: it takes a stream of activations and knows of no model or file."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ndm_fast.activations.pool import ActivationPool
from ndm_fast.activations.rows import Stream, take_rows
from ndm_fast.config import MergeConfig, TrainConfig
from ndm_fast.geometry.orthogonal import principal_components, random_rotation
from ndm_fast.partition import SubspacePartition, orthogonality_error
from ndm_fast.ranks import Group
from ndm_fast.seeds import seeded
from ndm_fast.train.cuda_graph import GraphedSteps, TakeSteps
from ndm_fast.train.escape import Escape
from ndm_fast.train.merge.mutual_information import mutual_information, subspace_variances
from ndm_fast.train.merge.pairs import choose_pairs, merge_scores
from ndm_fast.train.merge.tree import merge_tree
from ndm_fast.train.rotation.make import make_rotation
from ndm_fast.train.schedule import Schedule
from ndm_fast.train.steps import Steps


class Observer:
    """What a trainer tells while it runs; override what is of interest."""

    def event(self, record: dict[str, Any]) -> None:
        """A line for the log: plain JSON values, ``record["event"]`` says of what kind."""

    def progress(self, trainer: Trainer) -> None:
        """Some steps were taken."""

    def checkpoint(self, trainer: Trainer) -> None:
        """A good moment to save ``trainer.state_dict()``."""

    def stop_requested(self) -> bool:
        """Whether to stop now; the trainer calls :meth:`checkpoint` first."""
        return False


class Trainer:
    """Learns a subspace partition of a stream of activations.

    Args:
        stream: numbered batches of [n, d] activations, see ``ndm_fast.activations.rows.Stream``.
        train, merge: settings.
        device: where pool and rotation live.
        source: what to note in the partition (model, site ...).
        state: tensors and plain values of :meth:`state_dict`, to go on from.
        group: the ranks that train together, each with the same stream and the same state.

    Raises:
        InputError: the settings do not fit the activations or the ranks, or the stream is too short.
        RanksError: from any method, where another rank is gone.
    """

    def __init__(
        self,
        stream: Stream,
        train: TrainConfig,
        merge: MergeConfig | None = None,
        *,
        device: torch.device | str = "cpu",
        source: dict[str, Any] | None = None,
        state: tuple[dict[str, Tensor], dict[str, Any]] | None = None,
        group: Group | None = None,
    ) -> None:
        self.config = train
        self.merge_config = merge or MergeConfig()
        self.schedule = Schedule(train, self.merge_config)
        self.device = torch.device(device)
        self.group = group or Group()
        self.group.check(train)
        self.step = 0
        self.finished = False
        self.train_loss = self.heldout_loss = float("nan")
        threshold = self.merge_config.merge_threshold
        self.merge_threshold = None if isinstance(threshold, str) else threshold
        self._source = source
        tensors, values = state or ({}, {})
        heldout, heldout_batches = self._hold_out(stream)
        self.widths = train.widths(heldout.shape[1])
        self.pool = ActivationPool(
            stream,
            min(train.pool_rows, train.max_steps * train.queries + train.keys),
            train.keys,
            dtype=getattr(torch, train.pool_dtype),
            device=device,
            seed=train.seed,
            first_batch=heldout_batches,
            state=values.get("pool"),
            site=(source or {}).get("site", "the stream"),
            queries=(train.max_steps - values.get("step", 0)) * train.queries,
            ranks=self.group.keys,
        )
        self._heldout = self.pool.stored(heldout)
        self._escape = Escape(train.seed)
        self._losses: list[Tensor] = []
        if state:
            self._load(tensors, values)
        else:
            self._reset_rotation(self._first_rotation())

    @property
    def scale(self) -> float:
        """Stored activations, and distances between them, over the true ones."""
        assert self.pool.scale is not None
        return self.pool.scale

    @property
    def partition(self) -> SubspacePartition:
        """The partition as it is now."""
        return SubspacePartition(self.rotation.matrix, self.widths, self._source)

    def run(self, observer: Observer | None = None) -> SubspacePartition:
        """Train until no pair merges any more, or ``max_steps``.

        Stops early, with ``finished`` false, where the observer asks for it.
        """
        observer = observer or Observer()
        if self.step == 0:
            self._evaluate(observer)
        while not self.finished:
            first, end = self.schedule.phase(self.step)
            if self.step == first and not self._begin_phase(observer):
                break
            before = self.step
            self.train_block(min(self.config.search_every, end - self.step), observer)
            observer.progress(self)
            if self._crossed(before, self.config.eval_every) or self.step == end:
                self._evaluate(observer, stale_gap=self.config.search_every > 1)
            if self.group.all.any(observer.stop_requested()):
                break
            if self._crossed(before, self.config.checkpoint_every):
                observer.checkpoint(self)
        observer.checkpoint(self)
        return self.partition

    def _begin_phase(self, observer: Observer) -> bool:
        """What is due between two phases; whether training goes on."""
        if self.step and self.schedule.is_escape(self.step):
            self._try_escape(observer)
        if self.step >= self.config.max_steps:
            self.finished = True
        elif self.step and self.schedule.is_merge_check(self.step):
            self.finished = not self._merge(observer)
        return not self.finished

    def train_block(self, steps: int, observer: Observer) -> None:
        """One search, then ``steps`` optimiser steps on its neighbors: :meth:`run` calls it.

        Neighbors up to ``steps`` old can only be farther than the true ones: the loss is majorised.
        """
        queries = self.group.queries.share(self.pool.take(steps * self.config.queries))
        keys = self.pool.next_keys()
        index = self.steps.neighbors(queries, keys, self._rotation_ahead(steps))
        for step, rate, loss in self.take_steps(queries, keys, index):
            self.train_loss = float(loss) / self._unit
            observer.event({"event": "train", "step": step, "loss": self.train_loss, "lr": rate})
        size = self.steps.batch_size
        self._last = queries[-size:], keys, index[:, -size:]

    def take_steps(self, queries: Tensor, keys: Tensor, index: Tensor) -> list[tuple[int, float, Tensor]]:
        """One optimiser step for every batch of the queries, without waiting for the device.

        Args:
            queries: [m Q, d] of this rank; keys: [K, d]; index: [S, m Q] rows of the keys that are near.

        Returns:
            Step, rate and mean loss so far (on the device), where a line of the log is due.
        """
        steps = range(self.step, self.step + len(queries) // self.steps.batch_size)
        rates = [self.schedule.learning_rate(step) for step in steps]
        losses = self._take(queries, keys, index, [self.rotation.next_turn(rate) for rate in rates])
        logged = []
        for rate, loss in zip(rates, losses.unbind(), strict=True):
            self._losses.append(loss)
            self.step += 1
            if self.step % self.config.log_every == 0:
                logged.append((self.step, rate, torch.stack(self._losses).mean()))
                self._losses.clear()
        return logged

    def _rotation_ahead(self, steps: int) -> Tensor:
        """[d, d] where to search for the next steps: neighbors found where they begin hold them back."""
        rate = self.schedule.learning_rate(self.step)
        return self.rotation.ahead(self.config.search_ahead * (steps - 1), rate)

    def _evaluate(self, observer: Observer, stale_gap: bool = False) -> Tensor:
        """[S] held-out mean distance per subspace."""
        self.group.all.check_same(self.rotation.matrix, f"the rotation at step {self.step}")
        distance = self.heldout_distance()
        self.heldout_loss = self._weighted(distance)
        record = {
            "event": "evaluate",
            "step": self.step,
            "heldout_loss": self.heldout_loss,
            "by_subspace": distance.tolist(),
            "widths": list(self.widths),
            "orthogonality_error": orthogonality_error(self.rotation.matrix),
        }
        if stale_gap:
            record["stale_neighbor_gap"] = self._stale_gap()
        observer.event(record)
        return distance

    def heldout_distance(self) -> Tensor:
        """[S] mean distance of the held-out queries to their neighbors among the held-out keys."""
        cut = self.config.heldout_queries
        queries = self.group.queries.share(self._heldout[:cut])
        keys = self.group.keys.share(self._heldout[cut:])
        total = self.group.queries.sum(self.steps.search(queries, keys, self.rotation.matrix).distance.sum(1))
        return total / cut / self._unit

    def heldout_variances(self) -> Tensor:
        """[S] fp64 variance of the held-out activations in each subspace."""
        return subspace_variances(self._heldout, self.rotation.matrix, self.widths) / self.scale**2

    def _stale_gap(self) -> float:
        """How much farther than the true neighbors the last batch's are, relative to the loss."""
        queries, keys, index = self._last
        stale = self.steps.objective(queries, keys, index, self.rotation.matrix).by_subspace
        total = self.group.queries.sum(self.steps.search(queries, keys, self.rotation.matrix).distance.sum(1))
        fresh = total / self.config.queries
        return self._weighted(stale) / max(self._weighted(fresh), torch.finfo(torch.float32).tiny) - 1

    def _merge(self, observer: Observer) -> bool:
        """Merge the pairs that share much information; whether there were any."""
        information = self._information()
        scores = merge_scores(information, self.widths)
        if self.merge_threshold is None:
            self.merge_threshold = self._auto_threshold(observer)
        pairs = choose_pairs(
            scores, self.merge_threshold, target_subspaces=self.merge_config.target_subspaces
        )
        before = self.widths
        if pairs:
            merged = self.partition.merge(pairs)
            self.widths = merged.widths
            self._reset_rotation(merged.rotation)
        observer.event(
            {
                "event": "merge",
                "step": self.step,
                "mutual_information": information.tolist(),
                "pairs": pairs,
                "threshold": _finite(self.merge_threshold),
                "widths_before": list(before),
                "widths": list(self.widths),
            }
        )
        return bool(pairs)

    def _auto_threshold(self, observer: Observer) -> float:
        """Found once, at the first check: after merging, what is left would show a widest gap again."""
        queries, keys = self._information_rows()
        keys = self.group.keys.gather(keys, 0, self._information_keys)  # shuffled as a whole
        tree = merge_tree(queries, keys, self.rotation.matrix, self.widths, seeded(self.config.seed, 5))
        observer.event(
            {
                "event": "merge_tree",
                "step": self.step,
                "heights": tree.heights,
                "noise": tree.noise,
                "threshold": _finite(tree.threshold),
            }
        )
        return tree.threshold

    def _try_escape(self, observer: Observer) -> None:
        """Keep or undo the last re-initialisation of a pair, then begin another one."""
        if self._escape.pending:
            matrix, self.heldout_loss, verdict = self._escape.judge(self.rotation.matrix, self.heldout_loss)
            observer.event({"event": "escape", "step": self.step, **verdict})
            self._reset_rotation(matrix)
        if self._escape.tried < self.config.escape_tries and len(self.widths) > 1:
            losses = self._evaluate(observer)
            self._reset_rotation(
                self._escape.propose(
                    self.rotation.matrix, self.widths, self.heldout_loss, losses, self._information()
                )
            )

    def _information(self) -> Tensor:
        """[S, S] mutual information between subspaces; decisions hang on it, so all ranks have rank 0's."""
        queries, keys = self._information_rows()
        found = mutual_information(queries, keys, self.rotation.matrix, self.widths, group=self.group)
        return self.group.all.of_first(found)

    def _information_rows(self) -> tuple[Tensor, Tensor]:
        """Held-out queries, and keys of the pool that are held here."""
        queries = self._heldout[: min(self.merge_config.mi_queries, self.config.heldout_queries)]
        return queries, self.pool.peek_keys()[self.group.keys.local(0, self._information_keys)]

    @property
    def _information_keys(self) -> int:
        return min(self.merge_config.mi_keys, self.config.keys)

    def _hold_out(self, stream: Stream) -> tuple[Tensor, int]:
        """The first rows of the stream, shuffled, never trained on; and the batch that comes after them."""
        rows, batches = take_rows(stream.batches(), self.config.heldout_queries + self.config.heldout_keys)
        return rows[torch.randperm(len(rows), generator=seeded(self.config.seed, 0))], batches

    def _first_rotation(self) -> Tensor:
        width = sum(self.widths)
        if self.config.start == "random":
            return random_rotation(width, seeded(self.config.seed, 3)).to(self.device)
        if self.config.start == "pca":
            return principal_components(self._heldout)
        return torch.eye(width, device=self.device)

    def _reset_rotation(self, matrix: Tensor) -> None:
        start = self.group.all.of_first(matrix)
        self.rotation = make_rotation(self.config.rotation, start, self.config.betas)
        self.steps = Steps(self.config, self.group, self.widths, self.rotation, self.scale)
        self._take: TakeSteps = self.steps.take
        if self.config.cuda_graph:
            self._take = GraphedSteps(self.steps.take, self.rotation)

    def _weighted(self, by_subspace: Tensor) -> float:
        """The loss from means per subspace."""
        return float(self.steps.weights @ by_subspace.float())

    @property
    def _unit(self) -> float:
        """Stored distances over true ones; a cosine has no scale."""
        return 1.0 if self.config.metric == "cosine" else self.scale

    def _crossed(self, before: int, every: int) -> bool:
        return before // every != self.step // every

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain JSON values from which training goes on identically."""
        escape_tensors, escape_values = self._escape.state_dict()
        tensors = {f"rotation.{name}": value for name, value in self.rotation.state_dict().items()}
        tensors |= {f"escape.{name}": value for name, value in escape_tensors.items()}
        values = {
            "step": self.step,
            "finished": self.finished,
            "widths": list(self.widths),
            "merge_threshold": self.merge_threshold,
            "train_loss": self.train_loss,
            "heldout_loss": self.heldout_loss,
            "losses": [float(loss) for loss in self._losses],
            "pool": self.pool.state_dict(),
            "escape": escape_values,
        }
        return tensors, values

    def _load(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        def part(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        self.step, self.finished = values["step"], values["finished"]
        self.widths = tuple(values["widths"])
        self.merge_threshold = values["merge_threshold"]
        self.train_loss, self.heldout_loss = values["train_loss"], values["heldout_loss"]
        self._losses = [torch.tensor(loss, device=self.device) for loss in values["losses"]]
        self._reset_rotation(torch.eye(sum(self.widths), device=self.device))
        self.rotation.load_state_dict(part("rotation."))
        self._escape.load_state_dict(part("escape."), values["escape"])


def _finite(number: float) -> float | None:
    """For JSON, which knows no infinity."""
    return number if math.isfinite(number) else None
