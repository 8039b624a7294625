"""Knowledge conflicts: prompts from RAVEL's files, patching at every token, rates and separation."""

import json
import string
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ndm_fast.errors import InputError
from ndm_fast.evaluate.baselines import STANDARD_BASELINES
from ndm_fast.evaluate.conflict.prompts import Attributes, make_conflicts, read_ravel
from ndm_fast.evaluate.conflict.rates import RUNS, conflict_rates, separation
from ndm_fast.evaluate.patching.answers import answer_token
from ndm_fast.evaluate.patching.patching import PatchEffects
from ndm_fast.geometry.orthogonal import random_rotation
from ndm_fast.partition import SubspacePartition

PUBLISHED = json.loads((Path(__file__).parents[1] / "data" / "published_conflicts.json").read_text())
ENTITIES = {
    "Mali": {"Country": "dog", "Language": ""},
    "Bora": {"Country": "cat"},
    "Kiro": {"Country": "bird"},
    "Tavu": {"Country": "tree"},
    "Sela": {"Country": "house"},
}
TEXTS = {"Country": ["%s likes the", "the red %s sees a"]}


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Tiny tensors."""


@pytest.fixture(scope="module", params=["qwen2", "gemma2"])
def model(request, loaded):
    config = AutoConfig.for_model(
        request.param,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
        vocab_size=len(loaded[1]),
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    built = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for weight in built.parameters():
        weight.add_(0.2 * torch.randn_like(weight))
    return built


@pytest.fixture
def conflicts(model, loaded):
    data = Attributes(ENTITIES, TEXTS)
    return make_conflicts(model, loaded[1], data, "Country", known_only=False)


def test_prompts_differ_in_the_entity_alone(conflicts, loaded):
    tokenizer = loaded[1]
    assert len(conflicts) >= 3
    for conflict in conflicts:
        lengths = {len(conflict.prompt), len(conflict.corrupt_param), len(conflict.corrupt_context)}
        assert len(lengths) == 1
        entity = next(name for name in ENTITIES if conflict.text.count(name) == 2)
        right = ENTITIES[entity]["Country"]
        assert conflict.right == tokenizer(f" {right}")["input_ids"][0]
        assert conflict.wrong != conflict.right
        assert right not in conflict.text.split(".")[0]
        assert entity not in tokenizer.decode(conflict.corrupt_param)
        assert tokenizer.decode(conflict.corrupt_context).count(entity) == 1


def test_rates_are_those_of_patched_runs(model, conflicts):
    partition = SubspacePartition(random_rotation(32, torch.Generator().manual_seed(0)), [16, 16])
    # Answers that the model gives, so that the rates are not all 0.
    conflicts = [
        c._replace(
            wrong=int(model(torch.tensor([c.prompt])).logits[0, -1].argmax()),
            right=int(model(torch.tensor([c.corrupt_param])).logits[0, -1].argmax()),
        )
        for c in conflicts
    ]
    found = conflict_rates(model, "x1.mid", partition, conflicts, rows=4)
    assert found["conflicts"] == len(conflicts)
    assert found["original"]["context_rate"] == 1
    assert [p["subspace"] for p in found["patches"]] == [None, 0, 1]
    # The whole activation replaced everywhere is the other run.
    assert found["patches"][0]["corrupt_param"]["param_rate"] == 1
    for patch in found["patches"]:
        assert all(0 <= rate <= 1 for run in RUNS for rate in patch[run].values())


def test_the_interval_of_the_separation_is_that_of_resampled_prompts(model, conflicts, monkeypatch):
    found = {
        # three of four prompts need subspace 0 for the context, all need subspace 1 for the parameters
        "corrupt_context": torch.tensor([[1.0, 1, 1, 0], [0, 0, 0, 1], [-1, -1, 0, 0]]),
        "corrupt_param": torch.tensor([[0.0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]),
    }

    def effects(*_arguments, **_options):
        one = found[next(runs)]
        answers = torch.stack([one, one], -1)
        return PatchEffects(torch.ones(4, 2), torch.zeros(4, 2), answers)

    monkeypatch.setattr("ndm_fast.evaluate.conflict.rates.patch_effects", effects)
    runs = iter(RUNS)
    partition = SubspacePartition(torch.eye(32), [16, 8, 8])
    result = conflict_rates(model, "x1.mid", partition, conflicts[:4])
    assert result["separation"] == pytest.approx(0.75)
    # k of four drawn are the fourth: a binomial with p = 1/4, whose 97.5 % quantile is 3
    assert result["separation_interval"] == pytest.approx((0.25, 1.0))


def test_only_what_the_model_knows_is_asked(model, loaded):
    """A random model gives one answer to everything, so it knows at most one value."""
    data = Attributes(ENTITIES, TEXTS)
    try:
        known = make_conflicts(model, loaded[1], data, "Country")
    except InputError as error:
        assert "knows 'Country' of none of 5" in str(error)  # noqa: PT017 - either may be
    else:
        assert len(known) < 5


def sentencepiece():
    """A tokenizer that puts a space before any text, as Llama-2's."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    words = ["dog", "cat", "bird", "likes", "the", "Mali"]
    letters = sorted({*"▁.", *"".join(words), *string.ascii_letters})
    vocabulary = {letter: n for n, letter in enumerate(letters)}
    merges = []
    for word in words:
        built = "▁"
        for letter in word:
            merges.append((built, letter))
            built += letter
            vocabulary.setdefault(built, len(vocabulary))
    bpe.model = models.BPE(vocab=vocabulary, merges=merges)
    bpe.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=bpe)


