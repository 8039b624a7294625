"""Named sites of families that no table knows, told by their structure; slow: every family there is."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from tiny_families import FAMILIES, build, vocabulary
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM, PreTrainedConfig

from ndm_fast.activations import structure
from ndm_fast.activations.families import family_of
from ndm_fast.activations.hooks import collect_activations, forward_errors, replace_activations
from ndm_fast.activations.models import longest_context
from ndm_fast.activations.sites import (
    blocks_without,
    list_sites,
    number_of_blocks,
    parts_below,
    resolve_site,
    site_width,
    weight_site,
)
from ndm_fast.activations.stream import row_length
from ndm_fast.activations.wrappers import input_device
from ndm_fast.config import HarvestConfig
from ndm_fast.errors import InputError

TOKENS = torch.randint(3, 60, (3, 12), generator=torch.Generator().manual_seed(0))

# family: points of block 1 beside its ends
ALL, PARALLEL = {"attn_out", "resid_mid", "mlp_out"}, {"attn_out", "mlp_out"}
DOZEN: dict[str, set[str]] = {
    "gemma": ALL,
    "phi3": ALL,
    "mixtral": ALL,
    "bloom": ALL,  # adds inside of its modules
    "opt": ALL,  # runs its MLP on all tokens in one row
    "minicpm3": ALL,  # scales what it adds
    "olmo2": ALL,  # normalises what it adds
    "roberta": ALL,  # normalises the sums
    "gptj": PARALLEL,
    "cohere": PARALLEL,
    "falcon": PARALLEL,  # adds attention onto the MLP's output, in place
    "falcon_h1": {"resid_mid", "mlp_out"},  # attention and Mamba side by side: no one module's output
    "mamba": set(),
    "xlm": ALL,  # lists of attentions, norms and MLPs, and no blocks
    "squeezebert": ALL,  # calls no block, but its parts, on [B, d, T]
    "xlnet": {"resid_mid", "mlp_out"},  # [T, B, d]
    "prophetnet": ALL,  # streams of its own behind the text's
    "cpmant": ALL,  # positions of its own before the text
    "albert": ALL,  # one block, run again and again
    "funnel": ALL,  # is given its input three times
}


@cache
def tiny(family: str) -> nn.Module:
    return build(family)


def read(model: nn.Module, names: list[str], tokens: Tensor = TOKENS) -> dict[str, Tensor]:
    with collect_activations(model, names) as captured, torch.no_grad():
        model(tokens)
    return captured


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def check_adds_up(model: nn.Module) -> None:
    """The sums of every block on other tokens than those that the points were found with."""
    names = list_sites(model)
    found = read(model, names)
    assert set(found) == set(names)
    width = {site_width(model, resolve_site(model, name)) for name in names}
    assert {value.shape for value in found.values()} == {(*TOKENS.shape, *width)}
    blocks: dict[str, dict[str, Tensor]] = {}
    for name, value in found.items():
        _, number, point = name.split(".")
        blocks.setdefault(number, {})[point.removeprefix("hook_")] = value
    posts = [block["resid_post"] for block in blocks.values()]
    for block, before in zip(list(blocks.values())[1:], posts, strict=False):
        assert torch.equal(block["resid_pre"], before)
    for form, block in zip(structure.structure_of(model).forms, blocks.values(), strict=False):
        attn, mid, mlp = (block.get(point) for point in ("attn_out", "resid_mid", "mlp_out"))
        if form == "sequential":
            close(block["resid_post"], mid + mlp)
        if form == "sequential" and attn is not None:
            close(mid, block["resid_pre"] + attn)
        if form == "parallel":
            close(block["resid_post"], block["resid_pre"] + attn + mlp)


def check_replaces(model: nn.Module, block: int) -> None:
    """Noise at a point is what the block goes on with, in the skip connection too; itself changes nothing."""
    names = [name for name in list_sites(model) if name.startswith(f"blocks.{block}.")]
    before = read(model, [f"blocks.{block}.hook_resid_post"])[f"blocks.{block}.hook_resid_post"]
    with replace_activations(model, dict.fromkeys(names, lambda h: h)):
        close(read(model, [f"blocks.{block}.hook_resid_post"])[f"blocks.{block}.hook_resid_post"], before)
    mid, mlp, post = (f"blocks.{block}.hook_{p}" for p in ("resid_mid", "mlp_out", "resid_post"))
    noise = torch.randn(before.shape, generator=torch.Generator().manual_seed(1))
    after, end = f"blocks.{block + 1}.hook_resid_pre", f"blocks.{block + 1}.hook_resid_post"
    both = []
    for name in (post, after):
        with replace_activations(model, {name: lambda _: noise}):
            both.append(read(model, [after, end]))
        close(both[-1][after], noise)
    close(both[0][end], both[1][end])
    if mid in names and structure.structure_of(model).forms[block] == "sequential":
        with replace_activations(model, {mid: lambda _: noise}):
            found = read(model, [mlp, post])
        close(found[post], noise + found[mlp])


@pytest.mark.parametrize("family", DOZEN)
def test_points_of_a_family_that_no_table_knows(family):
    model = tiny(family)
    names = {
        name.removeprefix("blocks.1.hook_") for name in list_sites(model) if name.startswith("blocks.1.")
    }
    assert names == {"resid_pre", "resid_post", *DOZEN[family]}
    assert number_of_blocks(model) == 4
    check_adds_up(model)
    check_replaces(model, 1)
    assert not model.training


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_adds_up_or_is_refused_in_one_line(family):
    try:
        model = build(family)
        with torch.no_grad():
            model(TOKENS % vocabulary(model))
    except Exception as error:
        pytest.skip(f"its config cannot be built small, or it does not run on tokens: {type(error).__name__}")
    if family_of(model) is not None:
        pytest.skip("its points are in the table, see test_hooks.py")
    try:
        structure.structure_of(model)
    except InputError:
        with pytest.raises(InputError, match=r"^no site 'x1\.post'.*give a module path, e\.g\. [^\n]*$"):
            resolve_site(model, "x1.post")
        return
    check_adds_up(model)
    check_replaces(model, 1)


def test_what_is_missing_is_named():
    for family, name, says in [
        (
            "gptj",
            "x1.mid",
            "attention and MLP in parallel, with nothing between; use blocks.1.hook_resid_pre",
        ),
        (
            "mamba",
            "m1",
            "no module of block 1 .* gives a mlp_out that adds up; use blocks.1.hook_resid_pre, ",
        ),
        ("gptj", "x4.post", "has 4 blocks, use 0 to 3"),
    ]:
        with pytest.raises(InputError, match=says):
            resolve_site(tiny(family), name)


def test_streams_that_are_not_handed_on_are_refused():
    for family, says in [
        ("gemma3n_text", r"do not hand a residual stream \[B, T, d\] on"),  # four streams
        ("perceiver", r"do not hand a residual stream \[B, T, d\] on"),  # 8 latents, whatever the text
        ("reformer", "gives other activations for the same tokens each time"),  # random hashes
    ]:
        with pytest.raises(InputError, match=rf"no site 'x1\.post'.*{says}.*give a module path, e\.g\. "):
            resolve_site(tiny(family), "x1.post")
        assert all(not name.startswith("blocks.") for name in list_sites(tiny(family)))


class Shifted(nn.Module):
    """Blocks behind something that puts two positions of its own beside the text's."""

    def __init__(self, behind: bool, mixes: bool = False) -> None:
        super().__init__()
        self.config = PreTrainedConfig(vocab_size=60, num_hidden_layers=2)
        self.embed, self.behind, self.mixes = nn.Embedding(60, 16), behind, mixes
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 16, batch_first=True) for _ in range(2))

    def forward(self, input_ids: Tensor) -> Tensor:
        own, text = torch.ones(len(input_ids), 2, 16), self.embed(input_ids)
        h = torch.cat([text, own] if self.behind else [own, text], 1)
        h = h.flip(1) if self.mixes else h
        for layer in self.layers:
            h = layer(h)
        return h


