"""Where does a circuit's information sit? Patch the whole activation after every block, and see.

For every circuit test the activation at its positions is replaced by that of the counterfactual, one block
at a time (causal tracing by interchange). NDM is worth training where that changes most.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ndm_fast.activations.hooks import collect_activations
from ndm_fast.activations.sites import canonical_name, number_of_blocks
from ndm_fast.config import HubOptions
from ndm_fast.errors import InputError
from ndm_fast.evaluate.circuits.prompts import TESTS, CircuitTest, chosen_tests
from ndm_fast.evaluate.circuits.words import CircuitPrompts
from ndm_fast.evaluate.patching.head import Head, tokens_of
from ndm_fast.evaluate.patching.language_model import check_lengths, load_language_model
from ndm_fast.evaluate.patching.layers_above import LayersAbove
from ndm_fast.evaluate.patching.patching import first_column
from ndm_fast.evaluate.patching.prefix import PrefixReader
from ndm_fast.evaluate.patching.prompts import Prompts, columns_of, pad_prompts
from ndm_fast.files import read_json

OWN = "test"
"""Kind of positions: those that the test itself patches."""

OTHERS = "others"
"""Kind of positions: all that are of no named kind."""

_NEAR_THE_LARGEST = 0.9
"""The site of a test is the first whose effect reaches this share of the largest: later ones copy it."""


@dataclass(frozen=True)
class TraceCurve:
    """Effect of the whole activation, block by block, for one test and kind of positions."""

    test: str
    what: str
    positions: str
    """``OWN``, or a kind of position as IO+1, S2, END, ``OTHERS``."""
    clean: float
    """Mean of the metric without a patch."""
    right: float
    """Share of the prompts that the model does right."""
    effect: tuple[float, ...]
    """Mean drop of the metric, one per layer of the trace."""
    error: tuple[float, ...]
    """Standard error of that mean over the prompts."""

    @property
    def peak(self) -> int:
        """Index of the first layer whose effect, of either sign, is 90 % of the largest."""
        sizes = [abs(effect) for effect in self.effect]
        return next(n for n, size in enumerate(sizes) if size >= _NEAR_THE_LARGEST * max(sizes))


@dataclass(frozen=True)
class Trace:
    """Curves of several tests over the same layers of one model."""

    model: str
    prompts: int
    seed: int
    templates: str
    layers: tuple[int, ...]
    curves: tuple[TraceCurve, ...]

    def site(self, curve: TraceCurve) -> str:
        """The site where a curve peaks."""
        return _site(self.layers[curve.peak])

    @property
    def sites(self) -> dict[str, str]:
        """Test -> the site to train on."""
        return {curve.test: self.site(curve) for curve in self.curves if curve.positions == OWN}

    def to_json(self) -> dict[str, Any]:
        """Plain values, with the sites beside them."""
        return {"sites": self.sites, **asdict(self)}


def _site(layer: int) -> str:
    return f"blocks.{layer}.hook_resid_post"


def read_trace(path: str | Path) -> Trace:
    """A trace from the JSON file that ``ndm-fast evaluate trace`` writes.

    Raises:
        InputError: it cannot be read, or is something else.
    """
    remedy = "give the trace.json of `ndm-fast evaluate trace`"
    try:
        content = read_json(Path(path), {"curves": [{str: object}]}, remedy=remedy)
        curves = tuple(
            TraceCurve(**{field.name: _tuple(curve[field.name]) for field in fields(TraceCurve)})
            for curve in content["curves"]
        )
        rest = {f.name: _tuple(content[f.name]) for f in fields(Trace) if f.name != "curves"}
        return Trace(**rest, curves=curves)
    except (OSError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no trace ({error!r}): {remedy}") from None


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def run_trace(
    model_name: str,
    *,
    tests: Sequence[str] | None = None,
    prompts: int = 48,
    seed: int = 0,
    templates: str = "all",
    layers: Sequence[int] | None = None,
    kinds: bool = False,
    rows: int = 48,
    device: str = "cpu",
    hub: HubOptions | None = None,
    progress: bool = True,
) -> Trace:
    """Trace circuit tests through a model.

    Args:
        tests: names; default all.
        layers: blocks after which to patch; default all.
        kinds: also every kind of position by itself; tests with the same prompts share these curves.
        rows: prompts in one forward pass.
        hub: see ``load_model``.

    Raises:
        InputError: unknown tests or layers, a model without a head, a tokenizer that splits the words.
    """
    chosen = chosen_tests(list(TESTS) if tests is None else tests)
    model, tokenizer = load_language_model(model_name, device, hub=hub)
    count = number_of_blocks(model)
    layers = list(range(count)) if layers is None else sorted(set(layers))
    if not layers or layers[0] < 0 or layers[-1] >= count:
        raise InputError(f"layers {layers} are not all in this model: it has blocks 0 to {count - 1}")
    built = [(test, test.build(tokenizer, prompts, seed, templates)) for test in chosen]
    tracer = _Tracer(model, layers, rows)
    jobs = [_Job(test, OWN, made, made.positions) for test, made in built]
    jobs += _kind_jobs(built) if kinds else []
    curves = []
    passes = len(jobs) * len(layers) * -(-prompts // rows)
    with tqdm(total=passes, desc="trace", unit="pass", disable=None if progress else True) as bar:
        for job in jobs:
            check_lengths(model, job.made.prompts)
            bar.set_postfix_str(f"test {job.test.name} {job.kind}")
            curves.append(tracer.curve(job, bar))
    return Trace(model_name, prompts, seed, templates, tuple(layers), tuple(curves))


class _Job(NamedTuple):
    """A curve to make."""

    test: CircuitTest
    kind: str
    made: CircuitPrompts
    positions: list[list[int]]


def _kind_jobs(built: Sequence[tuple[CircuitTest, CircuitPrompts]]) -> Iterator[_Job]:
    seen: list[list[list[int]]] = []
    for test, made in built:
        if made.counterfactuals in seen:
            continue
        seen.append(made.counterfactuals)
        for kind in made.places[0]:
            yield _Job(test, kind, made, [places[kind] for places in made.places])
        named = [{p for positions in places.values() for p in positions} for places in made.places]
        others = [
            [p for p in range(len(tokens)) if p not in taken]
            for tokens, taken in zip(made.prompts, named, strict=True)
        ]
        yield _Job(test, OTHERS, made, others)


class _Tracer:
    """Runs jobs: activations of all layers from one forward pass, then the layers above each."""

    def __init__(self, model: nn.Module, layers: Sequence[int], rows: int) -> None:
        self._model = model
        head = Head(model)
        self._cuts = [LayersAbove(model, _site(layer), head) for layer in layers]
        self._rows = rows
        self._prefixes = PrefixReader(model)
        self._device = next(model.parameters()).device

    def curve(self, job: _Job, bar: Any) -> TraceCurve:
        made = job.made
        # Prompts of like length together, so that hardly any column is padding.
        order = sorted(range(len(made.prompts)), key=lambda row: len(made.prompts[row]))
        batches = [order[i : i + self._rows] for i in range(0, len(order), self._rows)]
        parts = [self._batch(job, torch.tensor(batch), bar) for batch in batches]
        clean, patched = (torch.cat(part, -1).double() for part in zip(*parts, strict=True))
        drops = clean - patched
        return TraceCurve(
            job.test.name,
            f"{job.test.what}{f' ({made.form})' if made.form else ''}",
            job.kind,
            float(clean.mean()),
            float((clean > made.right_above).double().mean()),
            tuple(drops.mean(1).tolist()),
            tuple((drops.std(1, correction=0) / len(clean) ** 0.5).tolist()),
        )

    def _batch(self, job: _Job, batch: Tensor, bar: Any) -> tuple[Tensor, Tensor]:
        """[n] clean metric and [L, n] patched ones."""
        prompts, others = (
            pad_prompts([all_of[row] for row in batch.tolist()], device=self._device)
            for all_of in (job.made.prompts, job.made.counterfactuals)
        )
        columns, used = columns_of(prompts, [job.positions[row] for row in batch.tolist()])
        reading = columns_of(prompts, [[-1]] * len(batch))[0]
        here, there = self._all_layers(prompts), self._all_layers(others)
        prefix = self._prefixes.read(prompts, first_column(columns, used, reading))
        start = prefix.columns if prefix else 0
        every = torch.arange(len(batch), device=self._device)
        row, place = used.nonzero(as_tuple=True)
        column = columns[row, place]

        def measured(cut: LayersAbove, activations: Tensor) -> Tensor:
            before = prefix.rows(every) if prefix else None
            tokens = tokens_of(job.made.metric)
            return job.made.metric(cut.above(activations, prompts, reading, before, tokens), batch)

        clean = measured(self._cuts[-1], here[-1][:, start:])
        patched = []
        for cut, own, other in zip(self._cuts, here, there, strict=True):
            changed = own[:, start:].clone()
            changed[row, column - start] = other[row, column]
            patched.append(measured(cut, changed))
            bar.update()
        return clean, torch.stack(patched)

    @torch.no_grad()
    def _all_layers(self, prompts: Prompts) -> list[Tensor]:
        """[n, T, d] after each layer of the trace."""
        names = [cut.site.name for cut in self._cuts]
        with ExitStack() as stack:
            for cut in self._cuts:
                stack.enter_context(cut.watching())
            captured = stack.enter_context(collect_activations(self._model, names))
            self._model(**prompts.model_inputs(), use_cache=False)
        return [captured[name] for name in names]


def tests_at(trace: Trace, site: str) -> list[CircuitTest]:
    """The tests that peak at a site.

    Raises:
        InputError: none does.
    """
    names = [test for test, peak in trace.sites.items() if peak == canonical_name(site)]
    if not names:
        peaks = ", ".join(f"{test} at {peak}" for test, peak in trace.sites.items())
        raise InputError(f"no test of the trace peaks at {site} ({peaks}): name some with --tests")
    return chosen_tests(names)


def trace_rows(trace: Trace) -> list[dict[str, Any]]:
    """One table row per curve, with the largest effects' layers."""
    return [
        {
            "test": curve.test,
            "positions": curve.positions,
            "clean": curve.clean,
            "right": curve.right,
            "peak_block": trace.layers[curve.peak],
            "effect": curve.effect[curve.peak],
            "error": curve.error[curve.peak],
            "largest": max(curve.effect, key=abs),
        }
        for curve in trace.curves
    ]
