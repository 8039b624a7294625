"""``--revision`` and ``--trust-remote-code`` of every kind of ``evaluate`` that loads a model by name."""

from __future__ import annotations

import json

import pytest
import torch

from ndm_fast.errors import InputError
from ndm_fast.evaluate import information
from ndm_fast.evaluate.patching import language_model
from ndm_fast.evaluate.revision import trained_on
from ndm_fast.partition import SubspacePartition

PLAIN = {"revision": None, "trust_remote_code": False}


@pytest.fixture
def asked(monkeypatch):
    """Models that were to be loaded, each with its hub options; loading them ends the command."""
    made = []

    def load_model(name, *_, device="cpu", head=False, **hub):
        made.append((name, hub))
        raise InputError("stopped here")

    for module in (language_model, information):
        monkeypatch.setattr(module, "load_model", load_model)
    return made


@pytest.fixture
def commands(tmp_path):
    """The commands by kind; the partition was trained on revision v1 of someone/model."""
    source = {"model": "someone/model", "site": "x0.post", "harvest": {"revision": "v1"}}
    SubspacePartition(torch.eye(8), [4, 4], source).save_pretrained(tmp_path / "partition")
    (tmp_path / "entities.json").write_text(json.dumps({"Rome": {"Country": "Italy"}}))
    (tmp_path / "texts.json").write_text(json.dumps({"Country": ["%s lies in"]}))
    pair = {
        "base": ["a"],
        "src": ["b"],
        "base_type": "x",
        "src_type": "y",
        "base_label": "c",
        "src_label": "d",
        "task": "t",
    }
    (tmp_path / "pairs.json").write_text(json.dumps([pair]))
    partition, model = tmp_path / "partition", ["--model", "someone/model"]
    ravel = ["--entities", tmp_path / "entities.json", "--texts", tmp_path / "texts.json"]
    return {
        "trace": model,
        "circuits": [partition, *model],
        "conflict": [partition, *ravel, "--attribute", "Country"],
        "causalgym": [tmp_path / "pairs.json", "--partition", partition, *model],
        "mi": [partition],
    }


@pytest.mark.parametrize("kind", ["trace", "circuits", "conflict", "causalgym", "mi"])
def test_the_flags_reach_the_loader(ndm, asked, commands, tmp_path, kind):
    out = [] if kind == "mi" else ["--out", tmp_path / "out"]
    command = ["evaluate", kind, *commands[kind], *out]
    assert ndm(*command).refusal() == "stopped here"
    assert ndm(*command, "--revision", "v2", "--trust-remote-code").refusal() == "stopped here"
    own = None if kind == "trace" else "v1"
    assert asked == [
        ("someone/model", {"revision": own, "trust_remote_code": False}),
        ("someone/model", {"revision": "v2", "trust_remote_code": True}),
    ]


def test_a_partition_never_makes_code_run():
    harvest = {"revision": "v1", "trust_remote_code": True}
    source = {"model": "someone/model", "harvest": harvest}
    assert trained_on("someone/model", None, source) == {"revision": "v1", "trust_remote_code": False}


def test_a_revision_belongs_to_its_model():
    v1, v2 = ({"model": "someone/model", "harvest": {"revision": r}} for r in ("v1", "v2"))
    assert trained_on("another/model", None, v1) == PLAIN
    assert trained_on("someone/model", None, {"model": "someone/model"}) == PLAIN
    with pytest.raises(InputError, match=r"several revisions of someone/model \(v1, v2\): pass --revision"):
        trained_on("someone/model", None, v1, v2)
    assert trained_on("someone/model", {"revision": "v2"}, v1, v2)["revision"] == "v2"
