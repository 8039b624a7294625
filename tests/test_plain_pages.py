"""The pages for readers without a browser hold what the package has: every public name, every page."""

from __future__ import annotations

import importlib.util
import inspect
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml

import ndm_fast
from ndm_fast import ops

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def hook() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plain_pages", DOCS / "hooks" / "plain_pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def api(hook: ModuleType) -> str:
    return str(hook.with_docstrings((DOCS / "api.md").read_text()))


@pytest.fixture(scope="module")
def nav() -> Any:
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)
    return yaml.load((DOCS.parent / "mkdocs.yml").read_text(), Loader)["nav"]


def test_the_api_has_every_public_name_and_no_other(api: str) -> None:
    named = re.findall(r"^### (\S+)$", api, re.M)
    assert len(named) == len(set(named))
    wanted = {f"ndm_fast.{name}" for name in ndm_fast.__all__ if name != "__version__"}
    wanted |= {f"ndm_fast.ops.{name}" for name in ops.__all__ if name not in ndm_fast.__all__}
    assert wanted <= set(named)
    for path in named:  # as one would import it
        module, _, name = path.rpartition(".")
        assert hasattr(importlib.import_module(module), name), path
    listed = re.findall(r"^::: \S+\.(\w+)$", (DOCS / "api.md").read_text(), re.M)
    assert [path.rpartition(".")[2] for path in named] == listed


def test_a_name_has_its_arguments_and_what_is_written_about_it(api: str) -> None:
    for name in [n for n in ndm_fast.__all__ if n != "__version__"]:
        value = getattr(ndm_fast, name)
        part = api.split(f"### ndm_fast.{name}\n")[1].split("\n### ")[0]
        assert re.search(rf"^(def|class) {name}\b", part, re.M), name
        if inspect.isfunction(value):
            for argument in inspect.signature(value).parameters:
                assert re.search(rf"\b{argument}\b", part.split("```")[1]), (name, argument)
        assert (inspect.getdoc(value) or "").splitlines()[0][:40].split("`")[0] in part, name
    train = api.split("### ndm_fast.TrainConfig\n")[1].split("\n### ")[0]
    assert "- `queries`: Queries in one step." in train
    assert "unit_size: int = " in train


def test_members_of_classes_are_there(api: str) -> None:
    for member in ("Trainer.run", "SubspacePartition.from_pretrained", "Reporter.metrics"):
        assert f"#### {member}\n" in api
    assert "#### Trainer.partition (property)\n" in api


def test_nothing_in_it_changes_between_builds_or_machines(api: str) -> None:
    assert " at 0x" not in api
    assert str(DOCS.parent) not in api


def test_llms_txt_names_every_page_with_what_it_is_about(hook: ModuleType, nav: Any) -> None:
    pages = {path.name: path.read_text() for path in DOCS.glob("*.md")}
    text = hook.llms("ndm_fast", nav, pages)
    assert text.startswith("# ndm_fast\n\n> Neighbor distance minimization")
    entries = re.findall(r"^- \[(.+)\]\((\S+)\): (.+)$", text, re.M)
    assert sorted(page for _, page, _ in entries) == sorted(pages)
    about = {page: words for _, page, words in entries}
    assert about["train.md"].startswith("Settings; Sites; The run folder; ")


def test_a_build_leaves_the_pages_beside_the_site(hook: ModuleType, nav: Any, tmp_path: Path) -> None:
    for path in DOCS.glob("*.md"):
        page = SimpleNamespace(file=SimpleNamespace(src_uri=path.name))
        assert hook.on_page_markdown(path.read_text(), page=page) == path.read_text()
    hook.on_post_build({"site_dir": str(tmp_path), "site_name": "ndm_fast", "nav": nav})
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"llms.txt", *(path.name for path in DOCS.glob("*.md"))}
    assert "\n:::" not in (tmp_path / "api.md").read_text()
