"""The report's statistics and pages without a browser, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ndm_fast.evaluate.purity.purity import SHARES
from ndm_fast.files import sealed, write_json
from ndm_fast.report.index.format import PreimageIndex
from ndm_fast.report.survey import diverse_points, survey

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(train_flags: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its index and report."""
    from ndm_fast.cli.main import main

    folder = tmp_path_factory.mktemp("report") / "run"
    assert main(train_flags(folder, merging=True)) == 0
    assert main(["report", str(folder), "--rows", "1200"]) == 0
    return folder


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def test_report_writes_a_page_for_every_subspace_and_both_kinds_of_figure(run: Path) -> None:
    widths = json.loads((run / "result.json").read_text())["widths"]
    pages = sorted(path.name for path in (run / "report").iterdir())
    assert pages == ["index.html", *(f"subspace-{s:02}.html" for s in range(len(widths)))]
    overview = (run / "report" / "index.html").read_text()
    for name in ("loss", "mutual_information", "merge_tree"):
        assert f'id="{name}"' in overview
        assert {path.suffix for path in (run / "figures").glob(f"{name}.*")} == {".png", ".svg"}
    for page in pages:
        text = (run / "report" / page).read_text()
        assert "http://" not in text.replace("http://www.w3.org", "")
        assert "<script" not in text


def test_purity_of_the_command_is_the_purity_of_the_page(copy: Path, ndm: Callable[..., Any]) -> None:
    assert ndm("evaluate", "purity", copy).code == 0
    shutil.copy(copy / "figures" / "loss.png", copy / "circuits.png")
    rows = json.loads((copy / "purity.json").read_text())["ndm"]
    outcome = ndm("report", copy, "-o", copy / "site")
    assert outcome.out == f"report: {copy / 'site' / 'index.html'}\n"
    overview = (copy / "site" / "index.html").read_text()
    assert 'id="circuits"' in overview
    assert 'id="purity"' in overview
    page = (copy / "site" / "subspace-00.html").read_text()
    for share in SHARES:
        assert f"<dd>{100 * rows[0][share]:.1f} %</dd>" in page


def circuit_results(subspaces: int) -> dict[str, Any]:
    gini = {"unnormed": 0.5, "dimension": 0.625, "variance": 0.25}
    ndm = {"effect": [0.5 + s for s in range(subspaces)], "whole": 4.0, "gini": gini}
    return {"runs/x": {"3b": {"what": "names <END>", "site": "x8.post", "methods": {"ndm": ndm}}}}


def test_effects_of_circuit_tests_are_on_the_pages(copy: Path, ndm: Callable[..., Any]) -> None:
    widths = json.loads((copy / "result.json").read_text())["widths"]
    write_json(copy / "circuits.json", circuit_results(len(widths)), seal=True)
    assert ndm("report", copy).code == 0
    overview = (copy / "report" / "index.html").read_text()
    assert '<th scope="col" title="names &lt;END&gt;, x8.post">test 3b</th>' in overview
    assert '<td class="share" style="--s: 0.125">0.500</td>' in overview
    assert "<td>0.625</td>" in overview
    assert "<dd>1.500 of 4.000</dd>" in (copy / "report" / "subspace-01.html").read_text()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "circuits.json is damaged"),
        (json.dumps(circuit_results(99)), "its checksum does not match"),
        (json.dumps(sealed(circuit_results(99))), "is not of this run's"),
    ],
)
def test_circuit_results_of_another_run_are_refused(
    copy: Path, ndm: Callable[..., Any], content: str, words: str
) -> None:
    (copy / "circuits.json").write_text(content)
    assert words in ndm("report", copy).refusal()


def test_figures_only(copy: Path, ndm: Callable[..., Any]) -> None:
    shutil.rmtree(copy / "figures")
    shutil.rmtree(copy / "report")
    printed = ndm("report", copy, "--figures-only").out.split()
    assert sorted(printed) == sorted(str(path) for path in (copy / "figures").iterdir())
    assert not (copy / "report").exists()


