"""README and docs: code blocks run, commands are parsed, files that are named exist, numbers have records."""

from __future__ import annotations

import argparse
import importlib.util
import json
import linecache
import os
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from ndm_fast.cli.main import _parser
from ndm_fast.errors import InputError
from ndm_fast.partition import SubspacePartition

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:^<!-- ([^\n]*) -->\n)?^```(\w*)\n(.*?)^```$", re.M | re.S)
MARKS = ("not run: ", "run with: ", "needs: ")


class Block(NamedTuple):
    """A fenced block and the HTML comment right above it."""

    page: Path
    line: int
    mark: str
    language: str
    text: str

    @property
    def why_not_run(self):
        return self.mark.removeprefix("not run: ") if self.mark.startswith("not run: ") else ""

    @property
    def needs(self):
        """The package without which a block is skipped; tests of adapters have them all."""
        return self.mark.removeprefix("needs: ") if self.mark.startswith("needs: ") else ""

    @property
    def code(self):
        """The text, with the changes that ``run with: OLD=NEW; ...`` names."""
        code = self.text
        if self.mark.startswith("run with: "):
            for change in self.mark.removeprefix("run with: ").split("; "):
                old, new = _change(change, code)
                code = code.replace(old, new)
        return code


def _change(change, code):
    """Old and new text, which may hold ``=`` too: the longest old text that occurs is taken."""
    cuts = [at for at, letter in enumerate(change) if letter == "="]
    for at in reversed(cuts):
        if change[:at] in code:
            return change[:at], change[at + 1 :]
    raise AssertionError(f"nothing to change in the block: {change}")


def blocks(page):
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, found.start()) + 1, found[1] or "", found[2], found[3])
        for found in BLOCK.finditer(text)
    ]


ALL = [block for page in PAGES for block in blocks(page)]


def name(block):
    return f"{block.page.name}:{block.line}"


@pytest.fixture
def where_the_reader_is(tiny_model, corpus, tmp_path, monkeypatch, one_thread):
    """A folder with a model called gpt2, a partition and a corpus, as the pages suppose."""
    (tmp_path / "gpt2").symlink_to(tiny_model)
    SubspacePartition(torch.eye(32), [8] * 4).save_pretrained(tmp_path / "my-partition")
    (tmp_path / "corpus").symlink_to(corpus)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if any(b.language == "python" for b in blocks(page))],
    ids=lambda p: p.name,
)
def test_python_blocks_run(page, where_the_reader_is, monkeypatch):
    """The blocks of a page run one after the other, as a reader would paste them."""
    names = {"__name__": page.stem}
    for block in blocks(page):
        if block.language != "python" or block.why_not_run or not is_there(block.needs):
            continue
        code = block.code
        linecache.cache[name(block)] = len(code), None, code.splitlines(True), name(block)  # nnsight reads it
        exec(compile(code, name(block), "exec"), names)


def is_there(package):
    must = os.environ.get("NDM_FAST_ADAPTERS", "").split()
    return not package or package in must or importlib.util.find_spec(package) is not None


def test_every_mark_is_known_and_has_a_reason():
    for block in ALL:
        if block.language in ("python", "sh") and block.mark.startswith(("not run", "run with")):
            assert block.mark.startswith(MARKS), name(block)
            assert len(block.mark.split(": ", 1)[1]) > 10, f"{name(block)}: say why"
        if block.needs:
            assert re.fullmatch(r"\w+", block.needs), name(block)


