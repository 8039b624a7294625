"""Minimal pairs: reading, aligned spans, and log odds ratios against patches by hand."""

import json

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from ndm_fast.activations.hooks import collect_activations, replace_activations
from ndm_fast.errors import InputError
from ndm_fast.evaluate.causalgym import run_causalgym
from ndm_fast.evaluate.minimal_pairs import read_pairs
from ndm_fast.evaluate.patching.language_model import load_language_model
from ndm_fast.geometry.orthogonal import random_rotation
from ndm_fast.partition import SubspacePartition

PAIR = {
    "base": ["<|endoftext|>a", " dog", " likes the"],
    "src": ["<|endoftext|>a", " red old cat", " likes the"],
    "base_type": "one",
    "src_type": "two",
    "base_label": " tree",
    "src_label": " house",
    "task": "animals",
}
GONE = {
    **PAIR,
    "base": ["<|endoftext|>the", "", " likes the"],
    "src": ["<|endoftext|>the", " bird", " sees the"],
}


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Tiny tensors."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, loaded):
    made = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    sizes = {"n_positions": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "initializer_range": 0.4}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(loaded[1]), **sizes)).save_pretrained(made)
    loaded[1].save_pretrained(made)
    return made


@pytest.fixture
def partition():
    rotation = random_rotation(32, torch.Generator().manual_seed(0))
    return SubspacePartition(rotation, [20, 12], {"site": "x1.post"})


@pytest.fixture
def file(tmp_path):
    (tmp_path / "pairs.json").write_text(json.dumps([PAIR, GONE]))
    return tmp_path / "pairs.json"


def by_hand(folder, partition, base, src, positions, labels, subspaces):
    """Log odds of the labels with subspaces of one token taken from another sentence."""
    model, tokenizer = load_language_model(str(folder))
    tokens = [torch.tensor([[tokenizer.bos_token_id, *tokenizer(t)["input_ids"]]]) for t in (base, src)]
    with collect_activations(model, ["x1.post"]) as captured:
        model(tokens[1])
    basis = torch.cat([partition.basis(s) for s in subspaces], 1)

    def change(h):
        h[0, positions[0]] += (captured["x1.post"][0, positions[1]] - h[0, positions[0]]) @ basis @ basis.T
        return h

    with replace_activations(model, {"x1.post": change}):
        chances = model(tokens[0]).logits[0, -1].log_softmax(0)
    first, second = (tokenizer(label)["input_ids"][0] for label in labels)
    return float(chances[first] - chances[second])


def test_effects_are_log_odds_ratios_at_the_last_tokens_of_spans(folder, partition, file):
    found = run_causalgym(partition, read_pairs(file)[:1], str(folder))
    assert [(e.task, e.span, e.text) for e in found] == [
        ("animals", n, text) for n, text in enumerate(PAIR["base"])
    ]
    _, tokenizer = load_language_model(str(folder))
    base, src = "a dog likes the", "a red old cat likes the"
    ends = [len(tokenizer(text)["input_ids"]) for text in ("a dog", "a red old cat")]  # BOS comes before
    labels = " tree", " house"
    clean = by_hand(folder, partition, base, base, (1, 1), labels, [0, 1])
    assert found[1].clean == pytest.approx(clean, abs=1e-4)
    for subspace in (0, 1):
        patched = by_hand(folder, partition, base, src, ends, labels, [subspace])
        assert found[1].effect["ndm"][subspace] == pytest.approx(clean - patched, abs=1e-4)
    patched = by_hand(folder, partition, base, src, ends, labels, [0, 1])
    assert found[1].whole == pytest.approx(clean - patched, abs=1e-4)
    assert abs(found[1].whole) > 1e-3
    assert list(found[0].effect) == ["ndm", "identity", "random"]
    assert found[0].whole == pytest.approx(0, abs=1e-4)  # the same token after the same tokens


def test_a_span_that_a_side_lacks_is_left_out(folder, partition, file):
    assert [(e.span, e.pairs) for e in run_causalgym(partition, read_pairs(file), str(folder))] == [
        (0, 2),
        (1, 1),
        (2, 2),
    ]


def swapped(pair):
    sides = {
        name: name.replace("base", "src") if "base" in name else name.replace("src", "base") for name in pair
    }
    return {sides[name]: value for name, value in pair.items()}


def test_a_span_and_its_subspaces_are_chosen_on_other_pairs(folder, partition, tmp_path):
    """Pairs 0 and 2 choose, 1 and 3 are measured; a pair and itself swapped are on the same side."""
    nouns = [" dog", " cat", " bird", " house"]
    pairs = [
        {
            **PAIR,
            "base": ["<|endoftext|>", "a", noun, " likes the"],
            "src": ["<|endoftext|>", "the", noun, " sees the"],
        }
        for noun in nouns
    ]
    both = [each for pair in pairs for each in (pair, swapped(pair))]
    (tmp_path / "pairs.json").write_text(json.dumps(both))
    read = read_pairs(tmp_path / "pairs.json")
    (found,) = run_causalgym(partition, read, str(folder), choose=True)
    choosing, measured = ([p for n, p in enumerate(read) if n // 2 % 2 == half] for half in (0, 1))
    by_span = {e.span: e for e in run_causalgym(partition, choosing, str(folder))}
    assert list(by_span) == [1, 2, 3]  # the first span is empty without BOS
    assert found.span == max(by_span, key=lambda span: abs(by_span[span].whole))
    assert found.best == by_span[found.span].best
    (same,) = [e for e in run_causalgym(partition, measured, str(folder)) if e.span == found.span]
    assert (found.pairs, found.whole, found.effect) == (4, pytest.approx(same.whole), same.effect)
    with pytest.raises(InputError, match="no task has two sentence pairs to halve"):
        run_causalgym(partition, read[:2], str(folder), choose=True)


def test_lines_are_read_as_a_list_is(tmp_path, file):
    lines = tmp_path / "pairs.jsonl"
    lines.write_text("\n".join(json.dumps(pair) for pair in (PAIR, GONE)))
    assert read_pairs(lines) == read_pairs(file)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[]", "holds no pair"),
        ("{", "cannot read"),
        ("[1]", "pair 0 of .* has no 'base'"),
        (json.dumps([{**PAIR, "src": ["a"]}]), "lists of as many texts"),
        (json.dumps([{k: v for k, v in PAIR.items() if k != "src_label"}]), "has no 'src_label'"),
    ],
)
def test_files_of_another_form_are_refused(tmp_path, content, words):
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(InputError, match=words):
        read_pairs(tmp_path / "bad.json")


def test_the_command(folder, partition, file, corpus, tmp_path, ndm):
    partition.save_pretrained(tmp_path / "partition")
    command = ["evaluate", "causalgym", file, "--model", folder, "--partition", tmp_path / "partition"]
    outcome = ndm(*command, "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert "log odds ratio" in outcome.out
    saved = json.loads((tmp_path / "out" / "causalgym.json").read_text())
    assert len(saved) == 3
    same = json.dumps([{**PAIR, "src_label": PAIR["base_label"]}])
    file.write_text(same)
    assert "begin alike in all of 1 pairs" in ndm(*command).refusal()
    assert "no site" in ndm(*command, "--site", "x7.post").refusal()