def test_index_command_replaces_the_index(copy: Path, ndm: Callable[..., Any]) -> None:
    outcome = ndm("index", copy, "--rows", "300", "--dtype", "float32")
    assert outcome.out == f"300 activations in {copy / 'preimages'}\n"
    assert len(PreimageIndex(copy / "preimages")) == 300


def test_refusals_name_cause_and_remedy(copy: Path, tmp_path: Path, ndm: Callable[..., Any]) -> None:
    assert "is no run of ndm-fast" in ndm("report", tmp_path / "nothing").refusal()
    assert "shows nothing" in ndm("index", copy, "--rows", "5").refusal()
    assert "float16, float32" in ndm("index", copy, "--dtype", "int8").refusal()
    (tmp_path / "file").write_text("")
    assert "cannot write" in ndm("report", copy, "-o", tmp_path / "file" / "site").refusal()
    shard = copy / "preimages" / "rows-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    refusal = ndm("report", copy).refusal()
    assert str(shard) in refusal
    assert "ndm-fast index" in refusal
    shutil.rmtree(copy / "partition")
    assert "no result yet" in ndm("report", copy).refusal()


def test_index_of_another_partition_is_refused(copy: Path, ndm: Callable[..., Any]) -> None:
    from ndm_fast import SubspacePartition

    partition = SubspacePartition.from_pretrained(copy / "partition")
    partition.rotation.neg_()
    partition.save_pretrained(copy / "partition")
    assert "another partition" in ndm("report", copy).refusal()


def test_survey_counts_what_is_there(run: Path) -> None:
    index = PreimageIndex(run / "preimages")
    for s in survey(index, metric="euclidean", queries=5, neighbors=4):
        assert sum(s.near) == pytest.approx(1)
        assert sum(s.random) == pytest.approx(1)
        assert all(sum(row) == pytest.approx(1) or sum(row) == 0 for row in s.position_map)
        assert sum(gallery.share for gallery in s.galleries) == pytest.approx(1)
        shares = [gallery.share for gallery in s.galleries]
        assert shares == sorted(shares, reverse=True)
        assert all(here > 0 and everywhere > 0 for _, here, everywhere in s.tokens)
        for gallery in s.galleries:
            assert gallery.query["row"] not in [neighbor["row"] for neighbor in gallery.neighbors]
            assert sum(count for _, count in gallery.tokens) <= len(gallery.neighbors) == 4


def test_survey_with_cosine_distances(run: Path) -> None:
    index = PreimageIndex(run / "preimages")
    first = survey(index, metric="cosine", queries=3, neighbors=4)[0]
    distances = [n["distance"] for gallery in first.galleries for n in gallery.neighbors]
    assert all(0 <= distance <= 2 for distance in distances)
    assert first.galleries[0].neighbors[0]["relative"] == first.galleries[0].neighbors[0]["distance"]


def test_diverse_points_come_one_from_each_cluster() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    cluster = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    points = centres[cluster] + 0.1 * torch.randn(100, 2, generator=generator)
    chosen, shares = diverse_points(points, 3, seed=0)
    assert cluster[chosen].tolist() == [0, 1, 2]
    assert shares.tolist() == pytest.approx([0.6, 0.3, 0.1])


def test_fewer_different_points_than_queries() -> None:
    chosen, shares = diverse_points(torch.tensor([[1.0], [1.0], [2.0]]), 5, seed=0)
    assert len(chosen) == 2
    assert float(shares.sum()) == pytest.approx(1)


def page_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "report").iterdir()}


def test_pages_do_not_depend_on_where_the_run_is(copy: Path, ndm: Callable[..., Any], tmp_path: Path) -> None:
    assert ndm("report", copy).code == 0
    elsewhere = Path(shutil.copytree(copy, tmp_path / "far" / "away" / "run"))
    shutil.rmtree(elsewhere / "report")
    assert ndm("report", elsewhere).code == 0
    assert page_files(elsewhere) == page_files(copy)
    for name, page in page_files(copy).items():
        assert str(tmp_path).encode() not in page, name
        assert b"/tmp/" not in page, name


