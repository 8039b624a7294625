"""Partitions as SAEs of SAELens, and SAEs of SAELens in ``evaluate sae``."""

import json
from importlib import import_module

import pytest
import torch
from adapter_cases import PARTITION, WIDTH, WIDTHS, installed

from ndm_fast.adapters.sae_lens import as_sae, directions
from ndm_fast.errors import InputError
from ndm_fast.evaluate.autoencoder import compare_autoencoder
from ndm_fast.partition import SubspacePartition

SOURCE = {"model": "gpt2", "site": "blocks.1.hook_resid_post"}


@pytest.fixture(scope="module", autouse=True)
def sae_lens(one_thread):
    return installed("sae_lens")


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(0)
    return 3 + torch.randn(500, WIDTH, generator=generator) @ torch.randn(WIDTH, WIDTH, generator=generator)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, rows, sae_lens):
    folder = tmp_path_factory.mktemp("sae")
    as_sae(SubspacePartition(PARTITION.rotation, WIDTHS, SOURCE), rows).save_model(folder)
    return folder


def test_loaded_by_saelens_it_is_an_exact_change_of_basis(saved, rows, sae_lens):
    sae = sae_lens.SAE.load_from_disk(str(saved))
    assert type(sae) is sae_lens.StandardSAE
    assert sae.cfg.d_sae == 2 * WIDTH
    features = sae.encode(rows)
    assert (sae.decode(features) - rows).abs().max() < 1e-4
    assert features.min() >= 0
    assert ((features > 0).sum(1) == WIDTH).float().mean() > 0.99  # one of each pair: not sparse


def test_features_belong_to_subspaces_and_follow_their_principal_axes(saved, rows, sae_lens):
    sae = sae_lens.SAE.load_from_disk(str(saved))
    owner = torch.tensor(sae.cfg.metadata["ndm_subspaces"])
    assert sae.cfg.metadata["hook_name"] == SOURCE["site"]
    assert "not a trained autoencoder" in sae.cfg.metadata["made_by"]
    features = sae.encode(rows)
    for s in range(len(WIDTHS)):
        part = features[:, owner == s] @ sae.W_dec[owner == s]
        assert (part - PARTITION.project(rows - rows.mean(0), s)).abs().max() < 1e-4
        coordinates = features[:, owner == s][:, ::2] - features[:, owner == s][:, 1::2]
        covariance = torch.cov(coordinates.T)
        variances = covariance.diagonal()
        assert (covariance - torch.diag(variances)).abs().max() < 1e-3 * variances.max()
        assert (variances.diff() <= 0).all()


def test_a_saved_sae_goes_into_evaluate_sae(saved, tmp_path, sae_lens, ndm):
    """Features that lie inside the subspaces do so wholly; the folder serves as well as the file."""
    SubspacePartition(PARTITION.rotation, WIDTHS, SOURCE).save_pretrained(tmp_path / "partition")
    found = ndm("evaluate", "sae", tmp_path / "partition", "--decoder", saved, "--json")
    assert found.code == 0, found.err
    rows = {row["method"]: row for row in json.loads(found.out)}
    assert rows["ndm"]["mean_top_energy"] == pytest.approx(1, abs=1e-5)
    assert rows["random"]["mean_top_energy"] < 0.8
    assert found.err == ""
    file = ndm(
        "evaluate", "sae", tmp_path / "partition", "--decoder", saved / "sae_weights.safetensors", "--json"
    )
    assert file.out == found.out


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "topk", "gated"])
def test_directions_of_saes_of_all_kinds(architecture, tmp_path, sae_lens, ndm):
    sae_class, config_class = import_module("sae_lens.registry").get_sae_class(architecture)
    extra = {"k": 4} if architecture == "topk" else {}
    sae = sae_class(config_class(d_in=WIDTH, d_sae=80, **extra))
    torch.nn.init.normal_(sae.W_dec, generator=torch.Generator().manual_seed(0))
    found = directions(sae)
    assert found.shape == (80, WIDTH)
    assert (found.norm(dim=1) - 1).abs().max() < 1e-6
    sae.save_model(tmp_path / "sae")
    PARTITION.save_pretrained(tmp_path / "partition")
    printed = ndm("evaluate", "sae", tmp_path / "partition", "--decoder", tmp_path / "sae", "--json")
    assert json.loads(printed.out) == compare_autoencoder(PARTITION, found)


def test_an_sae_of_another_site_is_said(saved, tmp_path, ndm):
    other = {**SOURCE, "site": "blocks.0.hook_resid_post"}
    SubspacePartition(PARTITION.rotation, WIDTHS, other).save_pretrained(tmp_path)
    found = ndm("evaluate", "sae", tmp_path, "--decoder", saved)
    assert found.code == 0
    assert "is of blocks.1.hook_resid_post, the partition of blocks.0.hook_resid_post" in found.err
    same = {**SOURCE, "site": "blocks.2.hook_resid_pre"}  # the input of the next block is the same tensor
    SubspacePartition(PARTITION.rotation, WIDTHS, same).save_pretrained(tmp_path)
    assert ndm("evaluate", "sae", tmp_path, "--decoder", saved).err == ""


def test_bad_input_is_one_line(rows, tmp_path, ndm):
    with pytest.raises(InputError, match=r"shape \[500, 31\]: give at least two activations, 32 wide"):
        as_sae(PARTITION, rows[:, 1:])
    with pytest.raises(InputError, match="Linear has no decoder W_dec"):
        directions(torch.nn.Linear(2, 2))
    PARTITION.save_pretrained(tmp_path / "partition")
    (tmp_path / "empty").mkdir()
    refused = ndm("evaluate", "sae", tmp_path / "partition", "--decoder", tmp_path / "empty").refusal()
    assert "holds no sae_weights.safetensors" in refused
