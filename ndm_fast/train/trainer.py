"""The loop of NDM, and nothing else: it takes a stream of activations and knows of no model or file."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ndm_fast.activations.pool import ActivationPool, PoolConfig
from ndm_fast.activations.rows import Stream
from ndm_fast.config import MergeConfig, RunSettings, TrainConfig
from ndm_fast.geometry.orthogonal import principal_components, random_rotation
from ndm_fast.partition import SubspacePartition, orthogonality_error
from ndm_fast.ranks import Group
from ndm_fast.seeds import Draw, seeded
from ndm_fast.train import cuda_graph
from ndm_fast.train.escape import Escape, try_escape
from ndm_fast.train.heldout import HeldOut, hold_out
from ndm_fast.train.merge.merger import Merger
from ndm_fast.train.observer import Observer
from ndm_fast.train.rotation.make import make_rotation
from ndm_fast.train.schedule import Schedule
from ndm_fast.train.state import State, restore, state_of
from ndm_fast.train.steps import Steps


class Trainer:
    """Learns a subspace partition of a stream of activations (the loop of docs/method.md).

    The held-out rows are read at once, the pool at the first search.

    Args:
        stream: numbered batches of [n, d] activations, see ``ndm_fast.activations.rows.Stream``.
        train, merge: the mathematics. settings: what is told when, and CUDA graphs.
        device: where pool and rotation live.
        source: what to note in the partition (model, site ...).
        group: the ranks that train together, each with the same stream.

    Raises:
        InputError: the settings do not fit the activations, the memory or the ranks, or the stream is too
            short.
        RanksError: from any method, where another rank is gone.
    """

    def __init__(
        self,
        stream: Stream,
        train: TrainConfig,
        merge: MergeConfig | None = None,
        settings: RunSettings | None = None,
        *,
        device: torch.device | str = "cpu",
        source: dict[str, Any] | None = None,
        group: Group | None = None,
    ) -> None:
        self.config, merge = train, merge or MergeConfig()
        self.settings = settings or RunSettings()
        self.settings.check(train)
        self.schedule = Schedule(train, merge)
        self.device = torch.device(device)
        self.group = group or Group()
        self.group.check(train, self.settings)
        self.step, self.finished = 0, False
        self.train_loss = self.heldout_loss = float("nan")
        self.losses: list[Tensor] = []  # since the last line of the log
        self._source = source or {}
        rows, batches = hold_out(stream, train)
        self.widths = train.widths(rows.shape[1])
        self.pool = ActivationPool(
            stream,
            _pool_config(train, batches, self.device, self._source.get("site", "the stream")),
            self.group.keys,
        )
        self.pool.reserve(rows.shape[1])
        self.heldout = HeldOut(self.pool.stored(rows), train.heldout_queries, self.group, self.scale)
        self.merger = Merger(merge, train, self.heldout.queries, self.pool, self.group)
        self.escape = Escape(train.seed)
        self.go_on_from(_first_rotation(train, self.heldout.rows), self.widths)

    @classmethod
    def resumed(
        cls,
        stream: Stream,
        train: TrainConfig,
        merge: MergeConfig | None = None,
        settings: RunSettings | None = None,
        *,
        state: State,
        device: torch.device | str = "cpu",
        source: dict[str, Any] | None = None,
        group: Group | None = None,
    ) -> Trainer:
        """Go on from a :meth:`state_dict`, with otherwise the same arguments, as if nothing had stopped."""
        trainer = cls(stream, train, merge, settings, device=device, source=source, group=group)
        restore(trainer, state)
        return trainer

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
            self.evaluate(observer)
        while not self.finished:
            first, end = self.schedule.phase(self.step)
            if self.step == first and not self._begin_phase(observer):
                break
            before = self.step
            self.train_block(min(self.config.search_every, end - self.step), observer)
            observer.progress(self)
            if _passed(self.settings.eval_every, before, self.step) or self.step == end:
                self.evaluate(observer, stale_gap=self.config.search_every > 1)
            if self.group.all.any(observer.stop_requested()):
                break
            if _passed(self.settings.checkpoint_every, before, self.step):
                observer.checkpoint(self)
        observer.checkpoint(self)
        return self.partition

    def _begin_phase(self, observer: Observer) -> bool:
        """Do the escape or merge that is due now; return whether to continue."""
        if self.step and self.schedule.is_escape(self.step):
            try_escape(self, observer)
        if self.step >= self.config.max_steps:
            self.finished = True
        elif self.step and self.schedule.is_merge_check(self.step):
            merged = self.merger.merge(self.partition, self.information(), self.step, observer)
            self.finished = merged is None
            if merged is not None:
                self.go_on_from(merged.rotation, merged.widths)
        return not self.finished

    def train_block(self, steps: int, observer: Observer) -> None:
        """One search, then ``steps`` optimiser steps on its neighbors: :meth:`run` calls it.

        Neighbors up to ``steps`` old can only be farther than the true ones: the loss is majorised.
        """
        queries = self.group.queries.share(self.pool.take(steps * self.config.queries))
        keys = self.pool.next_keys()
        if self.config.pace == "ratio":
            self.rotation.pace(self.heldout.deviations(self.rotation.matrix))
        # Neighbors found where the steps begin hold them back.
        ahead, rate = self.config.search_ahead * (steps - 1), self.schedule.learning_rate(self.step)
        index = self.steps.neighbors(queries, keys, self.rotation.ahead(ahead, rate))
        for step, rate, loss in self.take_steps(queries, keys, index):
            self.train_loss = self.steps.shown(loss)
            observer.event({"event": "train", "step": step, "loss": self.train_loss, "lr": rate})
        self._last = queries[-self.steps.batch_size :], keys, index[:, -self.steps.batch_size :]

    def take_steps(self, queries: Tensor, keys: Tensor, index: Tensor) -> list[tuple[int, float, Tensor]]:
        """One optimiser step for every batch of the queries, without waiting for the device.

        Args:
            queries: [m Q, d] of this rank; keys: [K, d]; index: [S, m Q] rows of the keys that are near.

        Returns:
            Step, rate and mean loss so far (on the device), where a line of the log is due.
        """
        steps = range(self.step, self.step + len(queries) // self.steps.batch_size)
        rates = [self.schedule.learning_rate(step) for step in steps]
        losses = self.steps.take_steps(
            queries, keys, index, [self.rotation.next_turn(rate) for rate in rates]
        )
        logged = []
        for rate, loss in zip(rates, losses.unbind(), strict=True):
            self.losses.append(loss)
            self.step += 1
            if self.step % self.settings.log_every == 0:
                logged.append((self.step, rate, torch.stack(self.losses).mean()))
                self.losses.clear()
        return logged

    def evaluate(self, observer: Observer, stale_gap: bool = False) -> Tensor:
        """[S] held-out mean distance per subspace (of logs geometric); the observer is told too."""
        self.group.all.check_same(self.rotation.matrix, f"the rotation at step {self.step}")
        distance = self.heldout_distance()
        self.heldout_loss = self.steps.loss(distance)
        record = {
            "event": "evaluate",
            "step": self.step,
            "heldout_loss": self.heldout_loss,
            "by_subspace": distance.tolist(),
            "widths": list(self.widths),
            "orthogonality_error": orthogonality_error(self.rotation.matrix),
        }
        if stale_gap:
            record["stale_neighbor_gap"] = self.steps.stale_gap(*self._last, self.rotation.matrix)
        observer.event(record)
        return distance

    def heldout_distance(self) -> Tensor:
        """[S] mean distance of the held-out queries to their neighbors among the held-out keys."""
        return self.heldout.distance(self.steps, self.rotation.matrix)

    def information(self) -> Tensor:
        """[S, S] mutual information between the subspaces, in nats."""
        return self.merger.information(self.rotation.matrix, self.widths)

    def go_on_from(self, matrix: Tensor, widths: tuple[int, ...]) -> None:
        """Go on from [d, d] ``matrix`` with a fresh optimiser, and with subspaces of these widths."""
        start = self.group.all.of_first(matrix)
        self.rotation = make_rotation(self.config.rotation, start, self.config.betas)
        self.set_widths(widths)

    def set_widths(self, widths: tuple[int, ...]) -> None:
        """Take further steps on the same rotation for subspaces of these widths."""
        self.widths = widths
        graph = cuda_graph.are_wanted(self.settings, self.config, self.device.type, self.group.all.size)
        self.steps = Steps(self.config, self.group, widths, self.rotation, self.scale, cuda_graph=graph)

    def state_dict(self) -> State:
        """Tensors and plain JSON values from which :meth:`resumed` goes on identically."""
        return state_of(self)


def _pool_config(train: TrainConfig, first_batch: int, device: torch.device, site: str) -> PoolConfig:
    return PoolConfig(
        train.rows_held,
        train.keys,
        dtype=getattr(torch, train.pool_dtype),
        device=device,
        seed=train.seed,
        first_batch=first_batch,
        queries=train.max_steps * train.queries,
        site=site,
    )


def _first_rotation(train: TrainConfig, rows: Tensor) -> Tensor:
    """[d, d] where training of [n, d] rows starts."""
    width = rows.shape[1]
    if train.start == "random":
        return random_rotation(width, seeded(train.seed, Draw.FIRST_ROTATION)).to(rows.device)
    if train.start == "pca":
        return principal_components(rows)
    return torch.eye(width, device=rows.device)


def _passed(every: int, before: int, step: int) -> bool:
    """Whether a multiple of ``every`` lies after the step before, up to this one."""
    return before // every != step // every
