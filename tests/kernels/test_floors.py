"""Nothing that is predicted, or was measured, is below what a card needs (``bench/gpu/floors.py``)."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECORDS = sorted((ROOT / "bench" / "results").glob("gpu-h200-*.json"))
MODELS = {"GPT-2": "gpt2", "Qwen": "qwen2.5-1.5b", "Gemma": "gemma-2-2b"}
SHAPES = {"gpt2": (768, 32), "qwen2.5-1.5b": (1536, 64), "gemma-2-2b": (2304, 72)}
KEYS = 409_600


@pytest.fixture(scope="module")
def floors() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "bench" / "gpu"))
        patch.delitem(sys.modules, "floors", raising=False)
        import floors

        return floors


def row(model: str, queries: int, name: str, milliseconds: float) -> dict[str, Any]:
    d, width = SHAPES[model]
    return {"model": model, "Q": queries, "K": KEYS, "d": d, "width": width, "name": name, "ms": milliseconds}


def too_fast(floors: ModuleType, rows: list[dict[str, Any]]) -> tuple[list[str], int]:
    """What is below its floor, and of how many rows a floor is known."""
    known = [(each, floor) for each in rows if (floor := floors.of_row(each)) is not None]
    return [f"{each['name']}: {each['ms']} < {floor}" for each, floor in known if each["ms"] < floor], len(
        known
    )


def test_predictions(floors: ModuleType) -> None:
    predicted = json.loads((ROOT / "bench" / "gpu" / "predicted.json").read_text())
    rows = []
    for label, milliseconds in predicted.items():
        model, queries, name = label.split(" ", 2)
        rows.append(row(model, int(queries[1:]), name, milliseconds))
    assert too_fast(floors, rows) == ([], len(rows))
    for each in rows:
        each["ms"] /= 10
    assert len(too_fast(floors, rows)[0]) == len(rows)


def test_predictions_of_the_page(floors: ModuleType) -> None:
    """Microseconds of a step: its search, gradient and Adam."""
    page = (ROOT / "docs" / "kernels-gpu.md").read_text()
    tables = [
        part.splitlines()[2:] for part in page.split("\n\n") if "| search / 32 | gradient | Adam |" in part
    ]
    assert [len(table) for table in tables] == 2 * [len(MODELS)]  # what ran first, and what is to come
    for line in (line for table in tables for line in table):
        name, search, gradient, adam, products, *_ = (cell.strip() for cell in line.strip("|").split("|"))
        model = MODELS[name]
        d, width = SHAPES[model]
        shape = floors.Shape(model, 128, KEYS, d, width)
        number = {
            cell: 1e-3 * float(re.match(r"\d+", cell)[0])  # type: ignore[index]
            for cell in (search, gradient, adam, products)
        }
        assert number[search] >= floors.search(shape._replace(queries=4096)) / 32
        assert number[gradient] >= floors.gradient(shape).ms
        assert number[adam] >= floors.update(shape, half=True).ms
        assert number[products] >= 1e3 * 4 * d**3 / floors.TENSOR


def test_predicted_searches_of_the_page(floors: ModuleType) -> None:
    """Milliseconds of a search: rotation, sweep, first look and their sum, of many queries and of few."""
    page = (ROOT / "docs" / "kernels-gpu.md").read_text()
    (table,) = [part.splitlines() for part in page.split("\n\n") if "| rotate | sweep | first look |" in part]
    columns = [cell.strip() for cell in table[0].strip("|").split("|")]
    seen = set()
    for line in table[2:]:
        cells = dict(zip(columns, (cell.strip(" *") for cell in line.strip("|").split("|")), strict=True))
        name, queries = cells[""].split(", Q ")
        d, width = SHAPES[MODELS[name]]
        shape = floors.Shape(MODELS[name], int(queries), KEYS, d, width)
        assert float(cells["rotate"]) >= floors.rotate(shape).ms, line
        assert float(cells["sweep"]) >= floors.sweep(shape).ms, line
        assert float(cells["first look"]) >= floors.look(shape).ms, line
        assert float(cells["search"]) >= floors.search(shape), line
        seen.add((name, int(queries)))
    assert seen == {(name, queries) for name in MODELS for queries in (128, 4096)}


@pytest.mark.parametrize("record", RECORDS, ids=lambda path: path.stem)
def test_measurements(floors: ModuleType, record: Path) -> None:
    wrong, known = too_fast(floors, json.loads(record.read_text())["rows"])
    assert wrong == []
    assert known > 50


def test_the_records_are_there() -> None:
    assert len(RECORDS) >= 2


def test_floors_by_hand(floors: ModuleType) -> None:
    """Gemma's sweep of 4096 queries: products of 80 columns in 32 subspaces, at 1070 TFLOP/s."""
    shape = floors.Shape("gemma-2-2b", 4096, KEYS, 2304, 72)
    found = floors.sweep(shape)
    assert found.tensor == pytest.approx(1e3 * 2 * 4096 * KEYS * 32 * 80 / 1.0705e15, rel=1e-3)
    moved = 2 * KEYS * 2304 + 4 * 32 * 3200 * 4096 - 50e6
    assert found.memory == pytest.approx(1e3 * moved / 4.8e12, rel=1e-3)
    turns = 32 * 3200 * 4 * 64
    assert found.issue == pytest.approx(
        1e3 * turns * floors.instructions("gemma-2-2b Q4096: sweep") / (528 * 1.98e9), rel=1e-3
    )
    assert found.ms == max(found)
    assert floors.sweep(shape, 64).issue == 0


def test_sweep_over_shadows(floors: ModuleType) -> None:
    """Nothing is gained where all keys are left, in any way of deciding."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "bench" / "gpu"))
        import shadow_sweep

        patch.setattr(shadow_sweep, "element", lambda width: 2.05 * 2 * width / floors.TENSOR)
        counts = [
            {"columns": 31, **{f"groups_{group}_left": share for group in (32, 64, 128)}} for share in (0, 1)
        ]
        row = {"rows": "", "partition": "", "keys": 65_536, "width": 96, "by_columns": counts}
        nothing, everything = shadow_sweep.predicted(row)
        assert nothing["now"] == pytest.approx(32 / 96)
        assert nothing["tensor"] == pytest.approx(32 / 96)
        assert nothing["fp32"] == pytest.approx(0.43, abs=0.01)  # more minima
        assert everything["tensor"] == pytest.approx(1 + 32 / 96)
        assert everything["fp32"] > 6
        assert everything["now"] > 200
