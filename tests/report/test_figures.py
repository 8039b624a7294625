"""Figures of a run and of the toy model, from made-up logs."""

import sys

import numpy as np
import pytest
import torch

from ndm_fast.config import TrainConfig, from_flat
from ndm_fast.drawing import style, thinned
from ndm_fast.errors import InputError
from ndm_fast.evaluate.purity.purity import SHARES
from ndm_fast.evaluate.truth.toy_figure import draw_toy, toy_figure
from ndm_fast.files import write_json
from ndm_fast.partition import SubspacePartition, merged_order
from ndm_fast.report.figures import draw_run, loss_figure, per_root_width, purity_figure
from ndm_fast.report.merge_figures import information_figure, merge_tree, tree_figure
from ndm_fast.run.folder import RunFolder, log_line
from ndm_fast.train.merge.pairs import choose_pairs, merge_scores

pytest.importorskip("matplotlib")


def _merge(step, widths, pairs, seed=0):
    """A merge event, with scores made up so that ``pairs`` share most."""
    scores = np.random.default_rng(seed).uniform(0.02, 0.05, (len(widths), len(widths)))
    scores = (scores + scores.T) / 2
    for a, b in pairs:
        scores[a, b] = scores[b, a] = 0.12
    sizes = np.array(widths)
    information = scores * (sizes[:, None] + sizes)
    np.fill_diagonal(information, 0)
    return {
        "event": "merge",
        "step": step,
        "mutual_information": information.tolist(),
        "pairs": [list(pair) for pair in pairs],
        "widths_before": list(widths),
        "widths": [sum(widths[s] for s in group) for group in merged_order(widths, pairs)],
    }


def _evaluated(step, loss, widths):
    distances = {"heldout_loss": loss, "by_subspace": [loss] * len(widths)}
    return {"event": "evaluate", "step": step, **distances, "widths": list(widths)}


def _events(merges, last=800, widths=(8, 8, 8, 8)):
    events = [_evaluated(0, 1.7, widths)]
    for step in range(20, last + 1, 20):
        events.append({"event": "train", "step": step, "loss": 1 + 0.7 * 0.99**step, "lr": 1e-3})
        if step % 100 == 0:
            events.append(_evaluated(step, 1.01, widths))
        events += [event for event in merges if event["step"] == step]
    return events


def _purity(widths):
    row = dict.fromkeys(SHARES, 0.5) | {"same_token": 0.031, "same_position": 0.884}
    return [{"subspace": s, "width": width, "variance_share": 0.25, **row} for s, width in enumerate(widths)]


@pytest.fixture
def merges():
    first = _merge(400, [8, 8, 8, 8], [(1, 3)])
    second = _merge(600, first["widths"], [(0, 2)])
    return [first, second, _merge(800, second["widths"], [])]


@pytest.fixture
def folder(tmp_path, merges):
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.log_file.write_bytes(b"".join(map(log_line, _events(merges))))
    write_json(folder.config_file, {"settings": from_flat({"merge_threshold": 0.06}).flat()}, seal=True)
    write_json(folder.purity_file, {kind: _purity([24, 8]) for kind in ("ndm", "random")}, seal=True)
    return folder


def _size(path):
    """Width and height of a PNG file, from its header."""
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    return int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")


def _texts(axes):
    return [text.get_text() for text in axes.texts]


def _labels(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def test_every_figure_of_a_run_is_drawn(folder):
    paths = draw_run(folder)
    assert [path.name for path in paths] == [
        "loss.png",
        "mutual_information.png",
        "merge_tree.png",
        "purity.png",
    ]
    assert sorted(paths) == sorted(folder.figures_folder.iterdir())  # no temporary files are left
    for path in paths:
        width, height = _size(path)
        assert 500 < width < 3000
        assert 300 < height < 3000


def test_vector_figures_come_beside(folder):
    folder.purity_file.unlink()
    paths = draw_run(folder, vector=True)
    assert len(paths) == 6
    drawing = folder.figures_folder / "loss.svg"
    assert drawing in paths
    assert "<svg" in drawing.read_text()
    before = drawing.read_bytes()
    draw_run(folder, vector=True)
    assert drawing.read_bytes() == before  # the same data, the same file


def test_only_what_the_files_allow(folder):
    folder.purity_file.unlink()
    folder.config_file.unlink()
    folder.log_file.write_bytes(b"".join(map(log_line, _events([]))))
    assert [path.name for path in draw_run(folder)] == ["loss.png"]


def test_nothing_to_draw_is_an_error(tmp_path, folder):
    with pytest.raises(InputError, match="is no run"):
        draw_run(RunFolder(tmp_path / "nowhere"))
    folder.purity_file.unlink()
    folder.log_file.write_text("")
    with pytest.raises(InputError, match="nothing to draw yet"):
        draw_run(folder)


def test_damaged_purity_is_an_error(folder):
    folder.purity_file.write_text('{"ndm": [')
    with pytest.raises(InputError, match=r"purity.json is damaged .*evaluate purity"):
        draw_run(folder)


def test_missing_matplotlib_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"pip install 'ndm-fast\[figures\]'"):
        draw_run(folder)


