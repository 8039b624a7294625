"""Gradient and Adam of a training step, compiled, beside the same in torch.

    python bench/ops/step_ops.py [--repeats N] [--out FILE]

128 queries, 16,384 keys, random neighbors. Checked against fp64 before they are timed. FLOP/s of the
gradient as a share of a product's in the same round; bytes/s of Adam for the seven matrices met.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # not the root: its `kernels` hides another

from measuring import result_file, rounds, spread, times_faster, write_results

from ndm_fast import ops
from ndm_fast.geometry import objective, reference
from ndm_fast.table import text_table

SHAPES = ((384, 32), (768, 32), (1536, 64), (2304, 72))
QUERIES, KEYS = 128, 16_384
BETAS, FACTORS = (0.9, 0.999), (1e-3, 1e-8)
PASSES = 7
PRODUCT = 1024


def check_gradient(found: objective.Objective, arguments: tuple[Any, ...]) -> None:
    """Fails where loss or gradient is off from fp64."""
    queries, keys, index, rotation, widths = arguments
    exact = objective.loss_and_gradient(queries, keys, index, rotation.double(), widths, "euclidean")
    torch.testing.assert_close(found.by_subspace.double(), exact.by_subspace, rtol=1e-5, atol=0)
    largest = float(exact.gradient.abs().max())
    torch.testing.assert_close(found.gradient.double(), exact.gradient, rtol=0, atol=1e-5 * largest)


def check_update(product: torch.Tensor) -> None:
    """Fails where the compiled Adam is off from fp64."""
    moments = torch.zeros(2, *product.shape)
    exact = moments.double()
    found = ops.lie_update(product, *moments, *FACTORS, BETAS)
    expected = reference.lie_update(product.double(), *exact, *FACTORS, BETAS)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-9)


def measure(d: int, width: int, repeats: int) -> dict[str, Any]:
    """A row: milliseconds of both, and how many times faster than torch."""
    generator = torch.Generator().manual_seed(d)
    queries, keys = (torch.randn(n, d, generator=generator) for n in (QUERIES, KEYS))
    widths = [width] * (d // width)
    index = torch.randint(KEYS, (len(widths), QUERIES), generator=generator)
    rotation = torch.linalg.qr(torch.randn(d, d, generator=generator))[0]
    product, square = torch.randn(d, d, generator=generator), torch.ones(PRODUCT, PRODUCT)
    arguments = (queries, keys, index, rotation, widths)
    check_gradient(ops.loss_and_gradient(*arguments), arguments)
    check_update(product)
    moments, torch_moments = torch.zeros(2, d, d), torch.zeros(2, d, d)
    times = rounds(
        {
            "gradient": lambda: ops.loss_and_gradient(*arguments),
            "gradient in torch": lambda: objective.loss_and_gradient(*arguments, "euclidean"),
            "adam": lambda: ops.lie_update(product, *moments, *FACTORS, BETAS),
            "adam in torch": lambda: reference.lie_update(product, *torch_moments, *FACTORS, BETAS),
            "product": lambda: square @ square,
        },
        repeats,
    )
    rates = [
        (4 * QUERIES * d**2 / own) / (2 * PRODUCT**3 / other)
        for own, other in zip(times["gradient"], times["product"], strict=True)
    ]
    return {
        "d": d,
        "width": width,
        "gradient_ms": 1e3 * statistics.median(times["gradient"]),
        "gradient_times_torch": times_faster(times, "gradient", "gradient in torch"),
        "gradient_share_of_product": statistics.median(rates),
        "adam_ms": 1e3 * statistics.median(times["adam"]),
        "adam_times_torch": times_faster(times, "adam", "adam in torch"),
        "adam_gb_per_s": PASSES * 4e-9 * d**2 / statistics.median(times["adam"]),
        "spread": {name: spread(values) for name, values in times.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, default=result_file("step-ops"))
    options = parser.parse_args()
    rows = [measure(d, width, options.repeats) for d, width in SHAPES]
    print(text_table([{k: v for k, v in row.items() if k != "spread"} for row in rows]))
    write_results(options.out, rows)


if __name__ == "__main__":
    main()
