"""Every kernel that ``check.py`` launches, compiled ahead of time; no GPU is needed.

    python bench/gpu/launches.py --arch 80 90 [--only check] [--count]

The items of its jobs are not run, which compare numbers, but their searches and gradients are, on tensors
without numbers. What reads a uniform register that nothing has written counts as failed too.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import check
import torch

Run = Callable[[], object]
META = "meta"


def launches(only: str = "") -> Iterator[tuple[str, Run]]:
    """Name of a job, and a call of what it launches."""
    import contracts
    import timing

    named: list[tuple[str, Callable[[], Iterator[Run]]]] = [
        ("check searches", _checks),
        ("check gradients", _gradients),
        ("check others", _others),
        ("check activations", _activations),
        ("check two products", _two_products),
        *((f"time {model} steps", partial(_steps, model)) for model in check.MODELS),
        *(
            (f"{kind} {model} Q{count}", partial(run, model, count))
            for model in check.MODELS
            for count in (4096, 128)
            for kind, run in (("time", _times), ("tune", _sweeps))
        ),
        *((f"tune {model} gradient", partial(_shapes, model)) for model in check.MODELS),
    ]
    assert set(timing.SHAPES) == set(check.MODELS)
    assert contracts.TYPES
    for name, runs in named:
        if only in name:
            for run in runs():
                yield name, run


def _checks() -> Iterator[Run]:
    import contracts

    from ndm_fast.kernels import search

    paths = {name: check.search_of(name) for name in check.SEARCHES if name.startswith("triton")}
    for search_of in (*paths.values(), search.nearest_index):
        for case_name, (queries, keys, widths, metric) in contracts.check_cases(small=False).items():
            for dtype in contracts.TYPES if case_name == "heavy-tailed" else contracts.TYPES[:1]:
                rotation = torch.empty(2 * [sum(widths)], device=META)
                rows = (each.to(META, dtype) for each in (queries, keys))
                yield partial(search_of, *rows, rotation, widths, metric=metric)


def _gradients() -> Iterator[Run]:
    import contracts

    from ndm_fast.kernels.gradient import loss_and_gradient

    for products in contracts.GRADIENT_UNITS:
        for name, (queries, keys, index, widths) in contracts.gradient_cases(small=False).items():
            rotation = torch.empty(2 * [sum(widths)], device=META)
            counted = torch.empty(index.shape, dtype=torch.bool, device=META)
            floor = torch.empty(len(widths), device=META)
            for dtype in contracts.TYPES if name == "merged" else contracts.TYPES[:1]:
                given = (*(x.to(META, dtype) for x in (queries, keys)), index.to(META), rotation, widths)
                for more in ((counted,), (), (None, floor)):
                    yield partial(loss_and_gradient, *given, "euclidean", *more, products=products)


def _activations() -> Iterator[Run]:
    import real

    from ndm_fast.kernels import search

    rows = real.real(small=False).to(META)
    yield partial(search.nearest_index, *rows)
    yield partial(search.nearest_neighbors, *rows, precision="fp32")


def _others() -> Iterator[Run]:
    from ndm_fast.kernels import ksg
    from ndm_fast.kernels.lie_update import lie_update

    queries, keys, rotation = (torch.empty(n, 40, device=META) for n in (130, 3001, 40))
    pairs = torch.empty(3, 2, dtype=torch.int64, device=META)
    given = (queries, keys, rotation, [12, 20, 8], torch.empty(3, device=META), pairs)
    yield partial(ksg.ksg_radius_and_counts, *given)
    for d in (1, 33, 768, 1536, 2304):
        moments = [torch.empty(d, d, device=META) for _ in range(3)]
        for product in (moments[0], moments[0].bfloat16(), None):
            for half in (False, True):
                factors = torch.empty(2, device=META)
                yield partial(lie_update, product, *moments[1:], *factors, (0.9, 0.999), half)


def _times(model: str, count: int) -> Iterator[Run]:
    import timing

    from ndm_fast.kernels import search

    data = timing.Data(model, count, META, small=False)
    given = (data.queries, data.keys, data.rotation, data.widths)
    yield partial(search.nearest_index, *given)
    for name in check.SEARCHES:
        if name.startswith("triton"):
            yield partial(check.search_of(name), *given)


def _sweeps(model: str, count: int) -> Iterator[Run]:
    import timing

    for _, run in timing.sweeps(model, count, META, small=False):
        yield run


def _steps(model: str) -> Iterator[Run]:
    import contracts
    import step

    from ndm_fast.kernels import search
    from ndm_fast.kernels.gradient import loss_and_gradient

    work = step.make_work(model, META, small=False)
    yield partial(search.nearest_index, work.queries, work.keys, work.rotation, work.widths)
    yield partial(step.kernel_steps(work).step, 0)
    for products in contracts.GRADIENT_UNITS:
        yield partial(
            loss_and_gradient, *work.batch(0), work.rotation, work.widths, "euclidean", products=products
        )


def _two_products() -> Iterator[Run]:
    """As timed, with triton's own assembler; the check of mixed widths takes another."""
    import contracts
    import step

    from ndm_fast.kernels.gradient import loss_and_gradient

    work = step.make_work("gemma-2-2b", META, small=False)
    given = (*work.batch(0), work.rotation, work.widths, "euclidean")
    yield partial(loss_and_gradient, *given, products="fp16x3", columns=contracts.TWO_PRODUCTS)


def _shapes(model: str) -> Iterator[Run]:
    import step

    from ndm_fast.kernels import gradient_tuning
    from ndm_fast.kernels.gradient import loss_and_gradient

    work = step.make_work(model, META, small=False)
    given = (*work.batch(0), work.rotation, work.widths, "euclidean")
    for products in ("ieee", "fp16x3"):
        for shape in gradient_tuning.CANDIDATES:
            yield partial(loss_and_gradient, *given, shape=shape, products=products)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--only", default="", help="only jobs whose name has this")
    parser.add_argument("--count", action="store_true", help="do not compile")
    arguments = parser.parse_args()
    check.import_package()
    from ndm_fast.kernels import replay
    from ndm_fast.kernels.resources import disassembled
    from ndm_fast.kernels.uniform import undefined

    failed = 0
    for arch in arguments.arch:
        made: dict[str, tuple[str, replay.Launch]] = {}
        for name, run in launches(arguments.only):
            with replay.recorded(arch) as found:
                run()
            for launch in found:
                made.setdefault(launch.key, (name, launch))
        print(f"sm_{arch}: {len(made)} specialisations", flush=True)
        began = time.monotonic()
        for name, launch in () if arguments.count else made.values():
            try:
                faults = undefined(disassembled(launch.compiled()))
            except Exception as error:
                # What is tried for speed may need more than there is; all else has to compile.
                failed += not name.startswith("tune")
                print(f"sm_{arch} {name} {launch.name} {launch.choices}: {str(error)[:300]}", flush=True)
                continue
            if faults:
                failed += 1
                print(
                    f"sm_{arch} {name} {launch.name} {launch.choices}: nothing has written what it reads: "
                    f"{faults}",
                    flush=True,
                )
        print(f"sm_{arch}: {time.monotonic() - began:.0f} s", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
