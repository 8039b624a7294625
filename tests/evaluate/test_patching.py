"""Subspace patching against forward passes written by hand, in every family, with every padding."""

from functools import cache

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from ndm_fast.activations.hooks import collect_activations, replace_activations
from ndm_fast.errors import InputError
from ndm_fast.evaluate.patching.head import TokenMetric
from ndm_fast.evaluate.patching.layers_above import LayersAbove
from ndm_fast.evaluate.patching.patching import logit_of, patch, patch_effects, subspace_patch
from ndm_fast.evaluate.patching.prompts import columns_of, pad_prompts
from ndm_fast.geometry.orthogonal import random_rotation
from ndm_fast.partition import SubspacePartition

WIDTH, VOCABULARY, WIDTHS = 32, 61, (12, 12, 8)
SIZES = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GQA = {"num_key_value_heads": 2, "head_dim": 8}
FAMILIES = {
    "gpt2": {},
    "llama": GQA,
    "qwen2": GQA,
    "gemma2": {**GQA, "sliding_window": 4, "query_pre_attn_scalar": 8},
    "gpt_neox": {"use_parallel_residual": False},
    "phi": {"num_key_value_heads": 4},
}
PARTITION = SubspacePartition(random_rotation(WIDTH, torch.Generator().manual_seed(5)), WIDTHS)
CASES = [(family, site) for family in FAMILIES for site in ("x0.pre", "x1.mid", "x1.post", "x2.post", "m1")]
CASES.remove(("phi", "x1.mid"))


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Tiny tensors."""


@cache
def build(family):
    torch.manual_seed(1)
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family]})
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for weight in model.parameters():
        weight.add_(0.15 * torch.randn_like(weight))
    return model


def draw(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def alone(model, site, tokens, source, subspaces, positions, source_positions):
    """Last logits of one unpadded prompt, patched by a hook over the whole model."""
    with collect_activations(model, [site]) as captured:
        model(torch.tensor([source]))
    bases = torch.cat([PARTITION.basis(s) for s in subspaces], 1)

    def change(h):
        for to, origin in zip(positions, source_positions, strict=True):
            h[0, to] += (captured[site][0, origin] - h[0, to]) @ bases @ bases.T
        return h

    with replace_activations(model, {site: change}):
        return model(torch.tensor([tokens])).logits[0, -1]


def test_a_gpt2_written_by_hand_gives_the_same():
    """Blocks one after the other, without hooks or any of our code."""
    model = build("gpt2")
    prompts, other = draw([7, 7]), draw([7, 7], seed=1)
    core = model.transformer

    def block(number, h):
        layer = core.h[number]
        h = h + layer.attn(layer.ln_1(h), attention_mask=None)[0]
        return h + layer.mlp(layer.ln_2(h))

    def below(tokens):
        h = core.wte(torch.tensor(tokens)) + core.wpe(torch.arange(7))
        return block(1, block(0, h))

    basis = PARTITION.rotation[:, 12:24]
    h, source = below(prompts), below(other)
    h[:, 3] += (source[:, 3] - h[:, 3]) @ basis @ basis.T
    by_hand = model.lm_head(core.ln_f(block(2, h)))[:, -1]
    got = patch_effects(
        model,
        "x1.post",
        PARTITION,
        pad_prompts(prompts),
        pad_prompts(other),
        lambda logits, _: logits[:, 0, 9],
        positions=[[3], [3]],
        groups=[[1]],
    )
    torch.testing.assert_close(got.clean - got.by_group[0], by_hand[:, 9], rtol=1e-5, atol=1e-5)
    assert got.by_group.abs().max() > 1e-3


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("family", "site"), CASES)
def test_every_family_and_site_with_uneven_prompts(family, site, side):
    model = build(family)
    prompts, sources = draw([9, 5, 7]), draw([6, 8, 7], seed=1)
    positions, origins = [[2, -1], [0], [3, 4, -2]], [[1, 5], [-1], [3, 4, 2]]
    targets = [7, 11, 60]
    effects = patch_effects(
        model,
        site,
        PARTITION,
        pad_prompts(prompts, side=side),
        pad_prompts(sources, side=side),
        logit_of(targets),
        positions=positions,
        counterfactual_positions=origins,
        groups=[[0], [2, 1]],
        rows=6,
    )
    assert LayersAbove(model, site).runs_whole_model == (site == "m1")
    for number, group in enumerate([[0], [2, 1]]):
        for n in range(3):
            logits = alone(model, site, prompts[n], sources[n], group, positions[n], origins[n])
            patched = effects.clean[n] - effects.by_group[number, n]
            torch.testing.assert_close(patched, logits[targets[n]], rtol=1e-4, atol=1e-4)
    clean = [model(torch.tensor([p])).logits[0, -1, t] for p, t in zip(prompts, targets, strict=True)]
    torch.testing.assert_close(effects.clean, torch.stack(clean), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_none_all_and_the_whole_activation(family):
    model = build(family)
    prompts, others = pad_prompts(draw([6, 4])), pad_prompts(draw([6, 4], seed=3))

    def effects(groups, site="x1.post"):
        return patch_effects(model, site, PARTITION, prompts, others, logit_of([1, 2]), groups=groups)

    found = effects([[], [0, 1, 2], [2, 0, 1]])
    assert not found.by_group[0].any()
    assert torch.equal(found.by_group[1], found.whole)
    assert torch.equal(found.by_group[2], found.whole)
    if family != "phi":
        # Every token of the whole activation replaced: the model goes on as on the counterfactual.
        there = model(**others.model_inputs()).logits[torch.arange(2), -1, torch.tensor([1, 2])]
        torch.testing.assert_close(found.clean - found.whole, there, rtol=1e-4, atol=1e-4)


def test_as_a_hook_on_the_whole_model():
    model = build("qwen2")
    prompts, others = pad_prompts(draw([6, 4])), pad_prompts(draw([4, 6], seed=3))
    places, origins = [[1, -1], [2]], [[0, 1], [-1]]
    with collect_activations(model, ["x1.mid"]) as captured:
        model(**others.model_inputs())
    replacement = subspace_patch(PARTITION, [1], captured["x1.mid"], prompts, places, others, origins)
    with replace_activations(model, {"x1.mid": replacement}):
        logits = model(**prompts.model_inputs()).logits[:, -1, 5]
    effects = patch_effects(
        model,
        "x1.mid",
        PARTITION,
        prompts,
        others,
        logit_of([5, 5]),
        positions=places,
        counterfactual_positions=origins,
    )
    torch.testing.assert_close(effects.clean - effects.by_group[1], logits, rtol=1e-5, atol=1e-5)


def test_batches_of_any_size_agree():
    model = build("gpt2")
    prompts, others = pad_prompts(draw([5, 6, 7, 3, 4])), pad_prompts(draw([5, 6, 7, 3, 4], seed=1))
    one, many = (
        patch_effects(model, "x0.post", PARTITION, prompts, others, logit_of([3] * 5), rows=rows)
        for rows in (1, 64)
    )
    for a, b in zip(one, many, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert one.by_group.shape == (3, 5)
    assert one.means.shape == (3,)


def test_several_positions_may_be_read():
    model = build("gpt2")
    prompts, others = pad_prompts(draw([5, 7])), pad_prompts(draw([5, 7], seed=1))
    seen = []
    patch_effects(
        model,
        "x1.post",
        PARTITION,
        prompts,
        others,
        lambda logits, rows: (seen.append((logits, rows)), logits.sum((1, 2)))[1],
        read=[[1, -1], [0, 2]],
        groups=[],
    )
    full = model(**prompts.model_inputs()).logits
    expected = torch.stack([full[0, [3, 6]], full[1, [0, 2]]])
    logits, rows = seen[0]
    torch.testing.assert_close(logits[:2], expected[rows[:2]], rtol=1e-4, atol=1e-4)


def test_layers_below_do_not_run_again():
    model = build("gpt2")
    calls = []
    handles = [
        part.register_forward_hook(lambda *_, n=n: calls.append(n))
        for n, layer in enumerate(model.transformer.h)
        for part in (layer.attn, layer.mlp)
    ]
    tokens = pad_prompts(draw([5, 5]))
    patch_effects(model, "x0.post", PARTITION, tokens, tokens, lambda logits, _: logits[:, 0, 1], rows=2)
    for handle in handles:
        handle.remove()
    assert calls.count(0) == 2 * 2  # attention and MLP, prompts and counterfactuals
    assert calls.count(1) == calls.count(2) == 2 * (2 + len(PARTITION))


def test_the_model_is_left_as_it_was():
    model = build("gemma2")
    tokens = pad_prompts(draw([5]))

    def broken(logits, rows):
        raise RuntimeError("metric")

    with pytest.raises(RuntimeError, match="metric"):
        patch_effects(model, "x1.mid", PARTITION, tokens, tokens, broken)
    assert not any("forward" in vars(module) for module in model.modules())
    assert model.model.layers[0]._forward_hooks == {}


def test_patch_leaves_its_inputs_and_half_precision_alone():
    h, source = torch.randn(2, 4, WIDTH).half(), torch.randn(2, 4, WIDTH).half()
    before = h.clone()
    columns = torch.tensor([[1], [2]])
    changed = patch(h, source, PARTITION, [0, 2], columns)
    assert torch.equal(h, before)
    assert changed.dtype == torch.float16
    assert torch.equal(changed[0, 0], h[0, 0])
    assert torch.equal(patch(h, source, PARTITION, [0, 1, 2], columns)[1, 2], source[1, 2])


BAD = [
    ({"positions": [[5], [0]]}, "position 5 is outside prompt 0, which has 5 tokens: give -5 to 4"),
    ({"positions": [[0], [-4]]}, "position -4 is outside prompt 1, which has 3"),
    ({"positions": [[0]]}, "1 lists of positions for 2 prompts"),
    ({"positions": [[0], [1]], "counterfactual_positions": [[0], [1, 2]]}, "prompt 1 is patched at 1"),
    ({"groups": [[3]]}, "subspace 3 does not exist"),
    ({"read": [[0], [0, 1]]}, "different numbers of positions"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_what_does_not_fit_is_refused(options, message):
    tokens = pad_prompts(draw([5, 3]))
    with pytest.raises(InputError, match=message):
        patch_effects(build("gpt2"), "x1.post", PARTITION, tokens, tokens, logit_of([1, 1]), **options)


def test_other_bad_input():
    tokens = pad_prompts(draw([5, 3]))
    wide = SubspacePartition(torch.eye(16), [8, 8])
    with pytest.raises(InputError, match=r"16 wide, blocks\.1.hook_resid_post of this model 32"):
        patch_effects(build("gpt2"), "x1.post", wide, tokens, tokens, logit_of([1, 1]))
    with pytest.raises(InputError, match="2 prompts but 1 counterfactuals"):
        patch_effects(build("gpt2"), "x1.post", PARTITION, tokens, tokens.rows(slice(1)), logit_of([1, 1]))
    with pytest.raises(InputError, match="empty"):
        pad_prompts([[1], []])
    with pytest.raises(InputError, match="side 'up'"):
        pad_prompts([[1]], side="up")


def test_columns_count_from_each_prompt():
    left = pad_prompts([[4, 5, 6], [7]], pad=9)
    assert left.tokens.tolist() == [[4, 5, 6], [9, 9, 7]]
    columns, used = columns_of(left, [[0, -1], [0]])
    assert columns[used].tolist() == [0, 2, 2]
    right = pad_prompts([[4, 5, 6], [7]], side="right")
    assert columns_of(right, torch.tensor([[2], [-1]]))[0].tolist() == [[2], [0]]
    assert right.model_inputs()["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0]]


def test_every_module_has_its_own_forward_again():
    for family in FAMILIES:
        assert isinstance(build(family), nn.Module)
        assert not any("forward" in vars(module) for module in build(family).modules())


def test_prompts_longer_than_the_context_are_refused():
    config = GPT2Config(vocab_size=20, n_positions=16, n_embd=8, n_layer=1, n_head=2)
    cut = LayersAbove(GPT2LMHeadModel(config).eval(), "x0.post")
    with pytest.raises(InputError, match="a prompt has 17 tokens, the model takes 16: give shorter ones"):
        cut.below(pad_prompts([[1] * 17, [2] * 3]))


ANSWERS = [3, 7, 3, 60, 1]


def of_answers(metric):
    """Effects of five uneven prompts, patched at other places each, in two batches."""
    model = build(metric.family)
    prompts, others = (pad_prompts(draw([9, 5, 7, 8, 6], seed)) for seed in (0, 1))
    places = [[3], [4], [2, 5], [7], [1]]
    return patch_effects(model, "x1.post", PARTITION, prompts, others, metric, positions=places, rows=3)


class Reading:
    """The logit of each prompt's answer, from all logits."""

    def __init__(self, family):
        self.family = family

    def __call__(self, logits, rows):
        return logits[:, 0].gather(1, torch.tensor(ANSWERS)[rows][:, None])[:, 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_metric_of_some_tokens_has_the_same_effects(family):
    seen = []

    def reading(logits, rows):
        seen.append(logits)
        return Reading(family)(logits, rows)

    metric = TokenMetric(reading, torch.tensor(ANSWERS))
    metric.family = family
    for found, expected in zip(of_answers(metric), of_answers(Reading(family)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    first, *others = seen
    assert not first.isnan().any()  # all logits, to compare with
    unread = [token for token in range(VOCABULARY) if token not in ANSWERS]
    assert others
    assert all(logits[..., unread].isnan().all() for logits in others)
    assert "forward" not in vars(build(family).get_output_embeddings())


def test_a_head_whose_tokens_depend_on_each_other_gives_all_logits(monkeypatch, caplog):
    class Normalised(GPT2LMHeadModel):
        def forward(self, *args, **named):
            output = super().forward(*args, **named)
            output.logits = output.logits.log_softmax(-1)
            return output

    model = build("gpt2")
    monkeypatch.setattr(model, "__class__", Normalised)
    seen = []
    metric = TokenMetric(lambda logits, rows: (seen.append(logits), logits[:, 0, 3])[1], torch.tensor([3]))
    prompts, others = (pad_prompts(draw([5, 6], seed)) for seed in (0, 1))
    with caplog.at_level("INFO"):
        patch_effects(model, "x1.post", PARTITION, prompts, others, metric, rows=2)
    assert "all logits are computed" in caplog.text
    assert len(seen) > 1
    assert not any(logits.isnan().any() for logits in seen)


def test_a_metric_that_reads_more_than_it_says_gets_nan():
    metric = TokenMetric(lambda logits, rows: logits[:, 0].sum(1), torch.tensor([3]))
    prompts, others = (pad_prompts(draw([5, 6], seed)) for seed in (0, 1))
    found = patch_effects(build("gpt2"), "x1.post", PARTITION, prompts, others, metric, rows=2)
    assert found.by_group.isnan().all()
