"""What surrounds the GPU kernels, on torch's fake CUDA tensors: devices agree, nothing waits for the host.

A kernel is replaced by what looks at its arguments. Needs a torch built for CUDA, but no GPU.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ndm_fast import ops
from ndm_fast.activations import pool as pool_module
from ndm_fast.activations import pool_storage
from ndm_fast.activations.rows import TensorStream
from ndm_fast.config import MergeConfig, RunSettings, TrainConfig
from ndm_fast.geometry.distance_gradient import Form, distance_gradients
from ndm_fast.kernels import gradient, keys, ksg, search
from ndm_fast.ops import backends
from ndm_fast.ranks import Group
from ndm_fast.train import cuda_graph
from ndm_fast.train.cuda_graph import TakeSteps
from ndm_fast.train.rotation.make import make_rotation
from ndm_fast.train.steps import Steps
from ndm_fast.train.trainer import Observer, Trainer

pytestmark = [
    pytest.mark.skipif(not backends.has_triton_installed(), reason="triton is not installed"),
    pytest.mark.skipif(torch.version.cuda is None, reason="torch is built without CUDA"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real one"),
]

GPU = torch.device("cuda", 0)
ROWS = ("keys", "raw_keys", "raw_queries", "rotation", "exact_rotation", "packed", "packed_rest", "minima")
"""Arguments whose columns kernels take to be neighbors."""
DTYPES = {
    **dict.fromkeys(("packed", "packed_rest"), torch.float16),
    **dict.fromkeys(("origin", "scales", "errors", "minima", "sizes", "half_norms"), torch.float32),
    **dict.fromkeys(
        ("exact_rotation", "distances", "radius", "limits", "projected", "squares"), torch.float32
    ),
    **dict.fromkeys(
        ("losses", "gradient", "log_floor", "first", "second", "inverse_variances"), torch.float32
    ),
    **dict.fromkeys(("exact_queries", "best"), torch.float64),
    **dict.fromkeys(("index", "candidates", "pairs", "counts"), torch.int64),
    "pieces": torch.int32,
}
"""What kernels read and write without being told."""
MODULES = ("sweep", "stream", "look", "resolve", "rerank", "ksg", "gradient", "lie_update")


class Kernel:
    """In the place of a Triton kernel: every tensor must be on the GPU, every parameter given once."""

    def __init__(self, name: str, kernel: Any, launches: list[str]) -> None:
        self._name, self._launches = name, launches
        self._signature = inspect.signature(kernel.fn)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert len(grid) <= 3
        assert all(isinstance(size, int) and size > 0 for size in grid)
        assert all(size < 65536 for size in grid[1:])

        def launch(*arguments: object, num_warps: int, **named: object) -> None:
            for option in ("enable_fp_fusion", "num_stages", "maxnreg"):
                named.pop(option, None)
            given = self._signature.bind(*arguments, **named).arguments
            assert set(given) == set(self._signature.parameters)
            for name, value in given.items():
                assert not isinstance(value, Tensor) or value.device == GPU, f"{self._name}: {name}"
                if isinstance(value, Tensor) and value.ndim > 1 and name in ROWS:
                    assert value.stride(-1) == 1 or value.shape[-1] == 1, f"{self._name}: {name}"
                if isinstance(value, Tensor) and name in DTYPES:
                    assert value.dtype == DTYPES[name], f"{self._name}: {name} is {value.dtype}"
                constant = "constexpr" in str(self._signature.parameters[name].annotation)
                assert not (constant and isinstance(value, Tensor)), f"{self._name}: {name}"
            self._launches.append(self._name)

        return launch


class NothingWaits(TorchDispatchMode):
    """Fails on a copy between devices that the host would wait for; fake tensors fail on reading numbers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.__name__.split(".")[0]
        if name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            goes_on = kwargs.get("non_blocking") or (name == "copy_" and args[2:] == (True,))
            assert goes_on or source.device == out.device, f"from {source.device} to {out.device}"
        return out


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the kernels that were launched, on a GPU of compute capability 9.0."""
    import importlib

    made: list[str] = []
    for module_name in MODULES:
        module = importlib.import_module(f"ndm_fast.kernels.{module_name}")
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Kernel(name, getattr(module, name), made))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    for module_name in (*MODULES, "search", "launch"):
        module = importlib.import_module(f"ndm_fast.kernels.{module_name}")
        if hasattr(module, "device_of"):
            monkeypatch.setattr(module, "device_of", lambda tensor: contextlib.nullcontext())
    for module_name in ("nearest", "ksg", "gradient", "lie_update"):
        module = importlib.import_module(f"ndm_fast.ops.{module_name}")  # its op would only say a shape
        for name, op in vars(module).copy().items():
            if isinstance(op, CustomOpDef):
                monkeypatch.setattr(module, name, op._init_fn)
    backends._log_unverified.cache_clear()
    with FakeTensorMode():
        yield made
    for cached in (keys._membership, gradient._pieces, backends._log_unverified):
        cached.cache_clear()


def rows(count: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, width, device=GPU, dtype=dtype)


def twice(run: Callable[[], Any]) -> Any:
    """What it gives: the first call may fill caches, the second must not wait."""
    run()
    with NothingWaits():
        return run()


SEARCHES = {
    "split": {},
    "fused": {"form": "fused"},
    "keys rotated": {"keys_rotated": True},
    "both rotated": {"keys_rotated": True, "queries_rotated": True},
}


@pytest.mark.parametrize("widths", [[72, 72, 31, 5], [32] * 6, [600]], ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("search", SEARCHES)
def test_searches(launches: list[str], search: str, metric: str, precision: str, widths: list[int]) -> None:
    dtype = torch.float16 if precision == "bf16" else torch.float32
    queries, keys, rotation = (
        rows(70, sum(widths), dtype),
        rows(5000, sum(widths), dtype),
        rows(*[sum(widths)] * 2),
    )
    options = {"metric": metric, "precision": precision, **SEARCHES[search]}
    found = twice(lambda: search.nearest_neighbors(queries, keys, rotation, widths, **options))
    assert found.distance.shape == found.index.shape == (len(widths), 70)
    assert found.distance.device == found.index.device == GPU
    reranked = precision == "bf16" and "rotated" not in search
    sweep = "sweep_wide_kernel" if widths == [600] else "sweep_kernel"
    assert set(launches) == {sweep, "resolve_kernel"} | ({"rerank_kernel"} if reranked else set())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_neighbors_without_distances(launches: list[str], metric: str, dtype: torch.dtype) -> None:
    widths = [32, 32, 7]
    queries, keys, rotation = rows(70, 71, dtype), rows(5000, 71, dtype), rows(71, 71)
    index = twice(lambda: search.nearest_index(queries, keys, rotation, widths, metric=metric))
    assert (index.shape, index.dtype, index.device) == ((3, 70), torch.int64, GPU)
    assert ("rerank_kernel" in launches) == (dtype == torch.float16)


def test_ksg(launches: list[str]) -> None:
    widths, pairs = [8, 8, 5], torch.zeros(3, 2, device=GPU, dtype=torch.int64)
    given = (rows(70, 21), rows(500, 21), rows(21, 21), widths, torch.rand(3, device=GPU), pairs)
    radius = twice(lambda: ksg.ksg_radius(*given))
    counts = twice(lambda: ksg.ksg_counts(*given, radius))
    assert (radius.shape, counts.shape) == ((3, 70), (3, 2, 70))
    assert set(launches) == {"distances_kernel", "radius_kernel", "counts_kernel"}


@pytest.mark.parametrize("lr", [1e-4, 1e-1])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("kind", ["lie", "lazy"])
def test_steps(
    launches: list[str], monkeypatch: pytest.MonkeyPatch, kind: str, metric: str, lr: float
) -> None:
    """Of the gradient and Adam, at rates that take other products; from static memory; and a look ahead."""
    widths = [32, 32, 7]
    config = TrainConfig(queries=16, search_every=4, metric=metric, rotation=kind)
    rotation = make_rotation(kind, rows(71, 71), (0.9, 0.999))
    steps = Steps(config, Group(), widths, rotation, 1.0)
    queries, keys = rows(64, 71, torch.float16), rows(500, 71, torch.float16)
    index = torch.zeros(3, 64, device=GPU, dtype=torch.int64)

    def block(take: TakeSteps) -> Tensor:
        return take(queries, keys, index, [rotation.next_turn(lr) for _ in range(4)])

    losses = twice(lambda: block(steps.take_steps))
    assert (losses.shape, losses.device) == ((4,), GPU)
    assert rotation.working.device == GPU
    monkeypatch.setattr(Tensor, "pin_memory", lambda host: host)
    monkeypatch.setattr(cuda_graph, "_captured", lambda work, device, memory=None: work)
    graphed = cuda_graph.GraphedSteps(steps.take_steps, rotation)
    for _ in range(4):  # which blocks are of one kind changes in the first ones
        losses = twice(lambda: block(graphed))
    assert (losses.shape, losses.device) == ((4,), GPU)
    gradient = {"project_kernel", "units_kernel", "gradient_kernel"} if metric == "euclidean" else set()
    assert set(launches) == {"lie_update_kernel"} | gradient
    if kind == "lie":  # lazy makes the matrix orthogonal before, which reads a number
        assert twice(lambda: rotation.ahead(3.0, lr)).device == GPU


def test_factors_on_the_device(launches: list[str]) -> None:
    """As a CUDA graph has them."""
    factors = torch.rand(2, device=GPU)
    first, second = torch.zeros(40, 40, device=GPU), torch.zeros(40, 40, device=GPU)
    update = twice(lambda: ops.lie_update(rows(40, 40), first, second, *factors, (0.9, 0.999)))
    assert update.device == GPU
    assert set(launches) == {"lie_update_kernel"}


def test_ops_that_look_at_no_values_wait_for_nothing(launches: list[str]) -> None:
    """Which a CUDA graph needs; and the gradients of distances."""
    widths, moments = [32, 32, 7], rows(2 * 71, 71).split(71)
    queries, keys, rotation = rows(70, 71), rows(500, 71), rows(71, 71)

    def step() -> Tensor:
        found = ops.nearest_neighbors(queries, keys, rotation, widths, check_finite=False)
        index = ops.nearest_index(queries, keys, rotation, widths)
        objective = ops.loss_and_gradient(queries, keys, index, rotation, widths, check_index=False)
        given = (queries, keys, rotation, widths, found.index[..., None])
        for form in (Form("euclidean", False, False), Form("cosine", True, False)):
            distance_gradients(found.distance[..., None], *given, form, (True, True, True))
        factors = rows(2, 1)[:, 0]
        return ops.lie_update(objective.gradient, *moments, *factors, (0.9, 0.999))

    assert twice(step).device == GPU
    assert {"sweep_kernel", "gradient_kernel", "lie_update_kernel"} <= set(launches)


NUMBERS = {"__float__": 5e-5, "item": 5e-5, "__int__": 1, "__bool__": True}


class NumbersReadBack(TorchFunctionMode):
    """Gives small numbers where the host reads some, which fake tensors do not have."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in NUMBERS:
            return NUMBERS[name]
        if name == "tolist":
            return _nested(args[0].shape)
        return func(*args, **(kwargs or {}))


