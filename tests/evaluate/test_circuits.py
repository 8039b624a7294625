"""Circuit tests from prompts to files, on random models with a vocabulary like GPT-2's."""

import json

import pytest
import torch

from ndm_fast.errors import InputError
from ndm_fast.evaluate.circuits import word_lists
from ndm_fast.evaluate.circuits.circuits import circuit_rows, mean_ginis, run_circuits
from ndm_fast.evaluate.circuits.prompts import TESTS
from ndm_fast.evaluate.circuits.words import mark, whole_words
from ndm_fast.geometry.orthogonal import random_rotation
from ndm_fast.partition import SubspacePartition
from ndm_fast.run.published import export_published

WIDTH = 32
BOS = "<|endoftext|>"


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Tiny tensors."""


def tokenizer_of(words, split_digits=False):
    """Byte-level BPE whose merges make every word, with the space before it, one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {BOS: 0}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[letter] = len(vocabulary)
    merges = []
    for word in words:
        built = word[0]
        for letter in word[1:]:
            if built + letter not in vocabulary:
                vocabulary[built + letter] = len(vocabulary)
                merges.append((built, letter))
            built += letter
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = [pre_tokenizers.Digits(individual_digits=True)] if split_digits else []
    bpe.pre_tokenizer = pre_tokenizers.Sequence([*digits, level])
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=BOS, eos_token=BOS)


def gpt2_like(split_digits=False):
    text = " ".join((*word_lists.IOI_TEMPLATES, word_lists.YEARS_TEMPLATE)).replace("{", "").replace("}", "")
    words = {*word_lists.NAMES, *word_lists.PLACES, *word_lists.THINGS, *word_lists.NOUNS, *text.split()}
    spaced = [f"Ġ{word}" for word in sorted(words)]
    return tokenizer_of(
        [*(f"Ġ{c}" for c in range(11, 19)), *(f"{y:02}" for y in range(100)), *spaced], split_digits
    )


@pytest.fixture(scope="module")
def tokenizer():
    return gpt2_like()


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=64,
        n_embd=WIDTH,
        n_layer=10,
        n_head=4,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def partition(corpus):
    rotation = random_rotation(WIDTH, torch.Generator().manual_seed(0))
    return SubspacePartition(rotation, [16, 8, 8], {"site": "x8.post", "data": str(corpus)})


def words_at(tokenizer, tokens, positions):
    return [tokenizer.decode([tokens[p]]).strip() for p in positions]


@pytest.mark.parametrize("name", ["1", "2", "3", "3b"])
def test_ioi_prompts(tokenizer, name):
    built = TESTS[name].build(tokenizer, 40, seed=3)
    orders = set()
    for clean, other, places, text in zip(
        built.prompts, built.counterfactuals, built.positions, built.texts, strict=True
    ):
        assert clean[0] == other[0] == tokenizer.bos_token_id
        assert len(clean) == len(other)
        said = [w.strip(",.") for w in text.split() if w.strip(",.") in word_lists.NAMES]
        first, second, again = said
        io = first if again == second else second
        assert again in (first, second)
        orders.add(again == second)
        there = [w for w in tokenizer.decode(other).replace(",", "").split() if w in word_lists.NAMES]
        assert there == [second, first, io if name == "3b" else again]
        before = [word.strip(" ,") for word in words_at(tokenizer, clean, [p - 1 for p in places])]
        if name == "1":
            assert before == [io, again]
        elif name == "2":
            assert words_at(tokenizer, clean, places) == [again]
        else:
            assert places == [-1]
    assert orders == {True, False}


def test_ioi_metric_is_the_difference_of_logits(tokenizer):
    built = TESTS["3"].build(tokenizer, 6, seed=0)
    logits = torch.randn(2, 1, len(tokenizer))
    rows = torch.tensor([4, 1])
    for value, row, line in zip(built.metric(logits, rows), rows, logits[:, 0], strict=True):
        names = [w.strip(",.") for w in built.texts[row].split() if w.strip(",.") in word_lists.NAMES]
        s = names[2]
        io = next(n for n in names if n != s)
        ids = [tokenizer(f" {name}")["input_ids"][0] for name in (io, s)]
        assert float(value) == pytest.approx(float(line[ids[0]] - line[ids[1]]))


def test_greater_than_prompts_and_metric(tokenizer):
    built = TESTS["4"].build(tokenizer, 30, seed=0)
    logits = torch.zeros(30, 1, len(tokenizer))
    found = built.metric(logits, torch.arange(30))
    for text, clean, other, chance in zip(
        built.texts, built.prompts, built.counterfactuals, found, strict=True
    ):
        year = next(w for w in text.split() if w.isdigit() and len(w) == 4)
        assert text.endswith(f" to {year[:2]}")
        assert f"{year[:2]}01" in tokenizer.decode(other)
        assert sum(a != b for a, b in zip(clean, other, strict=True)) == 1
        assert float(chance) * len(tokenizer) == pytest.approx(99 - int(year[2:]))


