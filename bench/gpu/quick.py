"""The rows of ``check.py --quick``: what matters most, where a few minutes of a card are left."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from jobs import Item, Row
from timing import REPLAYED, Data, Run, graphed, kernels, measure


def rows(model: str, device: str, small: bool) -> Iterator[Item]:
    """A model's step with reuse, its step that searches every time, its searches and gradient."""
    import every_step
    import step

    from ndm_fast.kernels.gradient import loss_and_gradient

    work = step.make_work(model, device, small)
    (count, d), k = work.queries.shape, len(work.keys)
    shape: Row = {"model": model, "Q": count // step.STEPS, "K": k, "d": d, "width": work.widths[0]}
    yield from list(step.reusing(work, shape, device))[:1]
    yield from list(every_step.items(work, shape, device))[:1]
    name = "gradient, triton, ieee, in a graph"
    run: Run = partial(loss_and_gradient, *work.batch(0), work.rotation, work.widths, "euclidean")
    yield name, lambda: [_measured(name, run, 4.0 * shape["Q"] * d * d, shape, device, REPLAYED)]
    for queries in (128,) if small else (128, 4096):
        yield f"triton index, in a graph, Q{queries}", partial(_search, model, queries, device, small)
    if device == "cuda":
        yield "kernels", lambda: kernels(shape)


def _search(model: str, queries: int, device: str, small: bool) -> list[Row]:
    from ndm_fast.kernels.search import nearest_index

    data = Data(model, queries, device, small)
    (count, d), k = data.queries.shape, len(data.keys)
    run = partial(nearest_index, data.queries, data.keys, data.rotation, data.widths)
    shape = {**data.shape, "scores": count * k * len(data.widths)}
    return [_measured("triton index, in a graph", run, 2.0 * k * d * (d + count), shape, device)]


def _measured(name: str, run: Run, work: float, shape: Row, device: str, times: int = 1) -> Row:
    if device != "cuda":
        return measure(name, run, work, 0.0, device, **shape)
    return measure(name, graphed(run, times), work, 0.0, device, times, **shape)
