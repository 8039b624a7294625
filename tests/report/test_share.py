"""The zip of a report: it opens anywhere, tells nothing of this machine, and is the same bytes each time."""

from __future__ import annotations

import base64
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(train_flags: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with the zip of its report."""
    from ndm_fast.cli.main import main

    folder = tmp_path_factory.mktemp("share") / "run"
    assert main(train_flags(folder, merging=True)) == 0
    assert main(["report", str(folder), "--share", "--rows", "1200"]) == 0
    return folder


def pages_of(zipped: Path, folder: Path) -> dict[str, str]:
    """Pages by name, unzipped into an empty folder."""
    with zipfile.ZipFile(zipped) as archive:
        assert archive.testzip() is None
        archive.extractall(folder)
    assert [path.name for path in folder.iterdir()] == ["ndm-report"]
    return {path.name: path.read_text() for path in (folder / "ndm-report").iterdir()}


def with_what_is_inlined(page: str) -> str:
    """A page, and its figures as the text that they are."""
    inlined = re.findall(r"data:image/svg\+xml;base64,([\w+/=]+)", page)
    return page + "".join(base64.b64decode(figure).decode() for figure in inlined)


def test_all_that_a_page_names_is_in_the_zip_or_the_page(run: Path, tmp_path: Path) -> None:
    pages = pages_of(run / "report.zip", tmp_path)
    assert len(pages) > 2
    linked = set()
    for text in pages.values():
        for name in re.findall(r"(?:href|src)=[\"']([^\"']*)[\"']|url\(([^)]*)\)", text):
            target = "".join(name).partition("#")[0]
            if target and not target.startswith("data:"):
                assert target in pages, target
                linked.add(target)
        assert "<script" not in text
    assert linked == set(pages)
    assert pages["index.html"].count("data:image/svg+xml;base64,") >= 3


def test_nothing_tells_of_this_machine(run: Path, tmp_path: Path, tiny_model: Path, corpus: Path) -> None:
    for text in map(with_what_is_inlined, pages_of(run / "report.zip", tmp_path).values()):
        for place in (run.parent, tiny_model, corpus, Path.home(), Path(__file__).parents[2]):
            if len(place.parts) > 1:
                assert str(place) not in text
        # Each address names a vocabulary, and is opened by nobody.
        hosts = set(re.findall(r"https?://([\w.]+)", text))
        assert hosts <= {"www.w3.org", "purl.org", "creativecommons.org", "matplotlib.org"}


def test_the_pages_are_those_of_the_report(run: Path, tmp_path: Path, ndm: Callable[..., Any]) -> None:
    assert not (run / "report").exists()
    assert ndm("report", run, "-o", tmp_path / "site").code == 0
    site = {path.name: path.read_text() for path in (tmp_path / "site").iterdir()}
    assert pages_of(run / "report.zip", tmp_path / "unzipped") == site


def test_the_same_run_is_the_same_bytes_wherever_it_lies(
    run: Path, tmp_path: Path, ndm: Callable[..., Any]
) -> None:
    copy, out = Path(shutil.copytree(run, tmp_path / "moved")), tmp_path / "new" / "sent.zip"
    assert ndm("report", copy, "--share", "-o", out).out == f"report: {out}\n"
    assert out.read_bytes() == (run / "report.zip").read_bytes()
    with zipfile.ZipFile(out) as archive:
        assert archive.namelist() == sorted(archive.namelist())
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_another_file_is_not_overwritten(run: Path, tmp_path: Path, ndm: Callable[..., Any]) -> None:
    assert ndm("report", run, "--share").code == 0  # the same again
    other = tmp_path / "other.zip"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("letter", "dear")
    for name, content in (("notes.txt", b"mine"), ("other.zip", other.read_bytes())):
        (tmp_path / name).write_bytes(content)
        refused = ndm("report", run, "--share", "-o", tmp_path / name).refusal()
        assert refused.startswith(f"{tmp_path / name} exists and holds something else: choose another -o")
        assert (tmp_path / name).read_bytes() == content
    assert "holds something else" in ndm("report", run, "--share", "-o", tmp_path).refusal()


def test_not_with_figures_only(run: Path, ndm: Callable[..., Any]) -> None:
    assert "not allowed with" in ndm("report", run, "--share", "--figures-only").refusal()
