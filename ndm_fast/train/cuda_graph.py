"""The steps between two searches as one CUDA graph: a launch for a block instead of some forty a step.

**Never run on a GPU yet**: off unless ``cuda_graph`` is set. On a CPU the same code does the work at every
replay, which is how it is tested.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ndm_fast.train.rotation.base import Rotation, Turn

TakeSteps = Callable[[Tensor, Tensor, Tensor, Sequence[Turn]], Tensor]
"""Takes queries [m Q, d], keys [K, d], index [S, m Q] and m turns; gives [m] losses."""


_KINDS = 4
"""Graphs kept: lie at small rates has two kinds of blocks, a refilled pool may lie elsewhere."""


class _Static(NamedTuple):
    """Memory that a graph reads, and where it leaves its results."""

    queries: Tensor
    neighbors: Tensor
    """[S, m Q] rows of the pool."""
    factors: Tensor
    """[m, 2] scale and guard of every step."""
    matrix: Tensor
    """[d, d] before and after."""
    losses: Tensor


class _Graph(NamedTuple):
    static: _Static
    replay: Callable[[], object] | None
    """None after a first block, which has only done the work."""


class GraphedSteps:
    """Takes a block's steps; from the second block of a kind on, by replaying a graph of it.

    Blocks are of one kind where sizes, the pool's memory and what the steps do beside their numbers agree.

    Args:
        steps: the work, without a host sync, on ``rotation``.
        rotation: has ``put``.
    """

    def __init__(self, steps: TakeSteps, rotation: Rotation) -> None:
        self._steps = steps
        self._rotation = rotation
        self._graphs: dict[tuple[object, ...], _Graph] = {}

    def __call__(self, queries: Tensor, keys: Tensor, index: Tensor, turns: Sequence[Turn]) -> Tensor:
        """[m] losses of the steps, on the device."""
        held = keys if keys._base is None else keys._base
        first = (keys.storage_offset() - held.storage_offset()) // keys.stride(0)
        kind = (held.data_ptr(), held.shape, queries.shape, *((t.second_order, t.restore) for t in turns))
        graph = self._graphs.get(kind)
        static = graph.static if graph else self._memory(queries, index, len(turns))
        static.queries.copy_(queries)
        torch.add(index, first, out=static.neighbors)
        static.factors.copy_(_on_host(turns, keys.device), non_blocking=True)
        static.matrix.copy_(self._rotation.working)
        if graph is None:  # a graph must find compiled and allocated what it needs
            self._work(static, held, turns)
            self._keep(kind, _Graph(static, None))
        else:
            replay = graph.replay or _captured(lambda: self._work(static, held, turns), keys.device)
            replay()
            self._graphs[kind] = _Graph(static, replay)
        self._rotation.put(static.matrix.clone())
        return static.losses.clone()

    def _keep(self, kind: tuple[object, ...], graph: _Graph) -> None:
        if len(self._graphs) == _KINDS:
            del self._graphs[next(iter(self._graphs))]
        self._graphs[kind] = graph

    def _memory(self, queries: Tensor, index: Tensor, steps: int) -> _Static:
        matrix = self._rotation.working.clone()
        return _Static(
            queries.clone(), index.clone(), matrix.new_empty(steps, 2), matrix, matrix.new_empty(steps)
        )

    def _work(self, static: _Static, held: Tensor, turns: Sequence[Turn]) -> None:
        """From static memory to static memory."""
        self._rotation.put(static.matrix.clone())
        moved = [
            turn._replace(scale=scale, guard=guard)
            for turn, (scale, guard) in zip(turns, static.factors, strict=True)
        ]
        static.losses.copy_(self._steps(static.queries, held, static.neighbors, moved))
        static.matrix.copy_(self._rotation.working)


def _on_host(turns: Sequence[Turn], device: torch.device) -> Tensor:
    """[m, 2] scales and guards, pinned where a GPU is to fetch them."""
    factors = torch.tensor([(turn.scale, turn.guard) for turn in turns])
    return factors.pin_memory() if device.type == "cuda" else factors


def _captured(work: Callable[[], None], device: torch.device) -> Callable[[], object]:
    """What does the work again: a graph's replay, or on a CPU the work itself."""
    if device.type != "cuda":
        return work
    graph = torch.cuda.CUDAGraph()
    # Another thread may fill the pool meanwhile, and allocate.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work()
    return graph.replay
