"""SubspacePartition: its identities, its files, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ndm_fast.errors import InputError
from ndm_fast.geometry.orthogonal import random_rotation
from ndm_fast.partition import SubspacePartition, orthogonality_error

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTHS = (5, 3, 3, 1)


def make(widths: tuple[int, ...] = WIDTHS, source: dict[str, Any] | None = None) -> SubspacePartition:
    rotation = random_rotation(sum(widths), torch.Generator().manual_seed(0))
    return SubspacePartition(rotation, widths, source)


@settings(max_examples=40)
@given(widths=st.lists(st.integers(1, 6), min_size=1, max_size=6), shape=st.sampled_from([(), (4,), (2, 3)]))
def test_identities(widths, shape):
    partition = make(tuple(widths))
    rows = torch.randn(*shape, sum(widths))
    rotated = partition.rotate(rows)
    torch.testing.assert_close(rotated, rows @ partition.rotation)
    torch.testing.assert_close(partition.unrotate(rotated), rows, rtol=1e-4, atol=1e-5)
    parts = partition.split(rows)
    assert [part.shape for part in parts] == [(*shape, width) for width in widths]
    assert torch.equal(torch.cat(parts, dim=-1), rotated)
    projected = [partition.project(rows, s) for s in range(len(partition))]
    torch.testing.assert_close(sum(projected), rows, rtol=1e-4, atol=1e-5)
    for s, (part, projection) in enumerate(zip(parts, projected, strict=True)):
        torch.testing.assert_close(projection, part @ partition.basis(s).T, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(partition.project(projection, s), projection, rtol=1e-4, atol=1e-5)
    assert partition.offsets == tuple(sum(widths[:s]) for s in range(len(widths)))
    assert partition.width == sum(widths)
    assert partition.orthogonality_error() < 1e-5


def test_half_precision_activations_keep_their_dtype():
    rows = torch.randn(2, 12, dtype=torch.bfloat16)
    partition = make()
    assert partition.rotate(rows).dtype == partition.project(rows, 0).dtype == torch.bfloat16


def test_the_rotation_is_a_copy_and_part_of_the_state():
    rotation = torch.eye(4)
    partition = SubspacePartition(rotation, [2, 2])
    rotation[0, 0] = 7
    assert partition.orthogonality_error() == 0
    assert set(partition.state_dict()) == {"rotation"}
    assert "widths=[2, 2]" in repr(partition)


def test_merge_joins_the_spaces_and_orders_by_width():
    partition = make(source={"model": "m"})
    merged = partition.merge([(3, 1), (0, 2)])
    assert merged.widths == (8, 4)
    assert merged.source == {"model": "m"}
    rows = torch.randn(7, 12)
    for new, old in ((0, (0, 2)), (1, (1, 3))):
        torch.testing.assert_close(merged.project(rows, new), sum(partition.project(rows, s) for s in old))
    assert partition.widths == WIDTHS
    assert torch.equal(partition.merge([]).rotation, partition.rotation)


def test_merge_keeps_the_order_of_equal_widths():
    partition = SubspacePartition(torch.eye(4), [1, 1, 1, 1])
    merged = partition.merge([(1, 2)])
    assert merged.widths == (2, 1, 1)
    assert merged.rotation.argmax(0).tolist() == [1, 2, 0, 3]


@pytest.mark.parametrize(
    "pairs", [[(0, 0)], [(0, 4)], [(-1, 0)], [(0, 1), (1, 2)], [(0, 1), (0, 2)], [(2, 1), (0, 2)]]
)
def test_pairs_that_overlap_or_do_not_exist_are_refused(pairs):
    with pytest.raises(InputError, match="give disjoint pairs of the 4 subspaces"):
        make().merge(pairs)


def nearly(rotation: torch.Tensor) -> torch.Tensor:
    rotation[0, 0] += 1e-3
    return rotation


BAD: list[tuple[Any, Any, str]] = [
    (torch.ones(4, 4), [2, 2], "not orthogonal"),
    (nearly(torch.eye(4)), [2, 2], "not orthogonal"),
    (torch.zeros(4, 4), [2, 2], "not orthogonal"),
    (torch.full((4, 4), float("nan")), [2, 2], "not orthogonal"),
    (torch.eye(4) * float("inf"), [2, 2], "not orthogonal"),
    (torch.eye(4)[:, :3], [2, 1], "square"),
    (torch.eye(4)[0], [4], "square"),
    (torch.eye(4), [2, 1], "sum to 3, the rotation is 4 wide"),
    (torch.eye(4), [2, 3], "sum to 5"),
    (torch.eye(4), [5, -1], "give positive widths"),
    (torch.eye(4), [4, 0], "give positive widths"),
    (torch.eye(4), [], "sum to 0"),
]


@pytest.mark.parametrize(("rotation", "widths", "says"), BAD)
def test_bad_matrices_and_widths_are_refused(rotation, widths, says):
    with pytest.raises(InputError, match=says) as refusal:
        SubspacePartition(rotation, widths)
    assert "\n" not in str(refusal.value)


def test_orthogonality_error_finds_the_largest_entry():
    rotation = torch.eye(3)
    rotation[0, 1] = 0.5
    assert orthogonality_error(rotation) == pytest.approx(0.5)


@pytest.mark.parametrize("use", ["rotate", "unrotate", "split"])
def test_activations_of_another_width_are_refused(use):
    with pytest.raises(InputError, match="activations are 11 wide, the partition is for 12"):
        getattr(make(), use)(torch.zeros(2, 11))


@pytest.mark.parametrize("subspace", [-1, 4])
def test_subspaces_that_do_not_exist_are_refused(subspace):
    with pytest.raises(InputError, match="there are 4, counted from 0"):
        make().project(torch.zeros(2, 12), subspace)
    with pytest.raises(InputError, match="activations are 11 wide"):
        make().project(torch.zeros(2, 11), 0)


def test_saved_and_loaded_partitions_are_the_same(tmp_path):
    source = {"model": "gpt2", "site": "blocks.3.hook_resid_post", "seed": 3, "note": None}
    partition = make(source=source)
    partition.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "config.json", "partition.safetensors"]
    loaded = SubspacePartition.from_pretrained(tmp_path)
    assert torch.equal(loaded.rotation, partition.rotation)
    assert loaded.widths == partition.widths
    assert loaded.source == source
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert (again / "partition.safetensors").read_bytes() == (tmp_path / "partition.safetensors").read_bytes()


def test_the_card_is_whole_or_not_there(tmp_path, monkeypatch):
    """The mixin writes it in place, and leaves alone one that is there, which a kill may have cut."""
    monkeypatch.setattr("huggingface_hub.ModelCard.save", lambda *_: pytest.fail("written in place"))
    monkeypatch.setattr(SubspacePartition, "generate_model_card", lambda _, **asked: asked)
    make().save_pretrained(tmp_path, model_card_kwargs={"author": "me"})
    assert (tmp_path / "README.md").read_text() == "{'author': 'me'}"
    (tmp_path / "README.md").write_text("mine")
    make().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_push_to_hub_uploads_the_same_files(tmp_path, monkeypatch):
    sent: dict[str, Any] = {}

    class FakeApi:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            pass

        def create_repo(self, repo_id: str, **kwargs: Any) -> Any:
            return type("Url", (), {"repo_id": repo_id})()

        def upload_folder(self, *, repo_id: str, folder_path: str | Path, **kwargs: Any) -> str:
            sent["repo"] = repo_id
            for path in Path(folder_path).iterdir():
                sent[path.name] = path.read_bytes()
            return "done"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", FakeApi)
    make(source={"model": "m"}).push_to_hub("someone/partition")
    make(source={"model": "m"}).save_pretrained(tmp_path)
    assert sent["repo"] == "someone/partition"
    for path in tmp_path.iterdir():
        assert sent[path.name] == path.read_bytes()
    card = sent["README.md"].decode()
    assert "library_name: ndm_fast" in card
    assert "license: apache-2.0" in card
    assert "2508.01916" in card


def test_names_that_lead_nowhere_are_refused(tmp_path):
    with pytest.raises(InputError, match="is neither a folder nor a repository"):
        SubspacePartition.from_pretrained("someone/nothing")
    with pytest.raises(InputError, match="is neither a folder nor a repository"):
        SubspacePartition.from_pretrained("no such/name at/all")
    with pytest.raises(InputError, match="is not a saved partition"):
        SubspacePartition.from_pretrained(tmp_path)


def cut(folder: Path) -> None:
    path = folder / "partition.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


def overwrite(name: str, content: bytes) -> Any:
    return lambda folder: (folder / name).write_bytes(content)


def stretch(folder: Path) -> None:
    tensors = load_file(folder / "partition.safetensors")
    save_file({"rotation": tensors["rotation"] * 1.5}, folder / "partition.safetensors")


DAMAGES: list[tuple[str, Any, str]] = [
    ("cut", cut, "is damaged"),
    ("empty", overwrite("partition.safetensors", b""), "is damaged"),
    ("noise", overwrite("partition.safetensors", b"\xff" * 200), "is damaged"),
    ("stretched", stretch, "its checksum does not match"),
    ("other tensor", lambda f: save_file({"x": torch.eye(2)}, f / "partition.safetensors"), "is damaged"),
    ("no config", lambda f: (f / "config.json").unlink(), "config.json is missing"),
    ("no weights", lambda f: (f / "partition.safetensors").unlink(), "partition.safetensors is missing"),
    ("cut config", overwrite("config.json", b'{"widths": [5'), "is damaged"),
    ("bytes config", overwrite("config.json", b"\xff\xfe\x00"), "is damaged"),
    ("list config", overwrite("config.json", b"[1]"), "is damaged"),
    ("word widths", overwrite("config.json", b'{"widths": "abc"}'), "is damaged"),
    ("number widths", overwrite("config.json", b'{"widths": 12}'), "is damaged"),
    ("other widths", overwrite("config.json", json.dumps({"widths": [5, 5]}).encode()), "checksum"),
]


@pytest.mark.parametrize(
    ("damage", "says"), [(d, s) for _, d, s in DAMAGES], ids=[name for name, _, _ in DAMAGES]
)
def test_damaged_files_are_refused(tmp_path, damage, says):
    make().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=says) as refusal:
        SubspacePartition.from_pretrained(tmp_path)
    assert str(tmp_path) in str(refusal.value)