def test_prompts_depend_on_the_seed_alone(tokenizer):
    for test in TESTS.values():
        one, same, other = (test.build(tokenizer, 20, seed) for seed in (1, 1, 2))
        assert one.prompts == same.prompts
        assert one.prompts != other.prompts


def test_words_are_found_by_their_tokens(tokenizer):
    found = mark(tokenizer, "Then {a}xyz, {b} left", {"a": "Mary", "b": "Paul"})
    assert tokenizer.decode(found.tokens[found.spans["b"][0]]) == " Paul"
    with pytest.raises(InputError, match="need a fast tokenizer"):
        mark(type("Slow", (), {"is_fast": False})(), "{a}", {"a": "b"})


def test_a_tokenizer_that_splits_the_words_is_refused(tokenizer):
    bytes_only = tokenizer_of(["Ġthe"])
    with pytest.raises(InputError, match="splits 'Mary' and 95 more of 96 names"):
        TESTS["1"].build(bytes_only, 4, 0)
    with pytest.raises(InputError, match="does not split years such as 1732"):
        TESTS["4"].build(gpt2_like(split_digits=True), 4, 0)
    some = tokenizer_of([f"Ġ{name}" for name in word_lists.NAMES[:10]])
    assert whole_words(some, word_lists.NAMES, "names") == list(word_lists.NAMES[:10])


def test_a_run_of_tests_has_all_methods(model_folder, partition):
    found = run_circuits({"mine": partition}, str(model_folder), prompts=12, context_length=32, rows=12)
    assert list(found["mine"]) == ["3", "3b"]
    for test in found["mine"].values():
        assert list(test["methods"]) == ["ndm", "identity", "random", "pca_ascending", "pca_descending"]
        wholes = [method["whole"] for method in test["methods"].values()]
        assert wholes == pytest.approx([wholes[0]] * 5)
        assert wholes[0] != 0
        variances = [sum(method["variance"]) for method in test["methods"].values()]
        assert variances == pytest.approx([variances[0]] * 5, rel=1e-4)
        assert test["methods"]["ndm"]["effect"] != test["methods"]["identity"]["effect"]
    rows = circuit_rows(found)
    assert len(rows) == 10
    assert set(mean_ginis(found)) == {row["method"] for row in rows}


def test_the_command_writes_table_json_and_figure(model_folder, partition, corpus, tmp_path, ndm):
    """From a file as the authors publish it."""
    file = export_published(partition, tmp_path / "R-gpt2-x9.post.pt")[0]
    options = ["--model", model_folder, "--prompts", 8, "--context-length", 32, "--out", tmp_path / "out"]
    outcome = ndm("evaluate", "circuits", file, *options, "--data", corpus)
    assert outcome.code == 0, outcome.err
    assert "gini unnormed" in outcome.out
    assert "pca_ascending" in outcome.out
    saved = json.loads((tmp_path / "out" / "circuits.json").read_text())
    assert list(saved[str(file)]) == ["4"]
    assert (tmp_path / "out" / "circuits.png").stat().st_size > 10_000
    assert "pass --data" in ndm("evaluate", "circuits", file, *options).refusal()


def test_what_does_not_fit_is_refused(model_folder, partition, tmp_path, ndm):
    def refused(**changes):
        with pytest.raises(InputError) as error:
            run_circuits({"mine": partition}, str(model_folder), **{"prompts": 4, **changes})
        return str(error.value)

    assert "unknown circuit test '5'" in refused(tests=["5"])
    assert "0 prompts are too few" in refused(prompts=0)
    narrow = SubspacePartition(torch.eye(16), [16], partition.source)
    with pytest.raises(InputError, match="16 wide"):
        run_circuits({"narrow": narrow}, str(model_folder), prompts=4, context_length=32)
    partition.source["site"] = "x2.post"
    assert "no circuit test is made for blocks.2.hook_resid_post" in refused()
    partition.source.pop("site")
    assert "does not say which site" in refused()


def test_words_and_templates_are_sound():
    assert len(set(word_lists.NAMES)) == len(word_lists.NAMES)
    assert len(set(word_lists.NOUNS)) == len(word_lists.NOUNS)
    for template in word_lists.IOI_TEMPLATES:
        assert all(template.count(f"{{{key}}}") == 1 for key in ("a", "b", "s", "place", "thing"))
