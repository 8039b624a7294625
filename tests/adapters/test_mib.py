"""Featurizers of MIB's causal-variable track, read back in the steps of the track's loader."""

import json

import pytest
import torch
from adapter_cases import PARTITION, WIDTH, installed

from ndm_fast.adapters.mib import write_featurizer
from ndm_fast.errors import InputError
from ndm_fast.partition import SubspacePartition

NAME = "ResidualStream(Layer-5,Token-last_token)"


def read_back(path, layer):
    """Columns [d, k] as ``Featurizer.load_modules`` of the track gets them, of either file.

    Args:
        layer: makes an empty [d, k] rotation layer.
    """
    content = torch.load(path, map_location="cpu")  # weights only, as by default
    config = content["model_info"]["additional_config"]
    rotate = layer(*config["rotation_matrix"].shape)
    rotate.weight.data.copy_(config["rotation_matrix"])
    rotate = torch.nn.utils.parametrizations.orthogonal(rotate)
    rotate.requires_grad_(config["requires_grad"])
    module = torch.nn.Module()
    module.rotate = rotate
    module.load_state_dict(content["state_dict"])  # every key, no other
    return module.rotate.weight


class Plain(torch.nn.Module):
    def __init__(self, d, k):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(d, k))


@pytest.mark.parametrize("subspaces", [[1], [2, 0], [0, 1, 2]])
def test_the_projection_is_the_partition_s(tmp_path, subspaces):
    check(tmp_path, subspaces, Plain)


@pytest.mark.parametrize("subspaces", [[1], [2, 0], [0, 1, 2]])
def test_with_the_rotation_layer_that_the_track_uses(tmp_path, subspaces):
    layers = installed("pyvene").models.layers
    check(tmp_path, subspaces, lambda d, k: layers.LowRankRotateLayer(d, k, init_orth=False))


def check(folder, subspaces, layer):
    paths = write_featurizer(PARTITION, subspaces, folder, token="last_token", site="x4.post")
    assert [p.name for p in paths] == [f"{NAME}_{k}" for k in ("featurizer", "inverse_featurizer", "indices")]
    assert json.loads(paths[2].read_text()) is None
    base, source = torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(0))
    columns = read_back(paths[0], layer)
    features, error = base @ columns, base - base @ columns @ columns.T
    assert features.shape[1] == sum(PARTITION.widths[s] for s in subspaces)
    swapped = (source @ columns) @ read_back(paths[1], layer).T + error
    expected = base + sum(PARTITION.project(source - base, s) for s in subspaces)
    assert (swapped - expected).abs().max() < 1e-5
    info = torch.load(paths[1])["model_info"]
    assert info["featurizer_class"] == "SubspaceFeaturizerModule"
    assert info["inverse_featurizer_class"] == "SubspaceInverseFeaturizerModule"
    assert info["n_features"] == features.shape[1]


def test_the_partition_s_own_site_and_the_same_bytes_again(tmp_path):
    partition = SubspacePartition(PARTITION.rotation, PARTITION.widths, {"site": "blocks.5.hook_resid_pre"})
    first, *_ = write_featurizer(partition, [1], tmp_path / "new" / "folder", token="last_token")
    again, *_ = write_featurizer(partition, [1], tmp_path, token="last_token")
    assert first.name == again.name == f"{NAME}_featurizer"
    assert first.read_bytes() == again.read_bytes()


@pytest.mark.parametrize(
    ("subspaces", "token", "site", "why"),
    [
        ([3], "last_token", "x4.post", "subspace 3 does not exist"),
        ([], "last_token", "x4.post", "give at least one"),
        ([1, 1], "last_token", "x4.post", "each once"),
        ([1], "the last, token", "x4.post", "cannot be part of a file's name"),
        ([1], "last_token", "x4.mid", "not x4.mid: give a site such as"),
        ([1], "last_token", None, "not an unnamed site"),
    ],
)
def test_bad_input_is_one_line(tmp_path, subspaces, token, site, why):
    with pytest.raises(InputError, match=why):
        write_featurizer(PARTITION, subspaces, tmp_path / "out", token=token, site=site)
    assert not (tmp_path / "out").exists()
