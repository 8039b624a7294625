"""The authors' file format, both ways, and what of it is refused."""

import json
import zipfile

import pytest
import torch
from torch import nn

from ndm_fast.errors import InputError
from ndm_fast.geometry.orthogonal import random_rotation
from ndm_fast.partition import SubspacePartition
from ndm_fast.run.load import load_partition
from ndm_fast.run.published import export_published, import_published

ROTATION = random_rotation(12, torch.Generator().manual_seed(0))


@pytest.fixture
def saved(tmp_path):
    """A file as the authors' code writes it: the state of a parametrised layer."""
    layer = nn.Module()
    layer.R = nn.utils.parametrizations.orthogonal(nn.Linear(12, 12, bias=False), "weight", "matrix_exp")
    with torch.no_grad():
        layer.R.weight = ROTATION
    path = tmp_path / "R-tiny-gpt2-x4.post.pt"
    torch.save(layer.state_dict(), path)
    (tmp_path / "R_config-tiny-gpt2-x4.post.json").write_text('{"partition": [6, 4, 2]}')
    return path


def test_the_matrix_is_used_as_it_lies_there(saved):
    partition = load_partition(saved)
    assert torch.equal(partition.rotation, ROTATION)
    assert partition.widths == (6, 4, 2)
    assert partition.source["model"] == "tiny-gpt2"
    assert partition.source["site"] == "x4.post"


def test_export_is_what_their_layer_loads(saved, tmp_path):
    partition = SubspacePartition(ROTATION.flip(1), [8, 4])
    out = export_published(partition, tmp_path / "new" / "R-a-x0.post.pt")
    layer = nn.Module()
    layer.R = nn.utils.parametrizations.orthogonal(nn.Linear(12, 12, bias=False), "weight", "matrix_exp")
    layer.load_state_dict(torch.load(out[0], weights_only=True))
    torch.testing.assert_close(layer.R.weight, partition.rotation)
    assert json.loads(out[1].read_text()) == {"partition": [8, 4]}
    again = import_published(out[0])
    assert torch.equal(again.rotation, partition.rotation)
    assert again.widths == partition.widths


def test_own_folders_load_by_the_same_name(tmp_path):
    SubspacePartition(ROTATION, [12]).save_pretrained(tmp_path / "mine")
    assert torch.equal(load_partition(tmp_path / "mine").rotation, ROTATION)


def test_a_matrix_that_is_not_orthogonal_is_refused(saved):
    torch.save({"R.parametrizations.weight.0.base": 1.01 * ROTATION}, saved)
    with pytest.raises(InputError, match="not orthogonal"):
        import_published(saved)


def test_only_tensors_are_unpickled(saved):
    torch.save({"R.parametrizations.weight.0.base": ROTATION, "run": print}, saved)
    with pytest.raises(InputError, match="no plain torch dictionary"):
        import_published(saved)


def test_damaged_or_missing_files(saved):
    with pytest.raises(InputError, match=r"not named R-<model>-<site>\.pt"):
        import_published(saved.with_name("matrix.pt"))
    with pytest.raises(InputError, match="cannot read"):
        import_published(saved.with_name("R-none-x0.post.pt"))
    torch.save({"weight": ROTATION}, saved)
    with pytest.raises(InputError, match="holds no tensor"):
        import_published(saved)
    torch.save({"R.parametrizations.weight.0.base": ROTATION}, saved)
    config = saved.with_name("R_config-tiny-gpt2-x4.post.json")
    config.write_text("{}")
    with pytest.raises(InputError, match=r"it has no 'partition'.*get the file"):
        import_published(saved)
    config.write_text('{"partition": [6, 4]}')
    with pytest.raises(InputError, match="sum to 10"):
        import_published(saved)
    config.unlink()
    with pytest.raises(InputError, match=r"json is missing: get the file"):
        import_published(saved)


KEY = "R.parametrizations.weight.0.base"
ODD = [
    (lambda: torch.empty(0, 0), r"of shape \[0, 0\]"),
    (lambda: torch.empty(12), r"of shape \[12\]"),
    (lambda: ROTATION[:, :6], r"of shape \[12, 6\]"),
    (ROTATION.to_sparse, "sparse"),
    (ROTATION.to_sparse_csr, "sparse"),
    (lambda: ROTATION.to("meta"), "without values"),
    (lambda: torch.quantize_per_tensor(ROTATION, 0.01, 0, torch.qint8), "quantised"),
    (lambda: ROTATION.to(torch.complex64), "of torch.complex64"),
    (lambda: torch.eye(12, dtype=torch.int64), "of torch.int64"),
    (lambda: torch.ones(1).expand(1 << 20, 1 << 20), r"of shape \[1048576, 1048576\] but has 4 bytes"),
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("content", "says"), ODD, ids=range(len(ODD)))
def test_what_is_no_dense_real_matrix_is_refused(saved, content, says):
    torch.save({KEY: content()}, saved)
    with pytest.raises(InputError, match=f"the matrix in .* is {says}.*: save it again"):
        import_published(saved)


def test_a_small_file_that_unpacks_to_a_large_one_is_refused(saved, monkeypatch):
    """Before torch reads it."""
    torch.save({KEY: torch.zeros(600, 600)}, saved)
    with zipfile.ZipFile(saved) as plain:
        parts = {name: plain.read(name) for name in plain.namelist()}
    with zipfile.ZipFile(saved, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, part in parts.items():
            packed.writestr(name, part)
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(InputError, match="which no file of torch does"):
        import_published(saved)


def test_noise_for_the_widths_or_the_matrix_is_refused(saved):
    config = saved.with_name("R_config-tiny-gpt2-x4.post.json")
    for content in (b"\xff\xfe", b"[" * 100_000, b"[]", b'{"partition": [6, "4"]}', b'{"partition": {}}'):
        config.write_bytes(content)
        with pytest.raises(InputError, match=r"is damaged .*: get the file") as refusal:
            import_published(saved)
        assert "\n" not in str(refusal.value)
    content = saved.read_bytes()
    for place in range(0, len(content), 97):
        saved.write_bytes(content[:place] + b"\xff" + content[place + 1 :])
        with pytest.raises(InputError) as refusal:
            import_published(saved)
        assert "\n" not in str(refusal.value)
