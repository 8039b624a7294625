"""Examples: the method in one file computes what the package computes; all find what was planted."""

import ast
import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from ndm_fast.activations.pool import ActivationPool
from ndm_fast.activations.rows import TensorStream
from ndm_fast.config import MergeConfig, RunSettings, TrainConfig
from ndm_fast.train.trainer import Observer, Trainer

EXAMPLES = Path(__file__).parents[1] / "examples"
NANO = EXAMPLES / "nano_ndm.py"
NOTEBOOK = EXAMPLES / "any_array.ipynb"


def loaded(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def nano():
    return loaded(NANO)


@pytest.fixture(scope="module")
def kmeans():
    return loaded(EXAMPLES / "kmeans.py")


@pytest.fixture(scope="module")
def selection():
    return loaded(EXAMPLES / "feature_selection.py")


class Recorder(Observer):
    def __init__(self):
        self.losses, self.merges = [], []

    def event(self, record):
        if record["event"] == "train":
            self.losses.append(record["loss"])
        if record["event"] == "merge":
            self.merges.append(record)


def recorded_batches(monkeypatch):
    """Queries and keys of every step, in the order in which the package's pool gives them."""
    queries, keys = [], []
    take, next_keys = ActivationPool.take, ActivationPool.next_keys

    def recording_take(pool, count):
        queries.append(take(pool, count).clone())
        return queries[-1]

    def recording_keys(pool):
        keys.append(next_keys(pool).clone())
        return keys[-1]

    monkeypatch.setattr(ActivationPool, "take", recording_take)
    monkeypatch.setattr(ActivationPool, "next_keys", recording_keys)
    return queries, keys


def clustered(nano, rows):
    torch.manual_seed(0)
    return nano.planted_groups(rows)[0]


def test_same_loss_as_the_package_at_every_step(nano, monkeypatch, one_thread):
    """Parity mode: the published settings, three merges included, on the same queries and keys."""
    steps, queries, keys = 60, 32, 256
    rows = clustered(nano, 6000)
    train = TrainConfig(
        initial_widths=(3, 3, 2, 2, 2),
        rotation="exp",
        search_every=1,
        schedule="constant",
        warmup_steps=0,
        lr=3e-4,
        queries=queries,
        keys=keys,
        pool_rows=steps * queries + 2 * keys,
        heldout_queries=64,
        heldout_keys=256,
        max_steps=steps,
    )
    merge = MergeConfig(merge_threshold=-1.0, merge_start=20, merge_interval=15, mi_keys=keys, mi_queries=64)
    batches = recorded_batches(monkeypatch)
    ours = Recorder()
    trainer = Trainer(TensorStream(list(rows.split(500))), train, merge, RunSettings(log_every=1))
    partition = trainer.run(ours)
    heldout = trainer.heldout.queries

    start = nano.Partition(torch.eye(12), [3, 3, 2, 2, 2])
    found, losses = nano.train(
        zip(*batches, strict=True),
        heldout,
        start,
        steps=steps,
        merge_start=20,
        merge_interval=15,
        threshold=-1.0,
    )
    assert len(ours.merges) == 3
    assert losses == pytest.approx(ours.losses, rel=1e-5)
    assert tuple(found.widths) == partition.widths
    torch.testing.assert_close(found.rotation, partition.rotation, rtol=0, atol=1e-3)


def test_information_is_the_packages(nano, one_thread):
    from ndm_fast.train.merge.mutual_information import mutual_information

    rows = clustered(nano, 1200)
    start = nano.Partition(nano.random_rotation(12), [6, 4, 2])
    ours = mutual_information(rows[:200], rows[200:], *start)
    torch.testing.assert_close(
        nano.mutual_information(rows[:200], rows[200:], start), ours, rtol=1e-4, atol=1e-4
    )


def test_toy_finds_the_planted_groups(nano, capsys, one_thread):
    torch.manual_seed(0)
    partition = nano.toy(starts=4)
    assert partition.widths == nano.PLANTED
    assert "share of group 1 in each subspace: 0.0%  100.0%" in capsys.readouterr().out


def test_trains_on_activations_from_a_file(nano, tmp_path, monkeypatch, capsys, one_thread):
    np.save(tmp_path / "acts.npy", clustered(nano, 2000).numpy())
    out = tmp_path / "partition.npz"
    arguments = ["--unit", "4", "--keys", "256", "--steps", "200", "--lr", "1e-2", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["nano_ndm.py", str(tmp_path / "acts.npy"), *arguments])
    nano.main()
    with np.load(out) as saved:
        rotation, widths = saved["rotation"], saved["widths"]
    assert sum(widths) == 12
    np.testing.assert_allclose(rotation.T @ rotation, np.eye(12), atol=1e-5)
    first, last = map(float, re.findall(r"(?:first|merging) ([\d.]+)", capsys.readouterr().out))
    assert last < first


def test_stays_one_file_of_plain_torch():
    source = NANO.read_text()
    assert len(source.splitlines()) <= 250
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(source))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported <= {"__future__", "argparse", "collections", "math", "typing", "numpy", "torch"}


