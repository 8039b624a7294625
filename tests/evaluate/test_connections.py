"""Connections against formulas and forward passes written by hand, in families that differ."""

from functools import cache

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from ndm_fast.activations.hooks import collect_activations, replace_activations
from ndm_fast.errors import InputError
from ndm_fast.evaluate.connections.agreement import area_under_curve, rank_correlation, rank_of, strong
from ndm_fast.evaluate.connections.composition import kept, scored_reads, scored_through, through
from ndm_fast.evaluate.connections.finding import entrance, find_heads
from ndm_fast.evaluate.connections.heads import SIDES
from ndm_fast.evaluate.connections.mlp_patching import MlpPatcher, between
from ndm_fast.evaluate.connections.mlps import find_mlps
from ndm_fast.evaluate.connections.path_patching import PathPatcher
from ndm_fast.evaluate.connections.weights import Factors, head_weights, mlp_shares, read_shares, write_shares
from ndm_fast.evaluate.patching.patching import logit_of
from ndm_fast.evaluate.patching.prompts import pad_prompts
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
    "qwen3": {**GQA, "head_dim": 16},
    "gemma2": {**GQA, "sliding_window": 4, "query_pre_attn_scalar": 8},
    "gemma3_text": {**GQA, "head_dim": 16, "sliding_window": 4, "query_pre_attn_scalar": 8},
    "gpt_neox": {"use_parallel_residual": False},
    "phi": {"num_key_value_heads": 4},
    "phi3": GQA,
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "granite": {**GQA, "residual_multiplier": 0.5},
    "bloom": {"n_head": 4},
}
PARTITION = SubspacePartition(random_rotation(WIDTH, torch.Generator().manual_seed(5)), WIDTHS)
OTHER = SubspacePartition(random_rotation(WIDTH, torch.Generator().manual_seed(6)), WIDTHS)


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Tiny tensors."""


@cache
def build(family):
    torch.manual_seed(1)
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES.get(family, {})})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().requires_grad_(False)
    for weight in model.parameters():
        weight.add_(0.15 * torch.randn_like(weight))
    return model


def draw(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def matrices_by_hand(family):
    """[H, d, c] of Q, K, V and [H, c, d] of the output in block 1, from the weights of the family alone."""
    model = build(family)
    if family == "gpt2":
        block = model.transformer.h[1]
        centre = torch.eye(WIDTH) - 1 / WIDTH
        folded = centre @ torch.diag(block.ln_1.weight) @ block.attn.c_attn.weight
        sides = [part.view(WIDTH, 4, 8).permute(1, 0, 2) for part in folded.split(WIDTH, 1)]
        return dict(zip(SIDES, sides, strict=True)), block.attn.c_proj.weight.view(4, 8, WIDTH)
    layer, added = model.model.layers[1], 1.0 if family.startswith("gemma") else 0.0
    attention, width = layer.self_attn, layer.self_attn.head_dim
    norm = torch.diag(layer.input_layernorm.weight + added)
    sides = {}
    for side, name in zip(SIDES, ("q_proj", "k_proj", "v_proj"), strict=True):
        rows = getattr(attention, name).weight.view(-1, width, WIDTH)
        rows = rows if side == "Q" else rows[[0, 0, 1, 1]]
        sides[side] = torch.stack([norm @ head.T for head in rows])
        scale = getattr(attention, f"{side.lower()}_norm", None) if side != "V" else None
        if scale is not None:
            sides[side] = sides[side] * (scale.weight + added)
    out = attention.o_proj.weight.T.view(4, width, WIDTH)
    if family.startswith("gemma"):
        out = out * (layer.post_attention_layernorm.weight + added)
    return sides, out


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "qwen3", "gemma2", "gemma3_text"])
def test_shares_are_those_of_the_matrices_written_out(family):
    sides, out = matrices_by_hand(family)
    whole = {
        "Q": sides["Q"] @ sides["K"].mT,
        "K": sides["K"] @ sides["Q"].mT,
        "V": sides["V"] @ out,
    }
    found = head_weights(find_heads(build(family), [1])[0])
    for side in SIDES:
        for s in range(3):
            read = (PARTITION.basis(s).T @ whole[side]).square().sum((1, 2)) / whole[side].square().sum(
                (1, 2)
            )
            torch.testing.assert_close(
                read_shares(found.acts(side), PARTITION)[:, s], read, rtol=1e-4, atol=1e-6
            )
            write = (whole["V"] @ PARTITION.basis(s)).square().sum((1, 2)) / whole["V"].square().sum((1, 2))
            torch.testing.assert_close(
                write_shares(found.acts("V"), PARTITION)[:, s], write, rtol=1e-4, atol=1e-6
            )
            for t in range(3):
                both = (PARTITION.basis(s).T @ whole["V"] @ OTHER.basis(t)).square().sum((1, 2))
                torch.testing.assert_close(
                    through(found.acts("V"), PARTITION, OTHER)[:, s, t],
                    both / whole["V"].square().sum((1, 2)),
                    rtol=1e-4,
                    atol=1e-6,
                )


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_are_found_in_every_family(family):
    heads = find_heads(build(family), [0, 1, 2])
    assert [one.block for one in heads] == [0, 1, 2]
    shared = (
        2
        if family in ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "falcon", "granite")
        else 1
    )
    assert {(one.count, one.shared) for one in heads} == {(4, shared)}
    shares = torch.stack([read_shares(head_weights(heads[0]).acts(side), PARTITION) for side in SIDES])
    torch.testing.assert_close(shares.sum(-1), torch.ones(3, 4))


def test_mlp_shares_are_those_of_the_matrices():
    model = build("gemma3_text")
    layer = model.model.layers[1]
    norm = torch.diag(layer.pre_feedforward_layernorm.weight + 1)
    read = torch.cat([norm @ layer.mlp.gate_proj.weight.T, norm @ layer.mlp.up_proj.weight.T], 1)
    write = layer.mlp.down_proj.weight.T * (layer.post_feedforward_layernorm.weight + 1)
    found = mlp_shares(find_mlps(model, [1])[0], PARTITION, OTHER)
    for s in range(3):
        share = (PARTITION.basis(s).T @ read).square().sum() / read.square().sum()
        assert found.read[s] == pytest.approx(float(share), rel=1e-4)
        share = (write @ OTHER.basis(s)).square().sum() / write.square().sum()
        assert found.write[s] == pytest.approx(float(share), rel=1e-4)


def results_by_hand(model, block, x, changed):
    """[T, H, c] results of the heads of a Llama block, where some sides read another stream."""
    layer = model.model.layers[block]
    a, width = layer.self_attn, layer.self_attn.head_dim
    read = {side: layer.input_layernorm(changed.get(side, x)) for side in SIDES}
    length = len(x)
    q, k, v = (
        getattr(a, name)(read[side]).view(1, length, -1, width).transpose(1, 2)
        for side, name in zip(SIDES, ("q_proj", "k_proj", "v_proj"), strict=True)
    )
    q, k = apply_rotary_pos_emb(q, k, *model.model.rotary_emb(v, torch.arange(length)[None]))
    found = torch.zeros(length, 4, width)
    for head in range(4):
        scores = q[0, head] @ k[0, head // 2].T / width**0.5
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        found[:, head] = scores.softmax(1) @ v[0, head // 2]
    return found


@pytest.mark.parametrize("block", [1, 2])
def test_path_patching_is_that_of_a_llama_written_by_hand(block):
    """Each edge alone, each prompt alone; what the head writes flows on through the whole model."""
    model = build("llama")
    prompts, others, at = draw([7, 9]), draw([7, 9], seed=1), [[2, 4], [3, 5]]
    heads = find_heads(model, [1, 2])
    patcher = PathPatcher(model, "x0.post", "x2.post", (PARTITION, OTHER), heads, rows=1, small=0)
    found = patcher.measure(pad_prompts(prompts), pad_prompts(others), logit_of([3, 5]), positions=at)
    assert found.patched.shape == (3, 2, 4, 3, 2)
    own, out = f"blocks.{block}.hook_resid_pre", f"blocks.{block}.hook_attn_out"
    for row, answer in enumerate((3, 5)):
        with collect_activations(model, ["x0.post", own]) as here:
            model(torch.tensor([prompts[row]]))
        with collect_activations(model, ["x0.post"]) as there:
            model(torch.tensor([others[row]]))
        clean = model(torch.tensor([prompts[row]])).logits[0, -1, answer]
        difference = torch.zeros_like(here["x0.post"][0])
        difference[at[row]] = (there["x0.post"] - here["x0.post"])[0, at[row]]
        for s in range(3):
            moved = here[own][0] + difference @ PARTITION.basis(s) @ PARTITION.basis(s).T
            for place, side in enumerate(SIDES):
                before = results_by_hand(model, block, here[own][0], {})
                after = results_by_hand(model, block, here[own][0], {side: moved})
                for head in (0, 3):
                    one = before.clone()
                    one[:, head] = after[:, head]
                    written = model.model.layers[block].self_attn.o_proj(one.flatten(1))
                    with replace_activations(model, {out: lambda _, written=written: written[None]}):
                        logit = model(torch.tensor([prompts[row]])).logits[0, -1, answer]
                    effect = found.patched[s, block - 1, head, place, row]
                    assert float(effect) == pytest.approx(float(clean - logit), abs=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_first_order_is_the_limit_of_small_differences(family):
    model = build(family)
    heads = find_heads(model, [1])
    patcher = PathPatcher(model, "x0.post", "x1.post", (PARTITION, OTHER), heads, small=0)
    prompts, others = pad_prompts(draw([8, 8])), pad_prompts(draw([8, 8], seed=1))
    columns = torch.tensor([[3, 5], [4, 6]])
    used, reading, which = torch.ones_like(columns).bool(), torch.tensor([[7], [7]]), torch.arange(2)
    batch = patcher._passes.prepared(prompts, others, which, columns, used, reading)
    small = batch._replace(difference=batch.difference * 2e-2)
    _, patched, attributed, arriving, _ = patcher._measured(small, logit_of([3, 5]))
    assert float(torch.corrcoef(torch.stack([patched.flatten(), attributed.flatten()]))[0, 1]) > 0.99
    assert arriving.shape == (3, 1, 4, 3, 3)


@pytest.mark.parametrize("block", [1, 2])
def test_mlp_edges_are_those_of_a_llama_run_by_hand(block):
    """Each subspace alone, each prompt alone; nothing but the one MLP sees it."""
    model = build("llama")
    prompts, others, at = draw([7, 9]), draw([7, 9], seed=1), [[2, 4], [3, 5]]
    patcher = MlpPatcher(
        model, "x0.post", "x2.post", (PARTITION, OTHER), find_mlps(model, [1, 2]), rows=1, together=2
    )
    found = patcher.measure(pad_prompts(prompts), pad_prompts(others), logit_of([3, 5]), positions=at)
    assert found.patched.shape == found.attributed.shape == (3, 2, 2)
    mid, out = f"blocks.{block}.hook_resid_mid", f"blocks.{block}.hook_mlp_out"
    layer = model.model.layers[block]
    for row, answer in enumerate((3, 5)):
        with collect_activations(model, ["x0.post", mid, "x2.post"]) as here:
            model(torch.tensor([prompts[row]]))
        clean = model(torch.tensor([prompts[row]])).logits[0, -1, answer]
        with collect_activations(model, ["x0.post"]) as there:
            model(torch.tensor([others[row]]))
        difference = torch.zeros_like(here["x0.post"][0])
        difference[at[row]] = (there["x0.post"] - here["x0.post"])[0, at[row]]
        for s in range(3):
            part = difference @ PARTITION.basis(s) @ PARTITION.basis(s).T
            written = layer.mlp(layer.post_attention_layernorm(here[mid] + part))
            with replace_activations(model, {out: lambda _, written=written: written}):
                logit = model(torch.tensor([prompts[row]])).logits[0, -1, answer]
            assert float(found.patched[s, block - 1, row]) == pytest.approx(float(clean - logit), abs=2e-5)
            moved = here["x2.post"] + part
            with replace_activations(model, {"x2.post": lambda _, moved=moved: moved}):
                logit = model(torch.tensor([prompts[row]])).logits[0, -1, answer]
            assert float(found.straight[s, row]) == pytest.approx(float(clean - logit), abs=2e-5)


@pytest.mark.parametrize("family", [*FAMILIES, "opt"])
def test_first_order_of_mlps_and_skip_is_the_limit_of_small_differences(family):
    model = build(family)
    mlps = find_mlps(model, [1])
    patcher = MlpPatcher(model, "x0.post", "x1.post", (PARTITION, OTHER), mlps, together=2)
    prompts, others = pad_prompts(draw([8, 8])), pad_prompts(draw([8, 8], seed=1))
    columns = torch.tensor([[3, 7], [4, 7]])
    used, reading, which = torch.ones_like(columns).bool(), torch.tensor([[7], [7]]), torch.arange(2)
    batch = patcher._passes.prepared(prompts, others, which, columns, used, reading)
    small = batch._replace(difference=batch.difference * 2e-2)
    _, patched, attributed, arriving, straight, into = patcher._measured(small, logit_of([3, 5]))
    summed = (straight.sum(1), into.sum(1)), (patched.sum(2), arriving.sum(2))
    for exact, limit in ((patched, attributed), *summed):
        assert float(torch.corrcoef(torch.stack([exact.flatten(), limit.flatten()]))[0, 1]) > 0.99
        assert float(exact.norm() / limit.norm()) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(("rows", "together"), [(1, 1), (2, 3), (8, 2)])
def test_mlp_edges_do_not_depend_on_batches_or_on_padding(rows, together):
    model = build("gemma3_text")
    sites = model, "x0.post", "x2.post", (PARTITION, OTHER)
    patcher = MlpPatcher(*sites, find_mlps(model, [1, 2]), rows=rows, together=together)
    long, other = draw([9, 6, 7]), draw([9, 6, 7], seed=1)
    found = patcher.measure(pad_prompts(long), pad_prompts(other), logit_of([3, 5, 2]), positions=[[-2]] * 3)
    alone = patcher.measure(pad_prompts(long[1:2]), pad_prompts(other[1:2]), logit_of([5]), positions=[[-2]])
    for name in ("patched", "attributed", "straight"):
        every, one = getattr(found, name), getattr(alone, name)
        torch.testing.assert_close(every[..., 1], one[..., 0], atol=2e-5, rtol=1e-3)


def test_mlps_between_sites_are_those_that_read_one_and_reach_the_other():
    assert between("blocks.0.hook_resid_post", "blocks.2.hook_resid_post") == range(1, 3)
    assert between("blocks.0.hook_resid_mid", "blocks.2.hook_resid_mid") == range(2)
    assert between("blocks.1.hook_resid_pre", "blocks.2.hook_resid_post") == range(1, 3)


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_effects_do_not_depend_on_batches_or_on_padding(rows):
    model = build("gemma3_text")
    heads = find_heads(model, [1, 2])
    patcher = PathPatcher(model, "x0.post", "x2.post", (PARTITION, OTHER), heads, rows=rows, small=0)
    long, other = draw([9, 6, 7]), draw([9, 6, 7], seed=1)
    found = patcher.measure(pad_prompts(long), pad_prompts(other), logit_of([3, 5, 2]), positions=[[-2]] * 3)
    alone = patcher.measure(pad_prompts(long[1:2]), pad_prompts(other[1:2]), logit_of([5]), positions=[[-2]])
    torch.testing.assert_close(found.patched[..., 1], alone.patched[..., 0], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(found.attributed[..., 1], alone.attributed[..., 0], atol=2e-5, rtol=1e-3)


def test_edges_of_small_change_are_told_without_running_them():
    model = build("llama")
    heads = find_heads(model, [1, 2])
    prompts, others = pad_prompts(draw([9, 9])), pad_prompts(draw([9, 9], seed=1))
    exact, quick = (
        PathPatcher(model, "x0.post", "x2.post", (PARTITION, OTHER), heads, small=small).measure(
            prompts, others, logit_of([3, 5]), positions=[[4, 5]] * 2
        )
        for small in (0, 0.3)
    )
    assert exact.run == 1
    assert 0.2 < quick.run < 0.9
    largest = float(exact.patched.abs().max())
    assert float((exact.patched - quick.patched).abs().max()) < 0.05 * largest


def test_what_cannot_be_known_is_refused():
    with pytest.raises(InputError, match="heads of block 1 of Olmo2"):
        find_heads(build("olmo2"), [1])
    with pytest.raises(InputError, match="not simply added to the stream"):
        entrance(build("bert"), 1)
    patcher = PathPatcher(
        build("llama"), "x0.post", "x1.post", (PARTITION, OTHER), find_heads(build("llama"), [1])
    )
    with pytest.raises(InputError, match="pairs of equal length"):
        patcher.measure(pad_prompts(draw([7, 5])), pad_prompts(draw([5, 7])), logit_of([3, 5]))


def test_parallel_blocks_take_the_change_at_their_end():
    assert entrance(build("phi"), 1) == "blocks.1.hook_resid_post"
    assert entrance(build("gpt_neox"), 1) == "blocks.1.hook_resid_mid"


def test_a_head_that_reads_one_subspace_alone_scores_as_high_as_can_be():
    left = (PARTITION.basis(2) @ torch.randn(8, 4, generator=torch.Generator().manual_seed(0)))[None]
    right = torch.randn(1, 4, WIDTH, generator=torch.Generator().manual_seed(1))
    scored = scored_reads(Factors(left, right), PARTITION)
    torch.testing.assert_close(scored.share, torch.tensor([[0.0, 0.0, 1.0]]), atol=1e-5, rtol=0)
    torch.testing.assert_close(scored.times[0, 2], torch.tensor(WIDTH / 8), atol=1e-4, rtol=0)
    assert scored.deviations[0, 2] > 5
    assert scored.deviations[0, :2].max() < 0


def test_random_subspaces_score_as_chance_does():
    generator = torch.Generator().manual_seed(0)
    acts = Factors(
        torch.randn(40, WIDTH, 4, generator=generator), torch.randn(40, 4, WIDTH, generator=generator)
    )
    scored = scored_through(acts, PARTITION, OTHER)
    assert float(scored.times.mean()) == pytest.approx(1, abs=0.02)
    assert float(scored.deviations.mean()) == pytest.approx(0, abs=0.1)
    assert float(scored.deviations.std()) == pytest.approx(1, abs=0.2)
    torch.testing.assert_close(kept(PARTITION, PARTITION), torch.eye(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(kept(PARTITION, OTHER).sum(1), torch.ones(3))


def test_areas_and_ranks():
    scores, true = torch.tensor([4.0, 3, 2, 2, 0]), torch.tensor([True, False, True, False, False])
    assert area_under_curve(scores, true) == pytest.approx((3 + 1.5) / 6)
    assert rank_of(scores, (0,)) == 1
    assert rank_of(scores, (3,)) == 4  # a tie counts against it
    assert rank_correlation(scores, scores**3) == pytest.approx(1)
    assert strong(torch.tensor([1.0, -0.2, 0.05])).tolist() == [True, True, False]