def test_merged_order_is_that_of_the_partition():
    widths = [3, 2, 2, 1]
    assert merged_order(widths, [(3, 1)]) == [[0], [1, 3], [2]]
    merged = SubspacePartition(torch.eye(8), widths).merge([(3, 1)])
    assert merged.widths == (3, 3, 2)
    assert merged.rotation.argmax(0).tolist() == [0, 1, 2, 3, 4, 7, 5, 6]
    with pytest.raises(InputError, match="disjoint pairs of the 4"):
        merged_order(widths, [(0, 1), (1, 2)])


def test_tree_follows_reordering(merges):
    """Units 1 and 3 join first and move to the front, so pair (0, 2) of the next round is {1, 3} and 2."""
    assert merges[0]["widths"] == [16, 8, 8]
    wide, narrow = merge_tree(merges)
    assert (wide.units, wide.width, wide.step) == ((1, 2, 3), 24, 600)
    inner, leaf = wide.children
    assert (inner.units, inner.width, inner.step) == ((1, 3), 16, 400)
    assert (leaf.units, leaf.step, leaf.children) == ((2,), 0, ())
    assert (narrow.units, narrow.children) == ((0,), ())


def test_tree_holds_every_unit_once_whatever_merges():
    widths, events, step = [32] * 24, [], 0
    while len(widths) > 1:
        information = torch.tensor(_merge(0, widths, [], seed=step)["mutual_information"])
        events.append(
            _merge(step := step + 100, widths, choose_pairs(merge_scores(information, widths), 0.0))
        )
        widths = events[-1]["widths"]
        roots = merge_tree(events)
        assert [root.width for root in roots] == widths
        assert sorted(unit for root in roots for unit in root.units) == list(range(24))


def test_tree_figure_names_first_and_final_subspaces(merges):
    with style():
        axes = tree_figure(merges, 800).axes[0]
    assert _labels(axes.yaxis) == ["unit 1 · 8", "unit 3 · 8", "unit 2 · 8", "unit 0 · 8"]
    assert _labels(axes.child_axes[0].yaxis) == ["s0 · 24", "s1 · 8"]


def test_one_panel_for_every_round(merges):
    with style():
        figure = information_figure([*merges, _merge(900, [32], [])], 0.06)
    panels = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in panels] == [
        "step 400 · 4 subspaces · 1 pair merges",
        "step 600 · 3 subspaces · 1 pair merges",
        "step 800 · 2 subspaces · no pair merges",
    ]
    shown = panels[0].images[0].get_array()
    assert shown[1, 3] == pytest.approx(0.12)  # information over the sum of the widths
    assert np.ma.getmaskarray(shown).diagonal().all()
    outlined = {(int(patch.get_x() + 0.5), int(patch.get_y() + 0.5)) for patch in panels[0].patches}
    assert outlined == {(1, 3), (3, 1)}
    assert _labels(panels[1].yaxis) == ["s0 · 16", "s1 · 8", "s2 · 8"]
    assert "0.06" in figure.axes[-1].get_ylabel()


def test_loss_marks_merges_and_breaks_there(merges):
    with style():
        axes = loss_figure(_events(merges), TrainConfig()).axes[0]
    training, heldout, *lines = axes.lines
    assert [line.get_xdata()[0] for line in lines] == [400, 600]
    assert _labels(axes.child_axes[0].xaxis) == ["4", "3", "2"]
    for curve in (training, heldout):
        steps, values = np.array(curve.get_xdata()), np.array(curve.get_ydata())
        assert np.isnan(values).sum() == 2
        assert steps[np.isnan(values)].min() > 400
    assert axes.get_yscale() == "linear"