def test_positions_beside_the_text_are_left_out_where_it_is_proved_which_they_are(monkeypatch):
    monkeypatch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: False)
    model = Shifted(behind=False).eval()
    found = read(model, ["x0.pre", "x1.post"])
    close(found["x0.pre"], model.embed(TOKENS))
    assert found["x1.post"].shape == (*TOKENS.shape, 16)
    with replace_activations(model, {"x1.post": torch.zeros_like}), torch.no_grad():
        changed = model(TOKENS)
    assert torch.equal(changed[:, 2:], torch.zeros(*TOKENS.shape, 16))
    assert changed[:, :2].abs().min() > 0
    with pytest.raises(InputError, match="on 2 positions lacks those that the model puts beside the text's"):
        read(model, ["x1.post"], TOKENS[:, :0])
    for other in (Shifted(behind=True), Shifted(behind=False, mixes=True)):
        with pytest.raises(InputError, match="do not hand a residual stream"):
            resolve_site(other.eval(), "x1.post")


class Parts(nn.Module):
    """Blocks whose parts are in two lists; the skip connection reads the stream itself, or a copy of it."""

    def __init__(self, copies: bool) -> None:
        super().__init__()
        self.config = PreTrainedConfig(vocab_size=60, num_hidden_layers=2)
        self.embed, self.copies = nn.Embedding(60, 16), copies
        self.mixers, self.norms = (
            nn.ModuleList(make() for _ in range(2))
            for make in (lambda: nn.Linear(16, 16), lambda: nn.LayerNorm(16))
        )

    def forward(self, input_ids: Tensor) -> Tensor:
        h = self.embed(input_ids)
        for mixer, norm in zip(self.mixers, self.norms, strict=True):
            h = norm((h.clone() if self.copies else h) + mixer(h))
        return h


