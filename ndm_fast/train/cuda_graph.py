"""A search and the steps after it as two CUDA graphs: a launch for a block instead of some thousand.

On an H200 the host needs 1.6 ms for a step of 0.4 ms, and 3 ms for a search of 1.8 ms (GPT-2's shape, Q 128).
On a CPU the same code does the work at every replay, which is how it is tested.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ndm_fast.config import RunSettings, TrainConfig
from ndm_fast.train.rotation.base import Rotation, Turn

TakeSteps = Callable[[Tensor, Tensor, Tensor, Sequence[Turn]], Tensor]
"""Takes queries [m Q, d], keys [K, d], index [S, m Q] and m turns; gives [m] losses."""


Search = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Finds the [S, Q] neighbors of queries [Q, d] among keys [K, d] under a rotation [d, d]."""

_KINDS = 4
"""Graphs of steps kept: lie at small rates has two kinds of blocks, a refilled pool may lie elsewhere."""

_WINDOWS = 8
"""Graphs of searches kept: a pool gives its keys in a few windows, in turn."""


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


class GraphedSearch:
    """Finds neighbors; from the second search of a window of keys on, by replaying a graph of it.

    Args:
        search: the work, without a host sync.
    """

    def __init__(self, search: Search) -> None:
        self._search = search
        self._replays: dict[tuple[object, ...], Callable[[], object] | None] = {}
        self._given: tuple[Tensor, Tensor] | None = None
        self._found: dict[tuple[object, ...], Tensor] = {}
        self._memory: Any = None

    def __call__(self, queries: Tensor, keys: Tensor, rotation: Tensor) -> Tensor:
        """[S, Q] rows of the keys, on the device; overwritten by the next call."""
        if self._given is None:
            self._given = queries.clone(), rotation.clone(memory_format=torch.contiguous_format)
        static_queries, static_rotation = self._given
        kind = (keys.data_ptr(), keys.shape, keys.dtype)
        if queries.shape != static_queries.shape:  # the last block of a phase may be short
            return self._search(queries, keys, rotation)
        if kind not in self._replays:  # a graph must find compiled what it needs
            if len(self._replays) == _WINDOWS:
                gone = next(iter(self._replays))
                self._found.pop(gone, None)
                del self._replays[gone]
            self._replays[kind] = None
            return self._search(queries, keys, rotation)
        static_queries.copy_(queries)
        static_rotation.copy_(rotation)
        replay = self._replays[kind]
        if replay is None:
            replay = self._replays[kind] = self._capture(kind, keys)
        replay()
        return self._found[kind]

    def _capture(self, kind: tuple[object, ...], keys: Tensor) -> Callable[[], object]:
        """The graph of a search among these keys. All share their memory: one runs at a time."""
        assert self._given is not None
        queries, rotation = self._given

        def work() -> None:
            self._found[kind] = self._search(queries, keys, rotation)

        if keys.is_cuda:
            torch.cuda.empty_cache()  # what the search before has held serves the graph
            self._memory = self._memory or torch.cuda.graph_pool_handle()
        return _captured(work, keys.device, self._memory)


def are_wanted(settings: RunSettings, train: TrainConfig, device: str, ranks: int) -> bool:
    """Whether search and steps are replayed as CUDA graphs on a type of device.

    By itself only what has been captured on a card: proposals in bf16 of fp16 rows, by euclidean distance.
    """
    if settings.cuda_graph != "auto":
        return settings.cuda_graph == "on"
    seen = (train.precision, train.pool_dtype, train.metric) == ("bf16", "float16", "euclidean")
    return device == "cuda" and ranks == 1 and train.rotation != "exp" and seen


def _on_host(turns: Sequence[Turn], device: torch.device) -> Tensor:
    """[m, 2] scales and guards, pinned where a GPU is to fetch them."""
    factors = torch.tensor([(turn.scale, turn.guard) for turn in turns])
    return factors.pin_memory() if device.type == "cuda" else factors


def _captured(work: Callable[[], None], device: torch.device, memory: Any = None) -> Callable[[], object]:
    """What does the work again: a graph's replay, or on a CPU the work itself."""
    if device.type != "cuda":
        return work
    graph = torch.cuda.CUDAGraph()
    # Another thread may fill the pool meanwhile, and allocate.
    with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
        work()
    return graph.replay
