"""Times of ``check.py``: a step that searches every time, search and step as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from jobs import Item, Row
from timing import Run, graphed, measure

if TYPE_CHECKING:
    from step import Work


def items(work: Work, shape: Row, device: str) -> Iterator[Item]:
    """A step with a search of its own queries alone, in several forms."""
    count, k, d = shape["Q"], shape["K"], shape["d"]
    flops = 2.0 * k * d * d + 2.0 * count * k * d + 4.0 * count * d * d + 4.0 * d**3
    for name, make in forms(work):
        label = f"step searching every time, {name}"
        yield (
            label,
            lambda label=label, make=make: [
                measure(label, make(), flops, 2.0 * k * d, device, warm=WARM, **shape)
            ],
        )


WARM = 12
"""Steps after which the package's graphs are captured: the first eight are of another kind."""


def forms(work: Work) -> Iterator[tuple[str, Callable[[], Run]]]:
    """Name, and what makes the call: as training does with ``search_every 1``, and written out."""
    if work.queries.is_cuda:
        yield "in one graph", lambda: graphed(written_out(work))
    yield "package, lazy, in two graphs", lambda: of_the_package(work)
    yield "triton", lambda: written_out(work)


def written_out(work: Work) -> Run:
    """Search and step with our kernels, without a wait for the host: it can be captured whole."""
    import step

    from ndm_fast.kernels.search import nearest_index

    steps = step.kernel_steps(work)
    queries = work.batch(0)[0]

    def run() -> None:
        # The step reads the neighbors of its queries, which are the first of all.
        found = nearest_index(queries, work.keys, steps.rotation, work.widths)
        work.index[:, : len(queries)].copy_(found)
        steps.step(0)

    return run


def of_the_package(work: Work) -> Run:
    """As ``Trainer`` takes steps with a search each: a graph of the search, and one of the step."""
    import step

    from ndm_fast.kernels.search import nearest_index
    from ndm_fast.train.cuda_graph import GraphedSearch

    queries, keys, _ = work.batch(0)
    rotation, take = step.package_steps(work, "lazy", graph=True)
    search = GraphedSearch(lambda queries, keys, matrix: nearest_index(queries, keys, matrix, work.widths))

    def run() -> None:
        index = search(queries, keys, rotation.ahead(0, step.LR))
        take(queries, keys, index, [rotation.next_turn(step.LR)])

    return run
