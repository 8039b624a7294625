"""Matching of subspaces, its score, and the comparison with an autoencoder's features."""

import json

import pytest
import torch
from safetensors.torch import save_file

from ndm_fast.errors import InputError
from ndm_fast.evaluate.autoencoder import cluster_directions, compare_autoencoder, read_decoder
from ndm_fast.evaluate.stability import match_subspaces, stability
from ndm_fast.geometry.orthogonal import random_rotation
from ndm_fast.partition import SubspacePartition

WIDTHS = (8, 8, 4, 4)
ROTATION = random_rotation(24, torch.Generator().manual_seed(0))
PARTITION = SubspacePartition(ROTATION, WIDTHS)


def turned_inside(order=(1, 0, 3, 2)):
    """The same subspaces in another order, each turned inside itself."""
    generator = torch.Generator().manual_seed(1)
    bases = [PARTITION.basis(s) @ random_rotation(WIDTHS[s], generator) for s in order]
    return SubspacePartition(torch.cat(bases, 1), [WIDTHS[s] for s in order])


def test_a_partition_turned_inside_its_subspaces_is_the_same():
    found = match_subspaces(PARTITION, turned_inside())
    assert found.pairs == [(0, 1), (1, 0), (2, 3), (3, 2)]
    assert found.score == pytest.approx(1, abs=1e-5)
    assert found.overlap[0, 0] == pytest.approx(0, abs=1e-5)


def test_chance_is_what_random_partitions_reach():
    """Without choosing the pairs; with the best pairing random partitions are somewhat above."""
    scores = []
    for seed in range(30):
        other = SubspacePartition(random_rotation(24, torch.Generator().manual_seed(100 + seed)), WIDTHS)
        found = match_subspaces(PARTITION, other)
        scores.append(sum(float(found.overlap[s, s]) * WIDTHS[s] / 24 for s in range(4)))
    expected = sum(p * p for p in WIDTHS) / 24**2
    assert sum(scores) / 30 == pytest.approx(expected, rel=0.1)
    assert found.chance == pytest.approx(expected, rel=0.3)


def test_unequal_numbers_leave_some_alone():
    merged = PARTITION.merge([(2, 3)])
    found = match_subspaces(PARTITION, merged)
    assert found.pairs[:2] == [(0, 0), (1, 1)]
    assert len(found.pairs) == 3
    assert 0.5 < found.score < 1


def test_all_pairs_of_runs_and_the_figure(tmp_path, ndm):
    folders = []
    for name, partition in {"a": PARTITION, "b": turned_inside(), "c": PARTITION.merge([(0, 1)])}.items():
        partition.save_pretrained(tmp_path / name)
        folders.append(tmp_path / name)
    outcome = ndm("evaluate", "stability", *folders, "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    saved = json.loads((tmp_path / "out" / "stability.json").read_text())
    assert [pair["score"] == pytest.approx(1, abs=1e-5) for pair in saved["pairs"]] == [True, False, False]
    assert (tmp_path / "out" / "stability.png").stat().st_size > 10_000
    assert "at least two" in ndm("evaluate", "stability", folders[0]).refusal()


def test_partitions_of_different_widths_are_refused():
    with pytest.raises(InputError, match="width 24 and 8"):
        stability({"a": PARTITION, "b": SubspacePartition(torch.eye(8), [8])})


@pytest.fixture
def decoder():
    """Features inside the subspaces of PARTITION: 60 in each."""
    generator = torch.Generator().manual_seed(2)
    parts = [torch.randn(60, WIDTHS[s], generator=generator) @ PARTITION.basis(s).T for s in range(4)]
    return torch.nn.functional.normalize(torch.cat(parts), dim=1)


def test_features_inside_subspaces_are_seen(decoder):
    rows = {row["method"]: row for row in compare_autoencoder(PARTITION, decoder)}
    assert rows["ndm"]["mean_top_energy"] == pytest.approx(1, abs=1e-5)
    assert rows["ndm"]["overlap_with_ndm"] == pytest.approx(1, abs=1e-5)
    assert rows["random"]["mean_top_energy"] < 0.7
    assert rows["identity"]["overlap_with_ndm"] < 0.6
    assert rows["autoencoder_clusters"]["overlap_with_ndm"] > rows["random"]["overlap_with_ndm"]


def test_groups_of_parallel_features_are_found():
    generator = torch.Generator().manual_seed(3)
    sign = torch.randint(2, (90, 1), generator=generator) * 2.0 - 1
    axes = torch.eye(6)[:3].repeat_interleave(30, 0)
    directions = torch.nn.functional.normalize(sign * axes + 0.05 * torch.randn(90, 6, generator=generator))
    found = cluster_directions(directions, 3, seed=1)
    assert sorted(len(set(part.tolist())) for part in found.split(30)) == [1, 1, 1]
    assert len(set(found.tolist())) == 3
    with pytest.raises(InputError, match="cannot form 91 groups"):
        cluster_directions(directions, 91)


def test_the_command_reads_the_usual_files(decoder, tmp_path, ndm):
    PARTITION.save_pretrained(tmp_path / "p")
    save_file({"W_dec": decoder.contiguous(), "b_dec": torch.zeros(24)}, tmp_path / "sae.safetensors")
    save_file({"other": decoder.T.contiguous()}, tmp_path / "turned.safetensors")
    command = ["evaluate", "sae", tmp_path / "p", "--decoder"]
    assert "autoencoder_clusters" in ndm(*command, tmp_path / "sae.safetensors").out
    assert "name the decoder" in ndm(*command, tmp_path / "turned.safetensors").refusal()
    turned = ndm(*command, tmp_path / "turned.safetensors", "--tensor", "other", "--json")
    assert json.loads(turned.out)[0]["mean_top_energy"] == pytest.approx(1, abs=1e-5)
    with pytest.raises(InputError, match="none of it 23"):
        read_decoder(tmp_path / "sae.safetensors", 23)
    with pytest.raises(InputError, match="cannot read"):
        read_decoder(tmp_path / "none.safetensors", 24)
