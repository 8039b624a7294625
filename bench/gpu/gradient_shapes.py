"""The gradient of ``check.py`` in every shape: which of them is fastest."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from jobs import Item, Row
from step import make_work
from timing import REPLAYED, Run, graphed, measure


def time_shapes(model: str, device: str, small: bool) -> Iterator[Item]:
    """The gradient in every shape of ``gradient_tuning.CANDIDATES``: its table should follow the fastest."""
    from ndm_fast.kernels import gradient, gradient_tuning

    work = make_work(model, device, small)
    given = (*work.batch(0), work.rotation, work.widths, "euclidean")
    count, d = given[0].shape
    expected = gradient.loss_and_gradient(*given, products="ieee").gradient
    row: Row = {"model": model, "Q": count, "d": d, "width": work.widths[0]}

    def time_shape(products: str, shape: gradient_tuning.Gradient, name: str) -> list[Row]:
        run: Run = partial(gradient.loss_and_gradient, *given, shape=shape, products=products)
        found = gradient.loss_and_gradient(*given, shape=shape, products=products).gradient
        if float((found - expected).abs().max()) > 1e-5 * float(expected.abs().max()):
            return [{**row, "name": name, "failed": "another result"}]
        if device != "cuda":
            return [measure(name, run, 4.0 * count * d * d, 0.0, device, **row)]
        return [measure(name, graphed(run, REPLAYED), 4.0 * count * d * d, 0.0, device, REPLAYED, **row)]

    for products in ("ieee", "fp16x3"):
        for shape in gradient_tuning.CANDIDATES[:1] if small else gradient_tuning.CANDIDATES:
            name = f"gradient {products} {'x'.join(map(str, shape))}"
            yield name, partial(time_shape, products, shape, name)