@pytest.mark.parametrize("objective", ["distance", "log"])
def test_beside_the_loss_is_that_per_root_of_the_width(merges, objective):
    """Of subspaces that are Gaussian in every direction it stays where it is, though the loss jumps."""
    events = [_evaluated(0, 4.0, [16] * 4), *merges, _evaluated(800, 6.0, [16, 48])]
    events[-1]["by_subspace"] = [4.0, 48**0.5]
    with style():
        figure = loss_figure(events, TrainConfig(objective=objective))
    curve = figure.axes[1].lines[0].get_ydata()
    assert curve[0] == pytest.approx(1)
    assert curve[-1] == pytest.approx(1)
    assert "at a merge the mean jumps up" in figure.axes[1].get_xlabel()
    events[-1]["by_subspace"] = [8.0, 48**0.5]
    assert per_root_width(events[-1], objective) == pytest.approx(1.5 if objective == "distance" else 2**0.25)


def test_there_is_one_panel_where_nothing_jumps(merges):
    with style():
        assert len(loss_figure(_events([]), TrainConfig()).axes) == 1
        assert len(loss_figure(_events(merges), TrainConfig(metric="cosine")).axes) == 1


def test_loss_that_falls_far_is_logarithmic_and_escapes_are_marked():
    events = [{"event": "train", "step": step, "loss": 10 / step} for step in range(1, 100)]
    events.append({"event": "escape", "step": 50, "kept": True, "pair": [0, 1]})
    with style():
        axes = loss_figure(events, TrainConfig()).axes[0]
        assert (
            loss_figure([{**e, "loss": -e["loss"]} for e in events[:-1]], TrainConfig(metric="cosine"))
            .axes[0]
            .get_yscale()
            == "linear"
        )
    assert axes.get_yscale() == "log"
    assert "escape kept" in [text.get_text() for text in axes.get_legend().get_texts()]


def test_purity_panels_share_scale_and_show_percentages():
    with style():
        figure = purity_figure({"ndm": _purity([24, 8]), "random": _purity([24, 8])})
    panels = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in panels] == ["NDM", "random"]
    assert {axes.images[0].get_clim() for axes in panels} == {(0.0, 100.0)}
    assert _labels(panels[0].yaxis) == ["s0 · width 24", "s1 · width 8"]
    assert _texts(panels[0])[: len(SHARES)] == ["3.1%", "50%", "50%", "88%", "50%", "50%"]
    assert _labels(panels[0].xaxis)[4] == "position\n± 3"


def test_toy_is_drawn_on_a_symmetric_scale(tmp_path):
    before, after = np.array([[1.0, 0], [0, -3], [2, 2]]), np.eye(3, 2)
    with style():
        panels = [axes for axes in toy_figure(before, after, [2, 1], [1, 1]).axes if axes.images]
    assert {axes.images[0].get_clim() for axes in panels} == {(-3.0, 3.0)}
    assert [len(axes.lines) for axes in panels] == [1, 2]  # between groups; and between subspaces
    path = tmp_path / "new" / "toy.png"
    draw_toy(torch.tensor(before, requires_grad=True), after, [2, 1], [1, 1], path)
    assert _size(path)[0] > 500
    with pytest.raises(InputError, match="4 features in 2 dimensions"):
        draw_toy(before, after, [2, 2], [1, 1], path)


def test_nothing_runs_over_the_edge(merges):
    with style():
        figures = [
            loss_figure(_events(merges), TrainConfig()),
            information_figure(merges, 0.06),
            information_figure(merges[:1], 0.06),
            information_figure(merges[2:], 0.04),
            information_figure([_merge(100, [72] * 32, [(3, 9)])]),
            tree_figure(merges, 800),
            purity_figure({"ndm": _purity([1024])}),
            purity_figure({kind: _purity([8] * 24) for kind in ("ndm", "identity", "random", "pca")}),
            toy_figure(np.eye(20, 36), np.eye(20, 36), [10, 6, 4], [20, 8, 4, 2, 1, 1]),
        ]
        for figure in figures:
            figure.canvas.draw()
            drawn, page = figure.get_tightbbox(), figure.bbox_inches
            assert min(drawn.x0, drawn.y0, page.x1 - drawn.x1, page.y1 - drawn.y1) >= 0, figure.get_suptitle()


def test_labels_that_would_touch_are_thinned():
    assert thinned([0, 1, 2, 3, 10], 2) == [1, 3, 4]
    assert thinned([], 1) == []
