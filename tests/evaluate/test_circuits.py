"""Circuit tests from prompts to files, on random models with a vocabulary like GPT-2's."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from tiny import gpt2_like, tokenizer_of

from ndm_fast.errors import InputError
from ndm_fast.evaluate.baselines import baseline_partition
from ndm_fast.evaluate.circuits import circuits, word_lists, yardsticks
from ndm_fast.evaluate.circuits.bootstrap import gini_intervals, resampled_means
from ndm_fast.evaluate.circuits.circuits import CircuitOptions, circuit_effects, run_circuits
from ndm_fast.evaluate.circuits.prompts import TESTS
from ndm_fast.evaluate.circuits.results import circuit_rows, mean_ginis, results_to_json
from ndm_fast.evaluate.circuits.trace import run_trace
from ndm_fast.evaluate.circuits.words import mark, whole_words
from ndm_fast.evaluate.circuits.yardsticks import yardstick_partitions
from ndm_fast.evaluate.gini import effect_ginis
from ndm_fast.evaluate.patching.language_model import load_language_model
from ndm_fast.geometry.orthogonal import random_rotation
from ndm_fast.partition import SubspacePartition
from ndm_fast.run.published import export_published

WIDTH = 32
OPTIONS = CircuitOptions(prompts=12, rows=12, random_seeds=2)


@pytest.fixture(autouse=True)
def _one_thread(one_thread, monkeypatch):
    """Tiny tensors, and few activations of ordinary text."""
    monkeypatch.setattr(circuits, "site_activations", partial(circuits.site_activations, rows=512))


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
    with pytest.raises(InputError, match="years such as 1732 neither into 17 and 32 nor into digits"):
        TESTS["4"].build(tokenizer_of([f"Ġ{w}" for w in ("1732", *word_lists.NOUNS)]), 4, 0)
    some = tokenizer_of([f"Ġ{name}" for name in word_lists.NAMES[:10]])
    assert whole_words(some, word_lists.NAMES, "names") == list(word_lists.NAMES[:10])


def test_a_run_of_tests_has_all_methods(model_folder, partition):
    found = run(model_folder, partition)
    assert list(found["mine"]) == ["3", "3b"]
    for test in found["mine"].values():
        assert list(test.methods) == ["ndm", "identity", "random", "pca_ascending", "pca_descending"]
        wholes = [method.whole for method in test.methods.values()]
        assert wholes == pytest.approx([wholes[0]] * 5, rel=1e-4)
        assert wholes[0] != 0
        variances = [sum(method.variance) for method in test.methods.values()]
        assert variances == pytest.approx([variances[0]] * 5, rel=1e-4)
        assert test.methods["ndm"].effect != test.methods["identity"].effect
        assert 0 <= test.right <= 1
        for method in test.methods.values():
            assert method.share_of_whole == pytest.approx([e / method.whole for e in method.effect], rel=1e-4)
            assert all(0 <= low <= high <= 1 for low, high in method.gini_interval.values())
        assert test.methods["random"].seeds == 2
        assert all(spread > 0 for spread in test.methods["random"].gini_spread.values())
    rows = circuit_rows(found)
    assert len(rows) == 10
    assert set(mean_ginis(found)) == {row["method"] for row in rows}


def run(model_folder, partition, changes=None, **arguments):
    options = replace(OPTIONS, **(changes or {}))
    return run_circuits(
        {"mine": partition}, str(model_folder), context_length=32, options=options, **arguments
    )


def test_the_complement_is_all_but_one(model_folder, partition):
    """With two subspaces, the complement of one is the other."""
    halves = SubspacePartition(partition.rotation, [20, 12], partition.source)
    method = run(model_folder, halves, tests=["2"])["mine"]["2"].methods["ndm"]
    assert method.complement == pytest.approx(method.effect[::-1], rel=1e-4)
    assert run(model_folder, halves, {"complement": False})["mine"]["3"].methods["ndm"].complement is None


def test_components_of_mirrored_widths_are_patched_once(model_folder, partition, monkeypatch):
    """Ascending and descending ones are the same subspaces then; else both are measured."""
    measured = []
    effects_of = circuits.circuit_effects

    def noting(*arguments, **options):
        measured.append((arguments, options, effects_of(*arguments, **options)))
        return measured[-1][-1]

    monkeypatch.setattr(circuits, "circuit_effects", noting)
    for widths, count in (([12, 8, 12], 5), ([8, 12, 12], 6)):
        measured.clear()
        mine = SubspacePartition(partition.rotation, widths, partition.source)
        methods = run(model_folder, mine, tests=["3"])["mine"]["3"].methods
        assert len(measured) == count  # two of them random
        arguments, options, _ = measured[0]
        descending = baseline_partition("pca_descending", widths, arguments[4])
        expected = effects_of(*arguments[:2], descending, *arguments[3:], **options)
        for name in ("widths", "variance", "effect", "share_of_whole", "complement"):
            found = getattr(methods["pca_descending"], name)
            assert found == pytest.approx(getattr(expected, name), rel=1e-3, abs=1e-5)
        assert methods["pca_descending"].gini == pytest.approx(expected.gini, rel=1e-3)


def test_labelled_subspaces_are_beside_the_rest(model_folder, partition):
    found = run(model_folder, partition, {"yardsticks": True, "das_steps": 2}, tests=["3b"])
    labelled = found["mine"]["3b"].yardsticks
    assert list(labelled.methods) == ["ndm", "das", "svd", "mean_difference"]
    assert labelled.methods["das"].widths[0] == labelled.width
    assert labelled.methods["mean_difference"].widths[0] == 1
    wholes = [method.whole for method in labelled.methods.values()]
    assert wholes == pytest.approx([wholes[0]] * 4, rel=1e-4)
    assert "saw the labels" in results_to_json(found)["mine"]["3b"]["yardsticks"]["what"]
    assert {row["method"] for row in circuit_rows(found)} >= {"das (set b)", "ndm"}


def test_das_lowers_the_metric_step_by_step(model_folder):
    model, tokenizer = load_language_model(str(model_folder))
    made = TESTS["2"].build(tokenizer, 16, 0)
    drops = []
    for steps in (0, 30):
        found = yardstick_partitions(model, "x5.post", made, [8, 24], 0, steps=steps, progress=False)
        assert found["das"].orthogonality_error() < 1e-5
        activations = torch.randn(100, WIDTH)
        drops.append(circuit_effects(model, "x5.post", found["das"], made, activations).effect[0])
    assert drops[1] > drops[0] + 0.1 * abs(drops[0])


def test_the_mean_difference_is_the_direction_that_differs():
    """Activations that differ in one direction alone, by class."""
    direction = torch.nn.functional.normalize(torch.randn(WIDTH), dim=0)
    signs = [1, -1, 1, -1]
    differences = torch.tensor(signs)[:, None, None] * direction * 3.0
    used = torch.ones(4, 1, dtype=torch.bool)
    batch = yardsticks._Batch(None, None, differences, None, used, None, None, torch.arange(4))
    for basis in (yardsticks._mean_difference([batch], signs), yardsticks._leading([batch], 1)):
        assert float((basis[:, 0] @ direction).abs()) == pytest.approx(1, abs=1e-5)


def test_the_site_and_the_trace_choose(model_folder, partition):
    assert list(run(model_folder, partition, site="x9.post")["mine"]) == ["4"]
    traced = run_trace(str(model_folder), tests=["2"], prompts=4, layers=[5], progress=False)
    found = run(model_folder, partition, site="x5.post", trace=traced)["mine"]
    assert {name: test.site for name, test in found.items()} == {"2": "blocks.5.hook_resid_post"}
    with pytest.raises(InputError, match=r"peaks at blocks\.8\.hook_resid_post \(2 at blocks\.5"):
        run(model_folder, partition, trace=traced)


def test_intervals_are_those_of_ginis_drawn_anew():
    effects = torch.randn(5, 40, generator=torch.Generator().manual_seed(1)) + torch.arange(5)[:, None]
    widths, variances = [4, 4, 8, 2, 6], torch.tensor([1.0, 2, 3, 4, 5])
    means = resampled_means(effects, 50, seed=3)
    assert means.mean(0) == pytest.approx(effects.double().mean(1), abs=0.2)
    low, high = gini_intervals(effects, widths, variances, draws=50, seed=3)["variance"]
    ginis = sorted(effect_ginis(mean, widths, variances)["variance"] for mean in means)
    assert low == pytest.approx(float(torch.tensor(ginis, dtype=torch.float64).quantile(0.025)))
    assert high == pytest.approx(float(torch.tensor(ginis, dtype=torch.float64).quantile(0.975)))
    same = torch.ones(3, 10)
    assert gini_intervals(same, [1, 1, 1], torch.ones(3))["unnormed"] == (0, 0)


def test_template_sets_share_no_name_and_no_template(tokenizer):
    said = {}
    for templates in ("a", "b"):
        texts = TESTS["1"].build(tokenizer, 60, 0, templates).texts
        said[templates] = {w.strip(",.") for t in texts for w in t.split()} & set(word_lists.NAMES)
        starts = {text.split()[0] for text in texts}
        assert len(starts) == 4
        said[f"{templates} starts"] = starts
    assert not said["a"] & said["b"]
    assert not said["a starts"] & said["b starts"]
    nouns = [{t.split()[1] for t in TESTS["4"].build(tokenizer, 60, 0, s).texts} for s in ("a", "b")]
    assert not nouns[0] & nouns[1]
    with pytest.raises(InputError, match="unknown template set 'c'"):
        TESTS["1"].build(tokenizer, 4, 0, "c")


def test_greater_than_by_digits():
    tokenizer = gpt2_like(split_digits=True)
    built = TESTS["4"].build(tokenizer, 30, seed=0)
    assert built.form == "tens digit"
    logits = torch.zeros(30, 1, len(tokenizer))
    found = built.metric(logits, torch.arange(30))
    for text, clean, other, chance in zip(
        built.texts, built.prompts, built.counterfactuals, found, strict=True
    ):
        year = next(w for w in text.split() if w.isdigit() and len(w) == 4)
        assert tokenizer.decode(clean[-2:]) == year[:2]
        assert f"{year[:2]}01" in tokenizer.decode(other)
        assert len(clean) == len(other)
        assert float(chance) * len(tokenizer) == pytest.approx(9 - int(year[2]))
        assert 1 <= int(year[2]) <= 8


def test_a_model_without_a_head_and_long_prompts_are_refused(model_folder, partition, tmp_path, tokenizer):
    from transformers import BertConfig, BertForMaskedLM, BertModel, GPT2Config, GPT2LMHeadModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    with pytest.raises(InputError, match="has no language-model head"):
        load_language_model(str(tmp_path / "bert"))
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "bert")
    with pytest.raises(InputError, match="BertForMaskedLM without a causal language-model head"):
        load_language_model(str(tmp_path / "bert"))
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=12, n_embd=32, n_layer=10, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "short")
    tokenizer.save_pretrained(tmp_path / "short")
    with pytest.raises(InputError, match="the model takes 12"):
        run_trace(str(tmp_path / "short"), tests=["1"], prompts=4)
    with pytest.raises(InputError, match="the model takes 12"):
        run_circuits({"mine": partition}, str(tmp_path / "short"), context_length=8, options=OPTIONS)


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
            run(model_folder, partition, {"prompts": changes.pop("prompts", 4)}, **changes)
        return str(error.value)

    assert "unknown circuit test '5'" in refused(tests=["5"])
    assert "0 prompts are too few" in refused(prompts=0)
    narrow = SubspacePartition(torch.eye(16), [16], partition.source)
    with pytest.raises(InputError, match="16 wide"):
        run(model_folder, narrow)
    partition.source["site"] = "x2.post"
    assert "no circuit test is made for blocks.2.hook_resid_post" in refused()
    partition.source.pop("site")
    assert "does not say which site" in refused()


def test_words_and_templates_are_sound():
    assert len(set(word_lists.NAMES)) == len(word_lists.NAMES)
    assert len(set(word_lists.NOUNS)) == len(word_lists.NOUNS)
    for template in word_lists.IOI_TEMPLATES:
        assert all(template.count(f"{{{key}}}") == 1 for key in ("a", "b", "s", "place", "thing"))
