"""Times of ``check.py``: a whole training step, one search for 32 batches and then a step on each.

The step is that of ``LazyRotation`` at a small rate, written out with torch's kernels and with ours, so that
the two can be compared; the package's own optimisers are timed beside it, with what they call today.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import every_step
import torch
from contracts import GRADIENT_UNITS, TWO_PRODUCTS
from jobs import Item, Row
from timing import REPLAYED, Data, Run, graphed, kernels, measure, profile

if TYPE_CHECKING:
    from ndm_fast.train.rotation.base import Rotation, Turn

STEPS, QUERIES = 32, 128
"""Steps a search, and queries a step."""
CAPTURED = 5
"""Blocks after which the package's graphs are captured: the first two are of different kinds."""
LR = 3e-4
BETAS = (0.9, 0.999)


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
    """Clustered rows: gradients that agree from step to step, unlike those of pure noise."""
    data = Data(model, STEPS * (2 if small else QUERIES), device, small)
    index = torch.randint(len(data.keys), (len(data.widths), len(data.queries)), device=device)
    return Work(data.queries, data.keys, data.rotation, index, data.widths)


def package_steps(work: Work, kind: str, graph: bool) -> tuple[Rotation, Callable[..., torch.Tensor]]:
    """One of the package's optimisers, and what takes steps with it, as ``Trainer`` does.

    It takes queries, keys, their neighbors and as many turns as there are batches of queries.
    """
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
            found = ops.loss_and_gradient(*given, check_index=False)
            rotation.turn(found.gradient, turn)
            losses.append(found.by_subspace.mean())
        return torch.stack(losses)

    return rotation, GraphedSteps(steps, rotation) if graph else steps


def package_block(work: Work, kind: str, graph: bool) -> tuple[Rotation, Run]:
    """The same for all steps of a search."""
    rotation, taken = package_steps(work, kind, graph)
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


def parts(work: Work, device: str) -> Iterator[tuple[str, Run, float, float]]:
    """Gradient and update alone: name, call, FLOP and bytes."""
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
    gradient = 4.0 * len(queries) * d * d, 2.0 * index.numel() * d + 8.0 * d * d
    for kind in GRADIENT_UNITS:
        yield f"gradient, triton, {kind}", partial(loss_and_gradient, *given, products=kind), *gradient
    if 64 < work.widths[0] <= sum(TWO_PRODUCTS):
        run = partial(loss_and_gradient, *given, products="fp16x3", columns=TWO_PRODUCTS)
        yield "gradient, triton, fp16x3 two products", run, *gradient
    yield "update, triton", partial(lie_update, *moving, False), 0.0, 20.0 * d * d
    yield "update, triton, bf16", partial(lie_update, *moving, True), 0.0, 18.0 * d * d
    yield "gradient, torch", partial(objective.loss_and_gradient, *given), *gradient
    yield "update, torch", partial(plain_update, *moving, False), 0.0, 20.0 * d * d
    published = make_rotation("exp", work.rotation, BETAS)
    yield "update, published scheme", partial(published.step, product, LR), 0.0, 0.0


def blocks(work: Work) -> Iterator[tuple[str, Callable[[], Run]]]:
    """A search and 32 steps on it, in several forms: name, and what makes the call."""
    from ndm_fast.kernels.search import nearest_index

    def search(rotation: torch.Tensor) -> None:
        work.index.copy_(nearest_index(work.queries, work.keys, rotation, work.widths))

    def written_out(steps: Steps, block: Run) -> Run:
        def run() -> None:
            search(steps.rotation)
            block()

        return run

    def of_the_package(kind: str, graph: bool = False) -> Run:
        from ndm_fast.train.cuda_graph import GraphedSearch

        rotation, block = package_block(work, kind, graph)
        find = lambda queries, keys, matrix: nearest_index(queries, keys, matrix, work.widths)  # noqa: E731
        found = GraphedSearch(find) if graph else find

        def run() -> None:
            work.index.copy_(found(work.queries, work.keys, rotation.matrix))
            block()

        return run

    def ours(graph: bool) -> Run:
        steps = kernel_steps(work)
        return written_out(steps, graphed(steps.block) if graph else steps.block)

    yield "package, lazy, in a graph", partial(of_the_package, "lazy", graph=True)
    yield "package, lazy", partial(of_the_package, "lazy")
    yield "package, lie", partial(of_the_package, "lie")
    if work.queries.is_cuda:
        yield "triton, in a graph", partial(ours, True)
    yield "triton", partial(ours, False)

    def plain() -> Run:
        steps = torch_steps(work)
        return written_out(steps, steps.block)

    yield "torch", plain


def reusing(work: Work, shape: Row, device: str) -> Iterator[Item]:
    """A step of the 32 that share a search, in every form: what the package does first."""
    (count, d), k = work.queries.shape, len(work.keys)
    flops = (2.0 * k * d * d + 2.0 * count * k * d) / STEPS + 4.0 * count / STEPS * d * d + 4.0 * d**3
    for name, make in blocks(work):
        label = f"step with reuse, {name}"
        yield (
            label,
            lambda label=label, make=make: [
                measure(label, make(), flops, 2.0 * k * d / STEPS, device, STEPS, warm=CAPTURED, **shape)
            ],
        )


def time_steps(model: str, device: str, small: bool) -> Iterator[Item]:
    """A whole step with reuse first, then one that searches every time, then what they are made of."""
    work = make_work(model, device, small)
    (count, d), k = work.queries.shape, len(work.keys)
    shape: Row = {"model": model, "Q": count // STEPS, "K": k, "d": d, "width": work.widths[0]}
    yield from reusing(work, shape, device)
    yield from every_step.items(work, shape, device)
    for name, run, flop, read in parts(work, device):
        yield name, lambda n=name, r=run, f=flop, b=read: [measure(n, r, f, b, device, **shape)]
        if device == "cuda" and "published" not in name:  # it waits for the host
            label = f"{name}, in a graph"
            yield (
                label,
                lambda n=label, r=run, f=flop, b=read: [
                    measure(n, graphed(r, REPLAYED), f, b, device, REPLAYED, **shape)
                ],
            )
    if device == "cuda":
        yield "kernels", lambda: kernels(shape)
        yield "profile", lambda: profile(next(blocks(work))[1](), shape)