def _nested(shape: Sequence[int]) -> Any:
    return [_nested(shape[1:]) for _ in range(shape[0])] if shape else 5e-5


@pytest.mark.parametrize("rows_on", ["cpu", GPU], ids=str)
@pytest.mark.parametrize("place", ["device", "host"])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("kind", ["lie", "lazy"])
def test_a_whole_run(
    launches: list[str],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    metric: str,
    place: str,
    rows_on: torch.device | str,
) -> None:
    """Pool and its refills, blocks, evaluations, mutual information, merges, escapes, checkpoints."""
    # Room for one buffer: a second one would be filled by a thread, in a stream of a real GPU.
    free = {"cuda": 200_000 if place == "device" else 0, "cpu": 200_000}
    monkeypatch.setattr(pool_storage, "free_memory", lambda device: free[device.type])
    allocate = pool_storage.allocate
    monkeypatch.setattr(
        pool_module, "allocate", lambda *shape: allocate(*shape[:3], shape[3]._replace(pinned=False))
    )
    train = TrainConfig(
        unit_size=16,
        keys=500,
        queries=16,
        search_every=4,
        max_steps=64,
        start="pca",
        pool_rows=900,
        heldout_queries=100,
        heldout_keys=500,
        pool_dtype="float16",
        precision="bf16",
        rotation=kind,
        metric=metric,
        escape_tries=1,
        escape_steps=8,
    )
    merge = MergeConfig(merge_start=32, merge_interval=16, merge_threshold=0.0)
    settings = RunSettings(eval_every=20, log_every=8)
    seen: list[str] = []

    class Seen(Observer):
        def event(self, record: dict[str, Any]) -> None:
            seen.append(record["event"])

        def checkpoint(self, trainer: Trainer) -> None:
            tensors, _ = trainer.state_dict()
            assert all(tensor.device == GPU for tensor in tensors.values() if tensor.ndim == 2)

    with NumbersReadBack():
        rows = torch.randn(5000, 64, device=rows_on)
        trainer = Trainer(TensorStream(rows.split(500)), train, merge, settings, device=GPU)
        trainer.run(Seen())
    assert trainer.widths == (48, 16)
    assert trainer.rotation.matrix.device == GPU
    assert {"train", "evaluate", "merge", "escape"} <= set(seen)
    assert {"sweep_kernel", "distances_kernel", "lie_update_kernel"} <= set(launches)


def test_sees_a_wait(launches: list[str]) -> None:
    with pytest.raises(AssertionError, match="from cpu to cuda:0"), NothingWaits():
        torch.tensor([1.0, 2.0], device=GPU)
    with pytest.raises(AssertionError, match="from cuda:0 to cpu"), NothingWaits():
        rows(2, 2).cpu()
    with pytest.raises(Exception, match=r"_local_scalar_dense|not linked"):
        float(rows(1, 1))
    index = torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(AssertionError, match="project_kernel: index"):
        gradient.loss_and_gradient(rows(2, 8), rows(5, 8), index, rows(8, 8), [8], "euclidean")
