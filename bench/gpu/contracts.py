"""The contracts that ``check.py`` holds every GPU path to, against fp64 on fresh random data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from jobs import Item, Row


def rotation_of(width: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(width, width, dtype=torch.float64))[0].float()


def check_cases(small: bool) -> dict[str, tuple[torch.Tensor, torch.Tensor, list[int], str]]:
    """Name -> queries, keys, widths, metric; fresh data at every call. Few widths: each is compiled."""
    q, k = (2, 140) if small else (200, 20_000)

    def normal(rows: int, width: int) -> torch.Tensor:
        return torch.randn(rows, width)

    def heavy(rows: int, width: int) -> torch.Tensor:
        data = torch.randn(rows, width) * torch.exp(torch.randn(rows, 1)) + torch.randn(width)
        data[:, 0] *= 30
        data[::17] *= 20
        return data

    cases = {
        "normal": (normal(q, 96), normal(k, 96), [32] * 3, "euclidean"),
        "heavy-tailed": (heavy(q, 96), heavy(k, 96), [64, 32], "euclidean"),
        "cosine": (heavy(q, 72), heavy(k, 72), [72], "cosine"),
        "odd widths": (normal(q, 67), normal(k - 1, 67), [31, 5, 31], "euclidean"),
        "one query, one key": (normal(1, 36), normal(1, 36), [31, 5], "euclidean"),
        "tile edge": (normal(q, 32), normal(129, 32), [32], "euclidean"),
        "ties": (normal(q, 32), normal(20, 32).repeat(7, 1), [32], "euclidean"),
    }
    offset = normal(k, 96) + 100
    cases["queries among keys, off centre"] = (offset[::7][:q].clone(), offset, [64, 32], "euclidean")
    if not small:
        cases["wide"] = (normal(64, 432), normal(5000, 432), [216, 216], "euclidean")
    return cases


def check(search: Callable, name: str, case: tuple, dtype: torch.dtype, device: str) -> str | None:
    """What is wrong with a search on a case, or None: the contract of docs/method.md."""
    from ndm_fast.geometry import reference

    queries, keys, widths, metric = case
    rotation = rotation_of(sum(widths))
    queries, keys = queries.to(dtype), keys.to(dtype)
    rotated = "rotated" in name
    given = (queries.to(device), keys.to(device), rotation.to(device), widths)
    found = search(*given, metric=metric)
    again = search(*given, metric=metric)
    if not (torch.equal(found.distance, again.distance) and torch.equal(found.index, again.index)):
        return "two runs differ"
    index, distance = found.index.cpu(), found.distance.cpu().double()
    if bool((index < 0).any()) or bool((index >= len(keys)).any()) or bool(distance.isnan().any()):
        return "an output was not written"
    options = {"metric": metric, "keys_rotated": rotated}
    # In fp64 on the card: the oracle, too, has to be quick.
    best = reference.nearest_neighbors(*given, **options).distance.cpu()
    true = reference.distance_to(*given, found.index, **options).cpu()
    floor = 1e-12 if metric == "cosine" else 1e-9 * float(best.max())
    if bool(((distance - true).abs() > 1e-5 * true + floor).any()):
        return f"distance is off by {float(((distance - true).abs() / (true + floor)).max()):.1e}"
    return too_far(true, best, floor, "bf16" not in name)


def too_far(true: torch.Tensor, best: torch.Tensor, floor: float, exact: bool) -> str | None:
    """What is wrong with neighbors at [S, Q] true distances where the nearest are at ``best``, or None."""
    excess = ((true - best) / (best + floor)).clamp_min(0)
    if exact and float(excess.max()) > 2e-6:
        return f"a neighbor is {float(excess.max()):.1e} farther than the nearest"
    if float((excess > 1e-2).double().mean()) > 1e-3 or float(excess.mean()) > 1e-3:
        return (
            f"mean excess {float(excess.mean()):.1e}, {float((excess > 1e-2).double().mean()):.2%} over 1 %"
        )
    return None


def check_index(case: tuple, dtype: torch.dtype, device: str) -> str | None:
    """What is wrong with a search without distances, or None."""
    from ndm_fast.geometry import reference
    from ndm_fast.kernels import search

    queries, keys, widths, metric = case
    rows = (queries.to(dtype), keys.to(dtype), rotation_of(sum(widths)))
    given = (*(each.to(device) for each in rows), widths)
    index, again = (search.nearest_index(*given, metric=metric) for _ in range(2))
    if not torch.equal(index, again):
        return "two runs differ"
    if bool((index < 0).any()) or bool((index >= len(keys)).any()):
        return "an output was not written"
    best = reference.nearest_neighbors(*given, metric=metric).distance.cpu()
    true = reference.distance_to(*given, index, metric=metric).cpu()
    floor = 1e-12 if metric == "cosine" else 1e-9 * float(best.max())
    return too_far(true, best, floor, exact=False)


def check_ksg(device: str, small: bool) -> str | None:
    """What is wrong with the KSG kernels, or None."""
    from ndm_fast.geometry import reference
    from ndm_fast.kernels import ksg

    queries, keys = (torch.randn(n, 40) for n in ((3, 70) if small else (130, 3001)))
    variances, pairs = torch.tensor([12.0, 20.0, 8.0]), torch.tensor([[0, 1], [2, 1], [1, 1]])
    arguments = (queries, keys, rotation_of(40), [12, 20, 8], variances, pairs)
    given = [x.to(device) if isinstance(x, torch.Tensor) else x for x in arguments]
    radius = ksg.ksg_radius(*given)
    counts = ksg.ksg_counts(*given, radius).cpu()
    radius = radius.cpu().double()
    if not torch.allclose(radius, reference.ksg_radius(*arguments), rtol=1e-5, atol=1e-6):
        return "radius"
    low, high = (reference.ksg_counts(*arguments, radius * f) for f in (1 - 1e-5, 1 + 1e-5))
    if not bool(((counts >= low) & (counts <= high)).all()) or bool(counts[2].any()):
        return "counts"
    return None


def check_products(device: str) -> str | None:
    """What is wrong with products in full fp32 where the program has asked for tf32, or None."""
    from ndm_fast.geometry.precision import full_fp32

    left, right = torch.randn(2, 512, 512, device=device)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with full_fp32():
            product = left @ right
        after = torch.get_float32_matmul_precision()
    finally:
        torch.set_float32_matmul_precision(before)
    exact = left.double() @ right.double()
    if float((product - exact).abs().max()) > 1e-5 * float(exact.abs().max()):
        return "products are not in fp32"
    return None if after == "high" else f"the program's choice has become {after}"


GRADIENT_UNITS = {"fp16x3": 1.6e-6, "ieee": 2e-7, "tf32x3": 1.6e-6}
"""By products: what an entry of the gradient may be off by, over what is added up for it."""


def gradient_cases(small: bool) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[int]]]:
    """Name -> queries, keys, index, widths; fresh data at every call."""
    q, k = (5, 40) if small else (128, 20_000)

    def heavy(rows: int, width: int) -> torch.Tensor:
        data = torch.randn(rows, width) * torch.exp(torch.randn(rows, 1))
        data[:, 0] *= 1000
        data[::17] *= 30
        return data.clamp(-6e4, 6e4)  # what fp16 holds

    shapes = {"32": [32] * 3, "64": [64], "72": [72, 72], "merged": [150, 33, 7, 1], "odd": [16, 5]}
    if not small:
        shapes |= {"gpt2": [32] * 24, "gemma-2-2b": [72] * 32, "wide": [768]}
    cases = {}
    for name, widths in shapes.items():
        d = sum(widths)
        cases[name] = (heavy(q - 1, d), heavy(k, d), torch.randint(k, (len(widths), q - 1)), widths)
    keys = heavy(k, 96)
    twins = torch.arange(q).repeat(3, 1)
    twins[:, q // 2 :] += q
    cases["half at distance 0"] = (keys[:q].clone(), keys, twins, [32] * 3)
    return cases


def check_gradient(
    case: tuple, dtype: torch.dtype, products: str, device: str, columns: tuple[int, int] | None = None
) -> str | None:
    """What is wrong with loss and gradient on a case, or None."""
    from ndm_fast.geometry import objective
    from ndm_fast.kernels import gradient

    queries, keys, index, widths = (x.to(device) if isinstance(x, torch.Tensor) else x for x in case)
    queries, keys = queries.to(dtype), keys.to(dtype)
    d = sum(widths)
    rotation = (rotation_of(d) + 0.03 * torch.randn(d, d) / d**0.5).to(device)
    counted = torch.rand(index.shape, device=device) < 0.8
    given = (queries, keys, index, rotation, widths, "euclidean", counted)
    found, again = (gradient.loss_and_gradient(*given, products=products, columns=columns) for _ in range(2))
    if not all(torch.equal(one, two) for one, two in zip(found, again, strict=True)):
        return "two runs differ"
    exact = objective.loss_and_gradient(queries.double(), keys, index, rotation.double(), *given[4:])
    delta = (queries.double() - keys[index].double()) * counted[..., None]
    reach = delta.norm(dim=2)
    parts = rotation.double().split(widths, dim=1)
    distance = torch.stack([(each @ part).norm(dim=1) for each, part in zip(delta, parts, strict=True)])
    # An entry is also off by the direction of its distance, which the rounding of the projection turns.
    slack = torch.where(distance > 0, 1 + reach / distance.clamp_min(1e-30), 0)
    unit = GRADIENT_UNITS[products]
    allowed = unit * (delta.abs() * slack[..., None]).mean(1).T / len(widths)
    allowed = allowed.repeat_interleave(torch.tensor(widths, device=device), dim=1)
    if not bool(((found.gradient - exact.gradient).abs() <= allowed).all()):
        off = float(((found.gradient - exact.gradient).abs() / allowed.clamp_min(1e-30)).max())
        return f"the gradient is off by {off:.1f} times what is allowed"
    if not bool(((found.by_subspace - exact.by_subspace).abs() <= 1.5 * unit * reach.mean(1)).all()):
        return "the loss is off"
    spoilt = queries.clone()
    spoilt[0, 1] = torch.nan
    lost = gradient.loss_and_gradient(spoilt, *given[1:6], products=products, columns=columns)
    if not (bool(lost.by_subspace.isnan().all()) and bool(lost.gradient[1].isnan().all())):
        return "NaN does not stay NaN"
    return None


def check_update(device: str, small: bool) -> str | None:
    """What is wrong with Adam on the Lie algebra, or None."""
    from ndm_fast.kernels import lie_update

    for d in (1, 33, 70) if small else (1, 33, 768, 2304):
        for half in (False, True):
            product, first, second = torch.randn(3, d, d, device=device) * 1e-3
            first, second = first - first.T, (second * second.T) ** 2
            factors = torch.tensor([3e-4, 1e-8], device=device)
            tangent = (product - product.T).double()
            moment = 0.9 * first.double() + 0.1 * tangent
            square = 0.999 * second.double() + 0.001 * tangent**2
            update = lie_update.lie_update(product, first, second, *factors, (0.9, 0.999), half)
            scale, guard = factors.double()
            expected = -scale * first.double() / (second.double().sqrt() + guard)
            if not (torch.equal(update, -update.T) and torch.equal(first, -first.T)):
                return f"d {d}: not skew"
            if not torch.equal(second, second.T):
                return f"d {d}: the second moment is not symmetric"
            # The first moment's two terms may cancel; bf16 has 8 bits, to which the interpreter truncates.
            for name, got, true, relative, absolute in (
                ("the first moment", first, moment, 1e-6, 1e-9),
                ("the second moment", second, square, 1e-6, 0.0),
                ("the update", update, expected, 8e-3 if half else 1e-6, 0.0),
            ):
                if not bool(((got - true).abs() <= relative * true.abs() + absolute).all()):
                    return f"d {d}: {name} is off"
            if lie_update.lie_update(None, first, second, *factors, (0.9, 0.999), half).ne(update).any():
                return f"d {d}: the update of the moments as they are differs"
    return None


TYPES = (torch.float16, torch.float32, torch.bfloat16)


def check_path(name: str, search: Callable, device: str, small: bool) -> Iterator[Item]:
    """A search on every case; all types on one."""
    for case_name, case in check_cases(small).items():
        for dtype in TYPES if case_name == "heavy-tailed" and not small else TYPES[:1]:
            run = partial(check, search, name, case, dtype, device)
            yield case_item(f"{case_name} / {str(dtype)[6:]}", run)


def check_indexes(device: str, small: bool) -> Iterator[Item]:
    """The search without distances on every case."""
    for case_name, case in check_cases(small).items():
        for dtype in TYPES if case_name == "heavy-tailed" and not small else TYPES[:1]:
            yield case_item(f"{case_name} / {str(dtype)[6:]}", partial(check_index, case, dtype, device))


TWO_PRODUCTS = (64, 16)
"""Columns of a block of the gradient in the form that broke on an H200, assembled by ptxas 12.8."""


def check_gradients(what: str, device: str, small: bool) -> Iterator[Item]:
    """Loss and gradient on every case; in two products on those of several widths."""
    products, _, form = what.partition(" ")
    columns = TWO_PRODUCTS if form else None
    for case_name, case in gradient_cases(small).items():
        if columns and case_name not in ("72", "merged", "gemma-2-2b"):
            continue
        for dtype in TYPES if case_name == "merged" else TYPES[:1]:
            run = partial(check_gradient, case, dtype, products, device, columns)
            yield case_item(f"{case_name} / {str(dtype)[6:]}", run)
    if columns:
        return
    yield case_item("logarithms", partial(check_log_gradient, products, device, small))


def check_others(device: str, small: bool) -> Iterator[Item]:
    """What has one case each."""
    yield case_item("fp32 products", partial(check_products, device))
    yield case_item("ksg", partial(check_ksg, device, small))
    yield case_item("lie update", partial(check_update, device, small))


def case_item(name: str, find: Callable[[], str | None]) -> Item:
    def run() -> list[Row]:
        wrong = find()
        return [{"name": name, "failed": f"WRONG: {wrong}"} if wrong else {"name": name, "right": True}]

    return name, run


def check_log_gradient(products: str, device: str, small: bool) -> str | None:
    """What is wrong with loss and gradient of the logarithms, or None."""
    from ndm_fast.geometry import objective
    from ndm_fast.kernels import gradient

    for queries, keys, index, widths in gradient_cases(small).values():
        d = sum(widths)
        rotation = rotation_of(d)
        floor = 0.1 + torch.rand(len(widths))
        given = [x.to(device) for x in (queries.half(), keys.half(), index, rotation)]
        floor = floor.to(device)
        found = gradient.loss_and_gradient(*given, widths, "euclidean", None, floor, products=products)
        exact = objective.loss_and_gradient(
            given[0].double(), *given[1:3], given[3].double(), widths, "euclidean", None, floor.double()
        )
        for name, one, two in zip(("loss", "gradient"), found, exact, strict=True):
            if not float((one - two).abs().max()) <= 2e-5 * float(two.abs().max()):
                return (
                    f"{widths[:4]}: {name} is off by {float((one - two).abs().max() / two.abs().max()):.1e}"
                )
    return None