def test_answers_follow_the_prompt_where_the_tokenizer_puts_a_space_first():
    tokenizer = sentencepiece()
    alone = tokenizer(" dog", add_special_tokens=False)["input_ids"][0]
    assert tokenizer.convert_ids_to_tokens(alone) == "▁"  # the fault: all answers begin alike
    token = answer_token(tokenizer, "Mali likes the", " dog")
    assert tokenizer.convert_ids_to_tokens(token) == "▁dog"
    assert answer_token(tokenizer, "Mali likes the", "") is None


def test_an_answer_that_changes_the_prompt_s_last_token_is_none():
    tokenizer = sentencepiece()
    assert answer_token(tokenizer, "Mali likes the do", "g") is None


def test_a_known_answer_is_found_in_such_a_tokenizer():
    """A model that says dog after anything knows Mali's country, and no other."""
    tokenizer = sentencepiece()
    dog = tokenizer.convert_tokens_to_ids("▁dog")

    class Says(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.config = AutoConfig.for_model("gpt2")

        def forward(self, input_ids, **_):
            logits = torch.zeros(len(input_ids), 1, len(tokenizer))
            logits[:, -1, dog] = 1
            return type("Output", (), {"logits": logits})

    values = {entity: {"Country": ENTITIES[entity]["Country"]} for entity in ("Mali", "Bora", "Kiro")}
    found = make_conflicts(Says(), tokenizer, Attributes(values, {"Country": ["%s likes the"]}), "Country")
    assert [c.right for c in found] == [dog]
    assert "Mali" in found[0].text


def test_published_rates_are_separated_most_by_ndm():
    rates = PUBLISHED["knowledge_conflict"]
    scores = {m: {kind: separation(found) for kind, found in by.items()} for m, by in rates.items()}
    assert all(0 <= score <= 1 for by in scores.values() for score in by.values())
    assert [max(by, key=by.get) for by in scores.values()] == ["ndm", "ndm"]
    assert scores["qwen2.5"]["ndm"] == pytest.approx(0.849, abs=1e-3)


def test_separation_at_its_ends():
    def result(context, param):
        patches = [
            {
                "subspace": s,
                "corrupt_context": {"context_rate": 1 - c},
                "corrupt_param": {"param_rate": 1 - p},
            }
            for s, (c, p) in enumerate(zip(context, param, strict=True))
        ]
        return {"original": {"context_rate": 1.0, "param_rate": 1.0}, "patches": patches}

    assert separation(result([0.5, 0], [0, 0.2])) == 1
    assert separation(result([0.5, 0.25], [0.2, 0.1])) == pytest.approx(0)
    assert separation(result([0.5, 0.5], [0.3, -0.1])) == pytest.approx(0.5)


def test_files_of_another_form_are_refused(tmp_path):
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(json.dumps(ENTITIES))
    texts = tmp_path / "texts.json"
    texts.write_text(json.dumps(TEXTS))
    assert read_ravel(good, texts) == Attributes(ENTITIES, TEXTS)
    for content in ("[]", "{", '{"a": 1}'):
        bad.write_text(content)
        with pytest.raises(InputError, match=r"bad\.json"):
            read_ravel(bad, texts)
        with pytest.raises(InputError, match=r"bad\.json"):
            read_ravel(good, bad)


def test_an_attribute_without_texts_is_refused(model, loaded):
    with pytest.raises(InputError, match="attribute 'Language' needs a text"):
        make_conflicts(model, loaded[1], Attributes(ENTITIES, TEXTS), "Language")


def test_the_command(model, loaded, corpus, tmp_path, ndm):
    model.save_pretrained(tmp_path / "model")
    loaded[1].save_pretrained(tmp_path / "model")
    source = {"model": str(tmp_path / "model"), "site": "x1.mid"}
    SubspacePartition(torch.eye(32), [20, 12], source).save_pretrained(tmp_path / "partition")
    (tmp_path / "entities.json").write_text(json.dumps(ENTITIES))
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS))
    files = ["--entities", tmp_path / "entities.json", "--texts", tmp_path / "texts.json"]
    command = ["evaluate", "conflict", tmp_path / "partition", *files, "--out", tmp_path / "out"]
    assert "pass --data" in ndm(*command, "--attribute", "Country", "--unknown").refusal()
    command += ["--data", corpus]
    outcome = ndm(*command, "--attribute", "Country", "--unknown")
    assert outcome.code == 0, outcome.err
    assert "corrupt context param rate" in outcome.out
    saved = json.loads((tmp_path / "out" / "conflict.json").read_text())
    assert list(saved) == ["ndm", *STANDARD_BASELINES, "sha256"]
    assert saved["ndm"] == saved["identity"]
    assert "needs a text" in ndm(*command, "--attribute", "Colour").refusal()