def test_k_means_finds_the_planted_clusters(kmeans, capsys, one_thread):
    torch.manual_seed(0)
    found, truth = kmeans.toy()
    assert found.errors[-1] == pytest.approx(0.1, rel=0.05)  # the noise
    assert found.errors == sorted(found.errors, reverse=True)
    for index, planted in zip(found.index, truth, strict=True):
        assert len(torch.stack([index, planted]).unique(dim=1).T) == 12  # one cluster a value
    together = float(re.search(r"one space: mean squared distance ([\d.]+)", capsys.readouterr().out)[1])
    assert together > 50 * found.errors[-1]


@pytest.mark.parametrize("widths", [[10], [4, 6]], ids=["one space", "two"])
def test_k_means_is_lloyds_algorithm(kmeans, one_thread, widths):
    """In each subspace on its own, from the same centers, in fp64."""
    torch.manual_seed(1)
    rows = torch.randn(600, 10)
    found = kmeans.k_means(rows, 7, widths, 6)
    torch.manual_seed(1)
    rows = torch.randn(600, 10)
    starts = kmeans.spread_out(rows, 7, widths).double().split(widths, 1)
    total = 0.0
    for part, centers, index in zip(rows.double().split(widths, 1), starts, found.index, strict=True):
        for _ in range(len(found.errors)):
            distance, nearest = torch.cdist(part, centers).min(1)
            centers = torch.stack([part[nearest == c].mean(0) for c in range(7)])
        assert torch.equal(nearest, index)
        total += distance.square().mean()
    assert found.errors[-1] == pytest.approx(float(total), rel=1e-5)


def test_a_cluster_without_rows_stays_where_it_is(kmeans):
    centers = kmeans.means(torch.ones(3, 2), torch.tensor([[0.0, 0.0], [5.0, 5.0]]), torch.tensor([0, 0, 0]))
    assert centers.tolist() == [[1, 1], [5, 5]]


def test_selection_takes_what_was_planted_and_nothing_twice(selection, capsys, one_thread):
    for seed in range(3):
        torch.manual_seed(seed)
        chosen = selection.toy()
        assert len({0, 4} & set(chosen)) == 1
        assert {1, 2, 3} < set(chosen)
    assert "square" in capsys.readouterr().out.splitlines()[0]  # which has no correlation with the target


def test_information_of_gaussians_is_known(selection, one_thread):
    torch.manual_seed(0)
    one, noise = torch.randn(2, 20_000)
    for correlation in (0.0, 0.5, 0.9):
        other = correlation * one + (1 - correlation**2) ** 0.5 * noise
        rows = torch.stack([one, other], 1)
        nats = selection.information(*rows.split(10_000), torch.tensor([[0, 1]]))
        assert float(nats) == pytest.approx(-np.log(1 - correlation**2) / 2, abs=0.05)


@pytest.mark.parametrize("name", ["kmeans", "feature_selection"])
def test_runs_on_rows_from_a_file(name, tmp_path, monkeypatch, capsys, one_thread):
    module = loaded(EXAMPLES / f"{name}.py")
    np.save(tmp_path / "rows.npy", torch.randn(400, 6).numpy())
    options = {
        "kmeans": ["--clusters", "5", "--subspaces", "3", "--out", str(tmp_path / "clusters.npz")],
        "feature_selection": ["--choose", "2"],
    }
    monkeypatch.setattr("sys.argv", [name, str(tmp_path / "rows.npy"), *options[name]])
    module.main()
    out = capsys.readouterr().out
    if name == "kmeans":
        with np.load(tmp_path / "clusters.npz") as saved:
            assert saved["index"].shape == (3, 400)
            assert saved["centers"].shape == (5, 6)
    else:
        assert len(re.findall(r"column [0-4]: ", out)) == 2
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 120


def test_the_notebook_runs_and_finds_what_was_planted(monkeypatch):
    """In a kernel of its own, as a reader would run it from the first cell to the last."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=240, kernel_name="python3").execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in shown) == 3
    text = "".join(
        output.text for output in shown if output.output_type == "stream" and output.name == "stdout"
    )
    assert re.search(r"before merging 0\.0\d\d; widths 8 4\n", text), text
    for width, own in ((8, 0), (4, 1)):
        shares = re.search(rf"variable in {width} dimensions: ([\d.]+)% ([\d.]+)%", text)
        assert float(shares[1 + own]) > 99, text


def test_the_notebook_holds_no_outputs():
    notebook = json.loads(NOTEBOOK.read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
    assert "pip install --quiet 'ndm-fast[figures]'" in "".join(code[0]["source"])
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}
