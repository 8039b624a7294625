"""Times of ``gpu_check.py``: a whole training step, one search for 32 batches and then a step on each.

The step is that of ``LazyRotation`` at a small rate, written out with torch's kernels and with ours, so that
the two can be compared; the package's own optimisers are timed beside it, with what they call today.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from contracts import GRADIENT_UNITS, rotation_of
from timing import KEYS, SHAPES, Run, measure

if TYPE_CHECKING:
    from ndm_fast.train.rotation.base import Rotation, Turn

STEPS, QUERIES = 32, 128
"""Steps a search, and queries a step."""
LR = 3e-4
BETAS = (0.9, 0.999)
REPLAYED = 20
"""Calls of a single kernel in one CUDA graph, or launches would hide its time."""


class Work(NamedTuple):
    """Data of one shape."""

    queries: torch.Tensor
    keys: torch.Tensor
    rotation: torch.Tensor
    index: torch.Tensor
    widths: list[int]

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and neighbors of one step."""
        size = len(self.queries) // STEPS
        part = slice(step * size, (step + 1) * size)
        return self.queries[part], self.keys, self.index[:, part]


class Steps:
    """A rotation that moves without ``U^2/2``, and is made orthogonal after each search's steps."""

    def __init__(self, work: Work, gradient: Callable, update: Callable) -> None:
        self.work, self.gradient, self.update = work, gradient, update
        self.rotation = work.rotation.clone(memory_format=torch.contiguous_format)
        self.first, self.second = (torch.zeros_like(self.rotation) for _ in range(2))
        self.factors = torch.tensor([LR, 1e-8], device=self.rotation.device)

    def step(self, number: int) -> None:
        """One step; nothing is read back."""
        queries, keys, index = self.work.batch(number)
        given = (queries, keys, index, self.rotation, self.work.widths, "euclidean")
        _, gradient = self.gradient(*given)
        half = self.rotation.bfloat16()
        product = half.T @ gradient.bfloat16()
        update = self.update(product, self.first, self.second, *self.factors, BETAS, True)
        self.rotation.add_(half @ update)

    def block(self) -> None:
        """All steps of a search, and two steps of Newton and Schulz."""
        for number in range(STEPS):
            self.step(number)
        for _ in range(2):
            gram = self.rotation.T @ self.rotation
            self.rotation.copy_(torch.addmm(self.rotation, self.rotation, gram, beta=1.5, alpha=-0.5))


