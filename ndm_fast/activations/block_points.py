"""The named points inside one kind of block, from the sums that hold in a run and under replacement."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ndm_fast.activations.blocks import Block, Point
from ndm_fast.activations.site import Site
from ndm_fast.activations.site_hooks import register
from ndm_fast.activations.trace import BlockTrace, Record, Run, record_block

SEQUENTIAL, PARALLEL, HIDDEN_SUM, POST_NORM, ENDS = "sequential", "parallel", "hidden sum", "post-norm", ""
"""How a block adds up; HIDDEN_SUM: one after the other, but no module takes or gives the sum between them."""

_MOST_TRIES = 8
"""Modules that carry the same value are tried one after the other."""

_ATTENTION = re.compile(r"att|mixer|mamba|ssm|rglru|temporal|conv|recurrent", re.IGNORECASE)
_MLP = re.compile(r"mlp|ffn|ff|feed_?forward|moe|expert|dense|fc2", re.IGNORECASE)


INPUT, OUTPUT = Point("", "input"), Point("", "output")


@dataclass(frozen=True)
class Found:
    """A form that holds, with its points."""

    form: str
    attn_out: Point | None = None
    mid: Point | None = None
    mlp_out: Point | None = None
    norms: tuple[str, str] = ("", "")
    """Of a post-norm block: the norms of its two sums."""

    def points(self) -> dict[str, Point]:
        """Point -> where, in the order of the forward pass."""
        inner = {"attn_out": self.attn_out, "resid_mid": self.mid, "mlp_out": self.mlp_out}
        return {
            "resid_pre": INPUT,
            **{kind: point for kind, point in inner.items() if point is not None},
            "resid_post": OUTPUT,
        }


def find_points(block: Block, run: Run, others: list[Block]) -> Found:
    """How a block adds up, and its points.

    Args:
        others: blocks of the same structure, in which the same sums must hold.
    """
    prober = _Prober(block, run)
    traces = [record_block(other, run) for other in others]
    for form in (_sequential, _post_norm, _parallel):
        for found in form(prober):
            if all(_holds(found, trace) for trace in traces):
                return found
    return Found(ENDS)


def close(total: Tensor, *terms: Tensor) -> bool:
    """Whether some tensors sum up to another, as far as rounding goes."""
    wanted, parts = total.float(), [term.float() for term in terms]
    tolerance = {torch.float16: 4e-3, torch.bfloat16: 3e-2}.get(total.dtype, 2e-5)
    size = wanted.abs() + sum((part.abs() for part in parts), torch.zeros_like(wanted))
    error = (wanted - sum(parts, torch.zeros_like(wanted))).abs()
    return bool((error <= tolerance * (size + size.mean())).all())


class _Prober:
    """One block, its records, and what becomes of them when a point is replaced by noise."""

    def __init__(self, block: Block, run: Run) -> None:
        self._block, self._run = block, run
        self.trace = record_block(block, run)
        self._generator = torch.Generator().manual_seed(0)

    def replaced(self, kind: str, point: Point) -> tuple[Tensor, BlockTrace]:
        """Noise, and the records of a run in which a point was replaced by it."""
        site = self._block.site(f"blocks.0.hook_{kind}", point)
        like = self.trace.pre
        noise = torch.randn(like.shape, generator=self._generator) * like.float().std().cpu()
        noise = noise.to(like.device, like.dtype)
        return noise, trace_with(self._block, site, noise, self._run)


def trace_with(block: Block, site: Site, noise: Tensor, run: Run) -> BlockTrace:
    """The records of a block in a run in which a site of the model was replaced by [B, T, d] noise."""

    def change(activation: Tensor) -> Tensor:
        return activation.copy_(noise) if site.feeds_skip else noise.clone()

    handle = register(block.model, site, change, first=True)
    try:
        return record_block(block, run)
    finally:
        handle.remove()


def at(trace: BlockTrace, point: Point) -> Tensor | None:
    """The activation at a point."""
    if not point.module:
        return trace.pre if point.end == "input" else trace.post
    for record in trace.records:
        if (record.module, record.end) == (point.module, point.end):
            return record.value * point.scale if point.scale != 1 else record.value
    return None


def _sums(trace: BlockTrace, total: Point, *terms: Point) -> bool:
    values = [at(trace, point) for point in (total, *terms)]
    return all(v is not None for v in values) and close(*(v for v in values if v is not None))


def _holds(found: Found, trace: BlockTrace) -> bool:
    """Whether the sums of a form hold in a trace."""
    attn, mid, mlp = found.attn_out, found.mid, found.mlp_out
    if found.form == POST_NORM:
        first, second = (Point(norm, "input") for norm in found.norms)
        return (attn is None or _sums(trace, first, INPUT, attn)) and (
            mid is None or mlp is None or _sums(trace, second, mid, mlp)
        )
    if found.form in (PARALLEL, HIDDEN_SUM):
        assert attn is not None
        assert mlp is not None
        return _sums(trace, OUTPUT, INPUT, attn, mlp)
    assert mid is not None
    assert mlp is not None
    return _sums(trace, OUTPUT, mid, mlp) and (attn is None or _sums(trace, mid, INPUT, attn))


def _addends(base: Tensor, total: Tensor, records: list[Record]) -> list[Point]:
    """Outputs that make a sum of its first term, the outermost first; scaled ones where no plain one does."""
    outputs = [r for r in records if r.end == "output"]
    outputs.sort(key=lambda r: (r.module.count("."), -r.order))
    plain = [_point(r) for r in outputs if close(total, base, r.value)]
    if plain:
        return plain[:_MOST_TRIES]
    scaled = []
    difference = total.float() - base.float()
    for r in outputs:
        value = r.value.float()
        scale = float((value * difference).sum() / value.square().sum().clamp_min(1e-30))
        if abs(scale) > 1e-3 and close(total, base, value.to(total.dtype) * scale):
            scaled.append(Point(r.module, "output", scale, r.flat))
    return scaled[:_MOST_TRIES]


def _sequential(prober: _Prober) -> Iterator[Found]:
    """Blocks with a tensor between that the second branch is added to."""
    trace = prober.trace
    partly: list[Found] = []
    for value in _distinct(trace):
        first = value[0]
        later = [r for r in trace.records if r.order > first.order]
        mlps = _addends(first.value, trace.post, later)
        mlp = next((m for m in mlps if _follows(prober, "mlp_out", m, OUTPUT, [_point(first)])), None)
        if mlp is None:
            continue
        tried = sorted(value, key=lambda r: (r.end == "output", r.order))[:_MOST_TRIES]
        mids = (_point(record) for record in tried)
        mid = next((m for m in mids if _follows(prober, "resid_mid", m, OUTPUT, [mlp])), None)
        if mid is None:
            continue
        earlier = [r for r in trace.records if r.order <= value[-1].order]
        attns = [a for a in _addends(trace.pre, first.value, earlier) if not _is_mlp(a.module)]
        attn = next((a for a in attns if _follows(prober, "attn_out", a, mid, [INPUT])), None)
        if attn is not None:
            yield Found(SEQUENTIAL, attn, mid, mlp)
        partly.append(Found(SEQUENTIAL, None, mid, mlp))
    yield from partly


def _post_norm(prober: _Prober) -> Iterator[Found]:
    """Blocks that normalise each sum."""
    trace = prober.trace
    ends = {(r.module, r.end): r for r in trace.records}
    inputs = [r for r in trace.records if r.end == "input" and (r.module, "output") in ends]
    norms = [(r.module, r, ends[(r.module, "output")]) for r in inputs]
    lasts = [(module, x) for module, x, y in norms if close(trace.post, y.value)]
    partly: list[Found] = []
    for first, x, y in norms:
        if close(y.value, trace.pre) or close(y.value, trace.post):
            continue
        mid, before = Point(first, "output"), [r for r in trace.records if r.order < x.order]
        attns = [a for a in _addends(trace.pre, x.value, before) if not _is_mlp(a.module)]
        attn = next((a for a in attns if _follows(prober, "attn_out", a, _point(x), [INPUT])), None)
        for last, total in lasts:
            between = [r for r in trace.records if y.order < r.order < total.order]
            for mlp in _addends(y.value, total.value, between):
                if _follows(prober, "mlp_out", mlp, _point(total), [mid]) and _follows(
                    prober, "resid_mid", mid, _point(total), [mlp]
                ):
                    found = Found(POST_NORM, attn, mid, mlp, norms=(first, last))
                    if attn is not None:
                        yield found
                    partly.append(found)
    yield from partly


def _parallel(prober: _Prober) -> Iterator[Found]:
    """Blocks that add both branches at once, or whose sum between them no module takes or gives."""
    trace = prober.trace
    outputs = [value for value in _distinct(trace) if any(r.end == "output" for r in value)]
    for number, one in enumerate(outputs):
        for other in outputs[number + 1 :]:
            if not close(trace.post, trace.pre, one[0].value, other[0].value):
                continue
            branches = [
                [_point(r) for r in sorted(value, key=_depth) if r.end == "output"] for value in (one, other)
            ]
            if _is_mlp(branches[0][0].module) or _is_attention(branches[1][0].module):
                branches.reverse()
            if _is_mlp(branches[0][0].module) or not _is_mlp(branches[1][0].module):
                continue  # which is which is not told
            for attn in branches[0][:_MOST_TRIES]:
                for mlp in branches[1][:_MOST_TRIES]:
                    if _follows(prober, "attn_out", attn, OUTPUT, [INPUT, mlp]) and _follows(
                        prober, "mlp_out", mlp, OUTPUT, [INPUT, attn]
                    ):
                        _, changed = prober.replaced("attn_out", attn)
                        before, after = at(trace, mlp), at(changed, mlp)
                        assert before is not None
                        assert after is not None
                        yield Found(PARALLEL if close(after, before) else HIDDEN_SUM, attn, None, mlp)


def _follows(prober: _Prober, kind: str, point: Point, total: Point, others: list[Point]) -> bool:
    """Whether a sum is that of noise at a point and of the other terms, once the noise is put there."""
    noise, changed = prober.replaced(kind, point)
    found, terms = at(changed, total), [at(changed, other) for other in others]
    if found is None or any(term is None for term in terms):
        return False
    return close(found, noise, *(term for term in terms if term is not None))


def _distinct(trace: BlockTrace) -> list[list[Record]]:
    """Records by value, in the order of the run; without those that are the block's own ends."""
    groups: list[list[Record]] = []
    for record in trace.records:
        if close(record.value, trace.pre) or close(record.value, trace.post):
            continue
        group = next((g for g in groups if close(record.value, g[0].value)), None)
        if group is None:
            groups.append([record])
        else:
            group.append(record)
    return groups


def _point(record: Record) -> Point:
    return Point(record.module, record.end, flat=record.flat)


def _depth(record: Record) -> tuple[int, int]:
    return record.module.count("."), -record.order


def _is_mlp(module: str) -> bool:
    return bool(_MLP.search(module)) and not _is_attention(module)


def _is_attention(module: str) -> bool:
    return bool(_ATTENTION.search(module))