def test_parts_whose_skip_connection_cannot_be_reached_are_refused():
    model = Parts(copies=False).eval()
    assert [n for n in list_sites(model) if "blocks.1" in n] == [
        f"blocks.1.hook_resid_{p}" for p in ("pre", "post")
    ]
    with pytest.raises(InputError, match="do not all read the residual stream where they are given it"):
        resolve_site(Parts(copies=True).eval(), "x1.post")


@pytest.mark.parametrize(
    "family", ["xlm", "squeezebert", "xlnet", "prophetnet", "cpmant", "albert", "funnel"]
)
def test_gradients_flow_through_replacements_in_other_layouts(family):
    model = tiny(family)
    width = site_width(model, resolve_site(model, "x2.pre"))
    along = torch.randn(width, generator=torch.Generator().manual_seed(0))
    far = torch.zeros((), requires_grad=True)
    with replace_activations(model, {"x2.pre": lambda h: h + h.detach().std() * along * far}):
        model(TOKENS).logits.square().mean().backward()
    ahead = []
    for step in (1e-3, -1e-3):
        moved = {"x2.pre": lambda h, by=step: h + h.std() * along * by}
        with replace_activations(model, moved), torch.no_grad():
            ahead.append(float(model(TOKENS).logits.double().square().mean()))
    slope = (ahead[0] - ahead[1]) / 2e-3
    assert float(far.grad) == pytest.approx(slope, rel=0.05, abs=1e-3)
    assert abs(slope) > 1e-2


def test_calls_of_one_module_are_told_apart():
    model = tiny("albert")
    names = [f"x{n}.post" for n in range(4)]
    with torch.no_grad():
        expected = model(TOKENS, output_hidden_states=True).hidden_states[1:]
    for _ in range(2):  # a pass that ends early does not spoil the count of the next
        for name, value in zip(names, expected, strict=True):
            close(read(model, [name])[name], value)
    assert [*blocks_without(model, [resolve_site(model, "x1.post")])] == [
        model.albert.encoder.albert_layer_groups[0]
    ]
    assert blocks_without(model, [resolve_site(model, "x1.mid")]) == []


def test_a_wrong_sum_is_refused_and_not_guessed(monkeypatch):
    """A gate between the branch and its sum: no module gives what is added."""
    config = MixtralConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    model = MixtralForCausalLM(config).eval()
    layer = type(model.model.layers[0])

    def forward(self: Any, hidden_states: Tensor, **options: Any) -> Tensor:
        attn, _ = self.self_attn(self.input_layernorm(hidden_states), **options)
        hidden_states = hidden_states + attn * torch.linspace(0.5, 2, 32)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))

    monkeypatch.setattr(layer, "forward", forward)
    names = [name for name in list_sites(model) if name.startswith("blocks.0.")]
    assert names == [f"blocks.0.hook_{p}" for p in ("resid_pre", "resid_mid", "mlp_out", "resid_post")]
    with pytest.raises(InputError, match=r"no module of block 0 .* gives a attn_out that adds up"):
        resolve_site(model, "a0")