def commands(block):
    """Lines of a shell block without comments; a backslash joins lines."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


@pytest.mark.parametrize("block", [b for b in ALL if b.language == "sh"], ids=name)
def test_shell_blocks_name_real_commands(block):
    if block.why_not_run:
        pytest.skip(block.why_not_run)
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    for words in commands(block):
        if words[0] == "torchrun":
            words = ["ndm-fast", *words[words.index("ndm_fast") + 1 :]]
        if words[0] == "ndm-fast":
            _parser().parse_args(words[1:])
        elif words[0] == "make":
            assert words[1] in targets
        elif words[0] == "python" and words[1] != "-m":
            assert (ROOT / words[1]).exists()
        elif words[0] == "python":
            assert importlib.util.find_spec(words[2])
        else:
            assert words[0] in ("pip", "git", "cd"), f"{words[0]}: not a command that this test knows"


def test_an_unknown_flag_fails():
    with pytest.raises(InputError, match="unrecognized arguments: --no-such-flag"):
        _parser().parse_args(["train", "--out", "x", "--no-such-flag"])


def flags_of(words):
    """All flags of the command that the words begin with."""
    parser = _parser()
    for word in words:
        deeper = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        if not deeper or word.startswith("-"):
            break
        assert word in deeper[0].choices, f"no command {word}"
        parser = deeper[0].choices[word]
    return {option for action in parser._actions for option in action.option_strings}


def test_commands_in_running_text_have_known_flags():
    seen = 0
    for page in PAGES:
        for line in re.findall(r"`ndm-fast ([^`]+)`", page.read_text(encoding="utf-8")):
            words = line.split()
            known = flags_of(words)
            unknown = [w for w in words if w.startswith("--") and w.split("=")[0] not in known]
            assert not unknown, f"{page.name}: ndm-fast {line}"
            seen += 1
    assert seen > 10


PATHS = re.compile(r"`((?:ndm_fast|kernels|csrc|bench|tests|docs|examples)/[\w/.-]*\w/?)`")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_files_that_are_named_exist(page):
    missing = [path for path in PATHS.findall(page.read_text(encoding="utf-8")) if not (ROOT / path).exists()]
    assert not missing


def test_pages_that_the_code_cites_exist():
    cited = set()
    for folder in ("ndm_fast", "kernels", "csrc", "bench", "examples"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh", ".sh"):
                cited |= set(re.findall(r"docs/[\w-]+\.md", path.read_text(encoding="utf-8")))
    assert "docs/method.md" in cited
    assert [page for page in sorted(cited) if not (ROOT / page).exists()] == []


@pytest.fixture(scope="module")
def records():
    spec = importlib.util.spec_from_file_location("records", ROOT / "docs" / "hooks" / "records.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_benchmarks_show_every_record(records):
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    built = records.on_page_markdown(page)
    assert "<!-- record" not in built
    for path in records.RESULTS.glob("*.json"):
        assert f"`bench/results/{path.name}`" in built


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_records_that_a_page_shows_exist(page, records):
    records.on_page_markdown(page.read_text(encoding="utf-8"))  # raises where one is missing


def test_a_record_becomes_a_table_with_its_hardware(records, tmp_path):
    path = tmp_path / "anything.json"
    made = {"cpu": "Zen", "threads": 2, "commit": "0123456789", "load": 0.5, "versions": {"torch": "9"}}
    rows = [{"d": 1024, "seconds": {"ours": 0.123456}, "spread": {"min": 1}}, {"d": 2, "extra": True}]
    path.write_text(json.dumps({"rows": rows, "made_with": made}))
    assert records.table(path).splitlines() == [
        "`bench/results/anything.json`: Zen; 2 threads; load 0.5 at the start; torch 9; commit 0123456.",
        "",
        "| d | seconds.ours | extra |",
        "|---|---|---|",
        "| 1,024 | 0.1235 | – |",
        "| 2 | – | yes |",
    ]


def test_a_summary_at_the_end_of_a_record_is_a_table_of_its_own(records, tmp_path):
    path = tmp_path / "restarts.json"
    path.write_text(json.dumps([{"seed": 0, "way": "plain"}, {"best": 3}]))
    tables = records.table(path).split("\n\n")[1:]
    assert tables == ["| seed | way |\n|---|---|\n| 0 | plain |", "| best |\n|---|\n| 3 |"]


def test_ops_of_a_record_have_a_table_each(records, tmp_path):
    path = tmp_path / "ops-avx2.json"
    ms = {"ours": {"median": 2.0, "min": 1.0}}
    rows = [{"op": "ksg", "pairs": 12, "ms": ms}, {"op": "nearest", "d": 5, "form": "x"}]
    path.write_text(json.dumps({"rows": rows}))
    parts = records.table(path).split("\n\n")
    assert parts[1:] == [
        "`ksg`",
        "| pairs | ours, ms |\n|---|---|\n| 12 | 2 |",
        "`nearest`",
        "| d | rows |\n|---|---|\n| 5 | x |",
    ]


def test_readme_has_the_times_of_the_record():
    rows = json.loads((ROOT / "bench/results/time-to-loss-avx512bf16.json").read_text())["rows"]
    published = rows[0]["seconds_to_target"]
    ours = min(row["seconds_to_target"] for row in rows[1:] if row["seconds_to_target"])
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"the published loss in {ours:.1f} s instead of {published:.0f} s" in readme
    steps = json.loads((ROOT / "bench/results/training-step-avx512bf16.json").read_text())["rows"]
    wide = json.loads((ROOT / "bench/results/train-avx512bf16.json").read_text())["rows"]
    low, high = sorted(row["times_published"] for row in steps)
    widest = max(row["times_published"] for row in wide if row.get("d") == 2304 and "times_published" in row)
    assert (
        f"a step is {low:.0f} to {high:.0f} times as fast at d = 384, and {widest:.0f} times at d = 2304"
        in readme
    )


def test_readme_opens_with_few_commands():
    shell = [
        words for block in blocks(ROOT / "README.md") if block.language == "sh" for words in commands(block)
    ]
    assert len(shell) <= 4
