"""The folder for the Hugging Face Hub: what is in it, that it loads, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from ndm_fast.errors import InputError
from ndm_fast.partition import SubspacePartition
from ndm_fast.report.hub import write_hub
from ndm_fast.run.folder import RunFolder
from ndm_fast.run.load import load_partition

pytest.importorskip("matplotlib")
pytestmark = pytest.mark.usefixtures("one_thread")

HOOKS = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]


@pytest.fixture(scope="module")
def runs(train_flags: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Finished runs of two sites of one model; the second has its purity too."""
    from ndm_fast.cli.main import main

    folder = tmp_path_factory.mktemp("hub")
    runs = [folder / name for name in ("first", "second")]
    for run, site in zip(runs, ("x0.post", "x1.post"), strict=True):
        assert main(train_flags(run, merging=True, site=site)) == 0
    assert main(["evaluate", "purity", str(runs[1])]) == 0
    return runs


@pytest.fixture(scope="module")
def written(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "hub"
    write_hub([RunFolder(run) for run in reversed(runs)], out, "someone/gpt2-subspaces")
    return out


def test_one_folder_a_hook_that_loads_as_the_run(runs: list[Path], written: Path) -> None:
    assert sorted(path.name for path in written.iterdir()) == ["README.md", *HOOKS]
    for run, hook in zip(runs, HOOKS, strict=True):
        partition = RunFolder(run).partition()
        for loaded in (
            SubspacePartition.from_pretrained(written, subfolder=hook),
            load_partition(written / hook),
        ):
            assert torch.equal(loaded.rotation, partition.rotation)
            assert loaded.widths == partition.widths
            assert loaded.source["site"] == hook


def test_the_card_has_metadata_figures_and_a_row_for_every_subspace(runs: list[Path], written: Path) -> None:
    card = ModelCard.load(written / "README.md")
    assert card.data.library_name == "ndm_fast"
    assert card.data.license == "apache-2.0"
    assert card.data.base_model is None  # it lies on this machine
    assert (
        f"# Interpretable subspaces of {Path(RunFolder(runs[0]).config().harvest.model).name}\n" in card.text
    )
    before = None
    for run, hook in zip(runs, HOOKS, strict=True):
        section = card.text.split(f"\n## {hook}\n")[1].split("\n## ")[0]
        result = RunFolder(run).result()
        rows = [line for line in section.splitlines() if line.startswith("| ") and line[2].isdigit()]
        assert [int(row.split("|")[2]) for row in rows] == result["widths"]
        assert [f"{float(distance):.4f}" for distance in result["heldout_distance"]] == [
            row.split("|")[4].strip() for row in rows
        ]
        figures = [line.split("](")[1][:-1] for line in section.splitlines() if line.startswith("![")]
        assert f"{hook}/figures/loss.png" in figures
        assert all((written / figure).is_file() for figure in figures)
        assert before is None or card.text.index(section) > before
        before = card.text.index(section)
    assert "neighbors share" in card.text.split(f"## {HOOKS[1]}")[1]
    assert "neighbors share" not in card.text.split(f"## {HOOKS[0]}\n")[1].split("\n## ")[0]


@pytest.mark.parametrize(
    ("model", "base"), [("openai-community/gpt2", "openai-community/gpt2"), ("minilm", None)]
)
def test_a_model_of_the_hub_is_the_base_model(
    runs: list[Path], tmp_path: Path, model: str, base: str | None
) -> None:
    card = ModelCard.load(write_hub([_of_another_model(runs[0], tmp_path / "run", model)], tmp_path / "hub"))
    assert card.data.base_model == base
    assert f"# Interpretable subspaces of {model}\n" in card.text


def _of_another_model(run: Path, copy: Path, model: str) -> RunFolder:
    folder = RunFolder(shutil.copytree(run, copy))
    partition = folder.partition()
    shutil.rmtree(folder.partition_folder)
    source = {**partition.source, "model": model}
    SubspacePartition(partition.rotation, partition.widths, source).save_pretrained(folder.partition_folder)
    return folder


def test_the_snippet_of_the_card_runs(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "someone").mkdir()
    (tmp_path / "someone" / "gpt2-subspaces").symlink_to(written)
    monkeypatch.chdir(tmp_path)
    code = (written / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {"activations": torch.randn(3, 32)}
    exec(code, names)
    assert sum(part.shape[-1] for part in names["parts"]) == 32


def test_no_path_of_this_machine_travels(runs: list[Path], written: Path) -> None:
    harvest = RunFolder(runs[0]).config().harvest
    here = {str(Path(harvest.model).parent), str(Path(harvest.data).parent)}
    for file in [written / "README.md", *written.rglob("*.json")]:
        assert not [place for place in here if place in file.read_text()]


def test_loads_from_the_hub(written: Path, tmp_path: Path) -> None:
    """As a download leaves it in the cache."""
    cached = tmp_path / "models--someone--gpt2-subspaces"
    shutil.copytree(written, cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    options: dict[str, Any] = {"cache_dir": tmp_path, "local_files_only": True}
    found = SubspacePartition.from_pretrained("someone/gpt2-subspaces", subfolder=HOOKS[1], **options)
    assert found.source["site"] == HOOKS[1]
    with pytest.raises(InputError, match=r"someone/gpt2-subspaces/blocks.9 is neither|is not a saved"):
        SubspacePartition.from_pretrained("someone/gpt2-subspaces", subfolder="blocks.9", **options)


def test_a_hook_of_a_repository_is_a_partition_for_every_command(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        SubspacePartition, "from_pretrained", lambda name, **options: asked.append((name, options))
    )
    load_partition("someone/gpt2-subspaces/blocks.0.hook_resid_post")
    load_partition("someone/gpt2")
    assert asked == [
        ("someone/gpt2-subspaces", {"subfolder": "blocks.0.hook_resid_post"}),
        ("someone/gpt2", {}),
    ]


def test_the_command(runs: list[Path], tmp_path: Path, ndm: Callable[..., Any]) -> None:
    out = tmp_path / "hub"
    before = [sorted(run.rglob("*")) for run in runs]
    outcome = ndm("hub", *runs, "--out", out, "--name", "me/mine")
    assert outcome.code == 0
    assert [sorted(run.rglob("*")) for run in runs] == before
    assert ndm("hub", *runs, "--out", out, "--name", "me/mine").code == 0  # the very same
    assert "holds something else" in ndm("hub", *runs, "--out", out, "--name", "you/yours").err
    assert outcome.out.splitlines() == [
        f"hub: {out / 'README.md'}",
        f"read it, and upload with: hf upload me/mine {out}",
    ]


def test_rows_have_their_file_for_a_model(tmp_path: Path, ndm: Callable[..., Any]) -> None:
    import numpy as np

    np.save(tmp_path / "sentences.npy", np.random.default_rng(0).normal(size=(2000, 16)).astype("float32"))
    small = {"unit-size": 4, "max-steps": 20, "queries": 8, "keys": 64, "heldout-queries": 32}
    small |= {"heldout-keys": 128, "pool-rows": 256}
    flags = [f"--{name}={value}" for name, value in small.items()]
    assert ndm("train", "--rows", tmp_path / "sentences.npy", "--out", tmp_path / "run", *flags).code == 0
    card = ModelCard.load(write_hub([RunFolder(tmp_path / "run")], tmp_path / "hub"))
    assert card.data.base_model is None
    assert "# Interpretable subspaces of sentences.npy" in card.text
    assert str(tmp_path) not in card.content
    assert SubspacePartition.from_pretrained(tmp_path / "hub", subfolder="sentences").width == 16


def test_what_is_refused(runs: list[Path], tmp_path: Path, ndm: Callable[..., Any]) -> None:
    def says(*arguments: object) -> str:
        outcome = ndm("hub", *arguments)
        assert outcome.code == 2
        assert len(outcome.err.strip().splitlines()) == 1
        return str(outcome.err)

    out = tmp_path / "hub"
    assert "is no run of ndm-fast" in says(tmp_path, "--out", out)
    assert "are both of blocks.0.hook_resid_post" in says(runs[0], runs[0], "--out", out)
    assert "give USER/NAME" in says(runs[0], "--out", out, "--name", "a/b/c")
    assert not out.exists()
    (tmp_path / "mine.txt").touch()
    assert "holds something else" in says(runs[0], "--out", tmp_path)
    assert "holds something else" in says(runs[0], "--out", tmp_path / "mine.txt")
    other = _of_another_model(runs[1], tmp_path / "other", "another").path
    assert "one repository holds those of one model" in says(runs[0], other, "--out", out)