def test_a_crafted_index_cannot_put_unseen_characters_into_pages(copy: Path, ndm: Callable[..., Any]) -> None:
    from ndm_fast.files import digest

    assert ndm("report", copy).code == 0
    index = copy / "preimages"
    pieces = json.loads((index / "pieces.json").read_text())
    crafted = {
        n: [f"\u202e{text}\x00\u2028", f"\u2066{name}", kind] for n, (text, name, kind) in pieces.items()
    }
    (index / "pieces.json").write_text(json.dumps(crafted))
    manifest = json.loads((index / "manifest.json").read_text())
    content = (index / "pieces.json").read_bytes()
    manifest["files"]["pieces.json"] = {"bytes": len(content), "sha256": digest(content)}
    write_json(index / "manifest.json", manifest, seal=True)
    assert ndm("report", copy).code == 0
    for page in page_files(copy).values():
        text = page.decode()
        assert not set("\u202e\x00\u2028\u2066") & set(text)
    assert "⟨U+202E⟩" in (copy / "report" / "subspace-00.html").read_text()


def set_nan(path: Path) -> None:
    content = json.loads(path.read_text())
    write_json(path, {**content, "heldout_loss": float("nan")}, seal=True)


def flip_a_digit(path: Path) -> None:
    """The first digit of the first number that a reader would see."""
    content = path.read_bytes()
    place = content.index(b"0.") + 2
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])


def without_last_line(path: Path) -> None:
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))


def flip_last_bit(path: Path) -> None:
    """Of a mantissa: a change of one part in ten million."""
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    path.write_bytes(content)


def flip_widths(path: Path) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "widths": content["widths"][::-1], "source": {}}))


DAMAGE: list[tuple[str, Callable[[Path], object], str]] = [
    ("result.json", set_nan, "result.json is damaged .*'heldout_loss' is no finite number"),
    ("result.json", flip_a_digit, "result.json is damaged .*checksum"),
    ("result.json", lambda p: p.write_bytes(p.read_bytes()[:90]), "result.json is damaged"),
    ("purity.json", flip_a_digit, "purity.json is damaged .*evaluate purity"),
    ("purity.json", lambda p: p.write_text("[" * 99_999), "purity.json is damaged .*nested too deep"),
    ("log.jsonl", flip_a_digit, r"log.jsonl is damaged at line \d+ .*checksum"),
    ("log.jsonl", lambda p: p.write_bytes(bytes(p.stat().st_size) + b"\n"), "log.jsonl is damaged at line 1"),
    ("log.jsonl", lambda p: p.write_bytes(b'{"step": 1}\n'), "log.jsonl is damaged at line 1 .*no 'event'"),
    ("log.jsonl", lambda p: p.write_bytes(b'{"event": \xff}\n'), "log.jsonl is damaged at line 1"),
    ("log.jsonl", lambda p: p.write_bytes(b"{oops}\n"), "log.jsonl is damaged at line 1"),
    ("log.jsonl", without_last_line, r"log.jsonl is damaged \(\d+ of \d+ events\)"),
    ("partition/partition.safetensors", flip_last_bit, "is damaged .*checksum"),
    ("partition/config.json", flip_widths, "config.json is damaged .*checksum"),
]


@pytest.mark.parametrize(("name", "damage", "says"), DAMAGE, ids=range(len(DAMAGE)))
def test_damaged_results_go_into_no_report(
    copy: Path, ndm: Callable[..., Any], name: str, damage: Callable[[Path], object], says: str
) -> None:
    assert name != "purity.json" or ndm("evaluate", "purity", copy).code == 0
    damage(copy / name)
    assert re.search(says, ndm("report", copy).refusal())