def make_work(model: str, device: str, small: bool) -> Work:
    """Clustered rows, each a centre and noise: gradients that agree from step to step, unlike pure noise."""
    d, width = (48, 16) if small else SHAPES[model]
    count, k = (STEPS * 2, 200) if small else (STEPS * QUERIES, KEYS)
    widths = [width] * (d // width)
    centres = torch.randn(64, d, device=device)
    queries, keys = (
        (centres[torch.randint(64, (n,), device=device)] + 0.3 * torch.randn(n, d, device=device)).half()
        for n in (count, k)
    )
    index = torch.randint(k, (len(widths), count), device=device)
    return Work(queries, keys, rotation_of(d).to(device), index, widths)


def package_block(work: Work, kind: str, graph: bool) -> tuple[Rotation, Run]:
    """One of the package's optimisers, and what takes the steps of a search with it, as ``Trainer`` does."""
    from ndm_fast import ops
    from ndm_fast.train.cuda_graph import GraphedSteps
    from ndm_fast.train.rotation.make import make_rotation

    rotation = make_rotation(kind, work.rotation, BETAS)
    size = len(work.queries) // STEPS

    def steps(
        queries: torch.Tensor, keys: torch.Tensor, index: torch.Tensor, turns: Sequence[Turn]
    ) -> torch.Tensor:
        losses = []
        for number, turn in enumerate(turns):
            part = slice(number * size, (number + 1) * size)
            given = (queries[part], keys, index[:, part], rotation.working, work.widths)
            found = ops.loss_and_gradient(*given)
            rotation.turn(found.gradient, turn)
            losses.append(found.by_subspace.mean())
        return torch.stack(losses)

    taken = GraphedSteps(steps, rotation) if graph else steps
    return rotation, lambda: taken(
        work.queries, work.keys, work.index, [rotation.next_turn(LR) for _ in range(STEPS)]
    )


def apart(work: Work, one: torch.Tensor, two: torch.Tensor) -> float:
    """How far two rotations that began at the same one are apart, over how far the second has come.

    As projections on the subspaces: within one, gradients and so steps are rounding noise.
    """
    first, second, start = (
        torch.stack([part @ part.T for part in rotation.split(work.widths, dim=1)])
        for rotation in (one, two, work.rotation)
    )
    return float((first - second).norm() / (second - start).norm())


def check_steps(device: str, small: bool) -> str | None:
    """What is wrong with a block of steps on our kernels, or None: it must lead where torch's leads."""
    work = make_work("gpt2", device, small)
    ours, theirs = kernel_steps(work), torch_steps(work)
    ours.block()
    theirs.block()
    share = apart(work, ours.rotation, theirs.rotation)
    return None if share < 0.05 else f"ours and torch's are {share:.1%} of the way apart"


def check_graph(device: str, small: bool) -> str | None:
    """What is wrong with the trainer's CUDA graph, or None: it must lead where single launches lead."""
    work = make_work("gpt2", device, small)
    (one, plain), (two, graphed_block) = (package_block(work, "lazy", graph) for graph in (False, True))
    for _ in range(4):  # the first two are of different kinds, and the third captures
        plain()
        graphed_block()
    share = apart(work, two.matrix, one.matrix)
    return None if share < 0.05 else f"with and without are {share:.1%} of the way apart"


def torch_steps(work: Work) -> Steps:
    from ndm_fast.geometry.objective import loss_and_gradient
    from ndm_fast.geometry.reference import lie_update

    return Steps(work, loss_and_gradient, lie_update)


def kernel_steps(work: Work) -> Steps:
    from ndm_fast.kernels.gradient import loss_and_gradient
    from ndm_fast.kernels.lie_update import lie_update

    return Steps(work, loss_and_gradient, lie_update)


def graphed(run: Run, times: int = 1) -> Run:
    """So many calls in one CUDA graph, which is captured at the first."""
    replay: list[Run] = []

    def call() -> None:
        if not replay:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                run()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(times):
                    run()
            replay.append(graph.replay)
        replay[0]()

    return call


def time_parts(work: Work, limits: dict[str, float], device: str, broken: set[str]) -> list[dict]:
    """Gradient and update alone, called from Python, and 20 at a time in a CUDA graph."""
    from ndm_fast.geometry import objective
    from ndm_fast.geometry.reference import lie_update as plain_update
    from ndm_fast.kernels.gradient import loss_and_gradient
    from ndm_fast.kernels.lie_update import lie_update
    from ndm_fast.train.rotation.make import make_rotation

    queries, keys, index = work.batch(0)
    d = queries.shape[1]
    given = (queries, keys, index, work.rotation, work.widths, "euclidean")
    steps = torch_steps(work)
    steps.step(0)
    product = torch.randn_like(steps.rotation)
    moving = (product, steps.first, steps.second, *steps.factors, BETAS)
    published = make_rotation("exp", work.rotation, BETAS)
    gradient = 4.0 * len(queries) * d * d, 2.0 * index.numel() * d + 8.0 * d * d
    whole, half = (0.0, 20.0 * d * d), (0.0, 18.0 * d * d)
    parts: dict[str, tuple[Run, tuple[float, float]]] = {
        "gradient, torch": (partial(objective.loss_and_gradient, *given), gradient),
        "update, torch": (partial(plain_update, *moving, False), whole),
    }
    if "lie update" not in broken:
        parts["update, triton"] = partial(lie_update, *moving, False), whole
        parts["update, triton, bf16"] = partial(lie_update, *moving, True), half
    for products in GRADIENT_UNITS:
        if f"gradient {products}" not in broken:
            run = partial(loss_and_gradient, *given, products=products)
            parts[f"gradient, triton, {products}"] = run, gradient
    rows = [measure(name, run, *cost, limits, device) for name, (run, cost) in parts.items()]
    if device == "cuda":
        for name, (run, cost) in parts.items():
            again = graphed(run, REPLAYED)
            rows.append(measure(f"{name}, in a graph", again, *cost, limits, device, parts=REPLAYED))
    step = partial(published.step, product, LR)
    return [*rows, measure("update, published scheme", step, 0.0, 0.0, limits, device)]


def time_blocks(work: Work, limits: dict[str, float], device: str, broken: set[str]) -> list[dict]:
    """A step with reuse: a 32nd of one search and 32 steps, in several forms."""
    from ndm_fast.kernels.search import nearest_index

    (count, d), k = work.queries.shape, len(work.keys)
    flops = (2.0 * k * d * d + 2.0 * count * k * d) / STEPS + 4.0 * count / STEPS * d * d + 4.0 * d**3
    read = 2.0 * k * d / STEPS

    def search(rotation: torch.Tensor) -> None:
        given = (work.queries, work.keys, rotation, work.widths)
        work.index.copy_(nearest_index(*given))

    def written_out(steps: Steps, block: Run) -> Run:
        def run() -> None:
            search(steps.rotation)
            block()

        return run

    def of_the_package(kind: str, graph: bool = False) -> Run:
        rotation, block = package_block(work, kind, graph)

        def run() -> None:
            search(rotation.matrix)
            block()

        return run

    theirs = torch_steps(work)
    forms = {
        "torch": written_out(theirs, theirs.block),
        "package, lie": of_the_package("lie"),
        "package, lazy": of_the_package("lazy"),
    }
    if "training steps in a graph" not in broken:
        forms["package, lazy, in a graph"] = of_the_package("lazy", graph=True)
    if not broken & {"gradient ieee", "lie update", "training steps"}:
        ours, also = kernel_steps(work), kernel_steps(work)
        forms["triton"] = written_out(ours, ours.block)
        if device == "cuda":
            forms["triton, in a graph"] = written_out(also, graphed(also.block))
    return [
        measure(f"step with reuse, {name}", run, flops, read, limits, device, parts=STEPS)
        for name, run in forms.items()
    ]


def time_steps(
    model: str, limits: dict[str, float], device: str, small: bool, broken: set[str]
) -> list[dict]:
    """Rows of one shape, without what ``broken`` names as wrong."""
    work = make_work(model, device, small)
    (count, d), k = work.queries.shape, len(work.keys)
    shape = {"model": model, "Q": count // STEPS, "K": k, "d": d, "width": work.widths[0]}
    rows = time_parts(work, limits, device, broken)
    if "triton index" not in broken:
        rows += time_blocks(work, limits, device, broken)
    return [{**shape, **row} for row in rows]


def time_shapes(model: str, limits: dict[str, float], device: str, small: bool) -> list[dict]:
    """The gradient in every shape that ``kernels/tuning.py`` names: its table should follow the fastest."""
    from ndm_fast.kernels import gradient, tuning

    work = make_work(model, device, small)
    given = (*work.batch(0), work.rotation, work.widths, "euclidean")
    count, d = given[0].shape
    expected = gradient.loss_and_gradient(*given).gradient
    rows = []
    for shape in tuning.GRADIENT_CANDIDATES[:1] if small else tuning.GRADIENT_CANDIDATES:
        run: Run = partial(gradient.loss_and_gradient, *given, shape=shape)
        name, parts = f"gradient {'x'.join(map(str, shape))}", 1
        found = gradient.loss_and_gradient(*given, shape=shape).gradient
        if float((found - expected).abs().max()) > 1e-5 * float(expected.abs().max()):
            rows.append({"model": model, "Q": count, "name": name, "failed": "another result"})
            continue
        if device == "cuda":
            run, parts = graphed(run, REPLAYED), REPLAYED
        row = measure(name, run, 4.0 * count * d * d, 0.0, limits, device, parts=parts)
        rows.append({"model": model, "Q": count, "d": d, "width": work.widths[0], **row})
    return rows