def test_a_module_path_finds_its_named_point():
    model = tiny("phi3")
    assert resolve_site(model, "layers.1.resid_attn_dropout") == resolve_site(model, "a1")
    assert resolve_site(model, "model.layers.1") == resolve_site(model, "x1.post")
    assert resolve_site(model, "model.layers.1.mlp.down_proj").name == "model.layers.1.mlp.down_proj"
    assert parts_below(model, resolve_site(model, "x1.post")) is None
    assert blocks_without(model, [resolve_site(model, "x1.mid")]) == [
        block for number, block in enumerate(model.model.layers) if number != 1
    ]


def test_finding_points_leaves_the_model_as_it_was():
    model = build("phi3").train()
    model.model.layers[0].eval()
    list_sites(model)
    assert model.training
    assert not model.model.layers[0].mlp.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.layers.modules())


def test_a_model_without_weights_gives_its_blocks_for_a_plan():
    with torch.device("meta"):
        model = MixtralForCausalLM(MixtralConfig(num_hidden_layers=2))
    with pytest.raises(InputError, match=r"has no weights yet.*give a module path, e\.g\. model\.layers\.1"):
        resolve_site(model, "x1.mid")
    assert weight_site(model, "x1.mid").module == "model.layers.1"
    with pytest.raises(InputError, match="has 2 blocks, use 0 to 1"):
        weight_site(model, "x2.mid")


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=60, n_positions=32, n_embd=32, n_layer=2, n_head=4)).eval()


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_wrapped_models_are_looked_through(wrap):
    plain = gpt2()
    wrapped = wrap(plain)
    with torch.no_grad():
        wrapped(TOKENS)  # a compiled model has compiled by now, without hooks
    names = ["x0.mid", "a1", "x1.post"]
    assert list_sites(wrapped) == list_sites(plain)
    assert site_width(wrapped, resolve_site(wrapped, "a1")) == 32
    expected = read(plain, names)
    for name, value in read(wrapped, names).items():
        assert torch.equal(value, expected[name])
    with replace_activations(wrapped, {"x1.post": torch.zeros_like}), torch.no_grad():
        changed = wrapped(TOKENS).logits
    with replace_activations(plain, {"x1.post": torch.zeros_like}), torch.no_grad():
        assert torch.equal(changed, plain(TOKENS).logits)


def test_models_partly_on_disk_are_run_where_they_are_run(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    plain = gpt2()
    expected = read(plain, ["x0.mid", "x1.post"])
    offloaded = accelerate.disk_offload(plain, offload_dir=tmp_path, execution_device=torch.device("cpu"))
    assert next(offloaded.parameters()).is_meta
    assert input_device(offloaded) == torch.device("cpu")
    for name, value in read(offloaded, ["x0.mid", "x1.post"]).items():
        assert torch.equal(value, expected[name])


def test_an_adapted_model_is_looked_through():
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(gpt2(), peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    assert list(read(adapted.eval(), ["x1.mid"])) == ["x1.mid"]


def test_roberta_takes_two_tokens_fewer_than_it_has_positions():
    model = tiny("roberta")
    longest = longest_context(model.config)
    assert longest == 64 - model.config.pad_token_id - 1
    assert row_length(HarvestConfig(), model.config) == longest
    with torch.no_grad():
        model(torch.full((1, longest), 5))
        tokens = torch.full((1, 64), 5)
        with (
            pytest.raises(
                InputError, match=r"model 'tiny' failed on x1.post, batch 3, tokens \[1, 64\] \(.*\): try"
            ),
            forward_errors(model, "x1.post, batch 3", tokens, "tiny"),
        ):
            model(tokens)


def test_a_token_that_the_model_does_not_know_is_named():
    model = gpt2()
    known = model.config.vocab_size
    tokens = torch.tensor([[3, known + 7]])
    wrong = rf"its tokenizer gives token {known + 7}, the model knows {known}: give its own"
    with pytest.raises(InputError, match=wrong), forward_errors(model, "x1.post", tokens), torch.no_grad():
        model(tokens)
