"""Reading and replacing activations, checked against the arithmetic of each family's block."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from ndm_fast.activations.hooks import collect_activations, replace_activations
from ndm_fast.activations.sites import list_sites, number_of_blocks, resolve_site
from ndm_fast.errors import InputError

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 61,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GQA = {"num_key_value_heads": 2, "head_dim": 8}
WINDOW = {**GQA, "sliding_window": 4}  # shorter than the test's sequences
FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "gpt2": ("gpt2", {}),
    "llama": ("llama", GQA),
    "mistral": ("mistral", WINDOW),
    "qwen2": ("qwen2", GQA),
    "qwen3": ("qwen3", GQA),
    "gemma2": ("gemma2", {**WINDOW, "query_pre_attn_scalar": 8}),
    "gemma3": ("gemma3_text", {**WINDOW, "query_pre_attn_scalar": 8, "sliding_window_pattern": 2}),
    "neox_parallel": ("gpt_neox", {"use_parallel_residual": True}),
    "neox_sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "phi": ("phi", {"num_key_value_heads": 4}),
    "bert": ("bert", {}),
}
PARALLEL = {"neox_parallel", "phi"}
WITH_MID = [family for family in FAMILIES if family not in PARALLEL]
BUILT: list[nn.Module] = []
TOKENS = torch.randint(1, 61, (2, 9), generator=torch.Generator().manual_seed(0))


@cache
def build(family: str, headed: bool = True) -> nn.Module:
    """A random model in eval mode, with norms and biases away from their trivial initial values."""
    model_type, extra = FAMILIES[family]
    head = AutoModelForMaskedLM if family == "bert" else AutoModelForCausalLM
    config = AutoConfig.for_model(model_type, **{**SIZES, **extra})
    torch.manual_seed(1)
    model = (head if headed else AutoModel).from_config(config).eval().requires_grad_(False)
    for weight in model.parameters():
        weight.add_(0.15 * torch.randn_like(weight))
    BUILT.append(model)
    return model


@pytest.fixture(autouse=True)
def _no_hook_is_left() -> Iterator[None]:
    yield
    assert sum(map(count_hooks, BUILT)) == 0


def count_hooks(model: nn.Module) -> int:
    """Hooks that transformers did not install itself (it keeps its recorders for good)."""
    hooks = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return sum(not h.__module__.startswith("transformers") for h in hooks)


def output(model: nn.Module, **kwargs: object) -> Tensor:
    result = model(TOKENS, **kwargs)
    return result.logits if hasattr(result, "logits") else result.last_hidden_state


def tensor(result: Tensor | tuple) -> Tensor:
    """What a block returns: a tensor in transformers 5, a tuple that starts with it in 4."""
    return result[0] if isinstance(result, tuple) else result


def read(model: nn.Module, *names: str) -> list[Tensor]:
    with collect_activations(model, names) as captured:
        model(TOKENS)
    return [captured[name] for name in names]


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("headed", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_residual_stream_adds_up(family: str, headed: bool) -> None:
    model = build(family, headed)
    for i in range(number_of_blocks(model)):
        pre, attn, mlp, post = read(model, f"x{i}.pre", f"a{i}", f"m{i}", f"x{i}.post")
        assert min(t.std() for t in (pre, attn, mlp, post)) > 1e-2
        assert pre.shape == (2, 9, 32)
        if family in PARALLEL:
            close(post, pre + attn + mlp)
            continue
        (mid,) = read(model, f"x{i}.mid")
        if family == "bert":
            block = model.get_submodule(resolve_site(model, f"x{i}.post").module)
            close(mid, block.attention.output.LayerNorm(pre + attn))
            close(post, block.output.LayerNorm(mid + mlp))
        else:
            close(mid, pre + attn)
            close(post, mid + mlp)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_sites_in_one_pass_agree_with_hidden_states(family: str) -> None:
    model = build(family)
    names, blocks = list_sites(model), number_of_blocks(model)
    with collect_activations(model, names, stop_after_last=False) as captured:
        states = model(TOKENS, output_hidden_states=True).hidden_states
    assert list(captured) == names  # list_sites is in forward order
    for i in range(blocks):
        assert torch.equal(captured[f"blocks.{i}.hook_resid_pre"], states[i])
        if i + 1 < blocks:
            assert torch.equal(captured[f"blocks.{i}.hook_resid_post"], states[i + 1])
    last = captured[f"blocks.{blocks - 1}.hook_resid_post"]
    assert torch.equal(last, states[blocks]) == (family == "bert")  # the others apply a final norm


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pass_stops_after_the_last_site_in_execution_order(family: str) -> None:
    model = build(family)
    blocks = resolve_site(model, "x0.post").module.removesuffix(".0")
    calls: list[int] = []
    counters = [
        block.register_forward_pre_hook(lambda *_, i=i: calls.append(i))
        for i, block in enumerate(model.get_submodule(blocks))
    ]
    try:
        reached = "never"
        with collect_activations(model, ["x1.post", "x0.pre", f"{blocks}.0"]) as captured:
            model(TOKENS)
            reached = "after the call"
        assert (calls, reached) == ([0, 1], "never")
        assert list(captured) == ["x0.pre", f"{blocks}.0", "x1.post"]
        assert torch.equal(captured[f"{blocks}.0"], read(model, "x0.post")[0])
    finally:
        for counter in counters:
            counter.remove()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_hooks_go_and_the_users_exception_comes_through(error: type[BaseException]) -> None:
    model = build("gpt2")

    def fail(_: Tensor) -> Tensor:
        raise error("mine")

    def in_the_block() -> None:
        with collect_activations(model, "x2.mid"):
            assert count_hooks(model) == 1
            raise error("mine")

    def in_the_forward() -> None:
        replacements = {"x1.post": fail, "x0.mid": lambda h: h}
        with collect_activations(model, "x2.mid"), replace_activations(model, replacements):
            assert count_hooks(model) == 3
            model(TOKENS)

    for run in (in_the_block, in_the_forward):
        with pytest.raises(error, match="mine"):
            run()
        assert count_hooks(model) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_replacing_by_itself_changes_nothing(family: str) -> None:
    model = build(family)
    with replace_activations(model, dict.fromkeys(list_sites(model), lambda h: h)):
        assert torch.equal(output(model), (after := output(model)))
    assert torch.equal(after, output(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_replacing_between_blocks_is_running_on_from_the_new_stream(family: str) -> None:
    model = build(family)
    new = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(2))
    block = model.get_submodule(resolve_site(model, "x2.post").module)
    with replace_activations(model, {"x1.post": lambda h: new}):
        after = read(model, "x1.post", "x2.pre", "x2.post")
        states = model(TOKENS, output_hidden_states=True).hidden_states
    assert torch.equal(after[0], new)
    assert torch.equal(after[1], new)
    assert torch.equal(states[2], new)
    with replace_activations(model, {"x2.pre": lambda h: new}):
        assert torch.equal(read(model, "x2.post")[0], after[2])
    # By hand: call the last block itself on the new stream, with the arguments the model gives it.
    arguments: list[tuple[tuple, dict]] = []
    handle = block.register_forward_pre_hook(lambda _, a, k: arguments.append((a, k)), with_kwargs=True)
    model(TOKENS, **({} if family == "bert" else {"use_cache": False}))
    handle.remove()
    ((_, *rest), kwargs) = arguments[0]
    result = block(new, *rest, **kwargs)
    close(tensor(result), after[2])


def second_half(family: str, block: nn.Module, mid: Tensor) -> Tensor:
    """What a block makes of its resid_mid, by hand."""
    if family == "bert":
        return block.output(block.intermediate(mid), mid)
    if family == "gpt2":
        return mid + block.mlp(block.ln_2(mid))
    if family.startswith("gemma"):
        return mid + block.post_feedforward_layernorm(block.mlp(block.pre_feedforward_layernorm(mid)))
    return mid + block.mlp(block.post_attention_layernorm(mid))


@pytest.mark.parametrize("family", WITH_MID)
def test_replacing_mid_reaches_the_mlp_and_the_skip_connection(family: str) -> None:
    model = build(family)
    new = 5 * torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(3))
    block = model.get_submodule(resolve_site(model, "x1.post").module)
    with replace_activations(model, {"x1.mid": lambda h: new}):
        mid, post = read(model, "x1.mid", "x1.post")
    assert torch.equal(mid, new)
    close(post, second_half(family, block, new))


@pytest.mark.parametrize("family", FAMILIES)
def test_replacing_a_branch(family: str) -> None:
    model = build(family)
    with replace_activations(model, {"m1": torch.zeros_like, "a1": lambda h: h.zero_()}):
        pre, post = read(model, "x1.pre", "x1.post")
    if family != "bert":
        close(post, pre)
    else:
        block = model.get_submodule(resolve_site(model, "x1.post").module)
        close(post, block.output.LayerNorm(block.attention.output.LayerNorm(pre)))


@pytest.mark.parametrize("family", WITH_MID)
def test_patching_one_position_leaves_earlier_ones_bit_identical(family: str) -> None:
    model = build(family)

    def patch(h: Tensor) -> Tensor:
        h[:, 4] = 7.0  # in place, on the copy the function is given
        return h

    clean = read(model, "x1.mid", "x1.post")
    with replace_activations(model, {"x1.mid": patch}):
        patched = read(model, "x1.mid", "x1.post")
    for before, after in zip(clean, patched, strict=True):
        same = (before == after).all(dim=-1)
        assert same.sum() == 16
        assert not same[:, 4].any()


@pytest.mark.parametrize("outer", ["collect", "replace"])
@pytest.mark.parametrize("site", ["x1.pre", "x1.mid", "x1.post", "a1", "m1"])
def test_reading_sees_the_replacement_whichever_is_outside(outer: str, site: str) -> None:
    model = build("llama")
    first, *_ = read(model, site)
    collect = collect_activations(model, site)
    replace = replace_activations(model, {site: lambda h: h + 1})
    if outer == "collect":
        with collect as captured, replace:
            model(TOKENS)
    else:
        with replace, collect as captured:
            model(TOKENS)
    assert torch.equal(captured[site], first + 1)


def test_nested_replacements_of_attention_and_mid_and_the_same_site_twice() -> None:
    model = build("gemma2")
    one, zero = (lambda h: torch.ones_like(h)), (lambda h: torch.zeros_like(h))
    for outside, inside in [({"x1.mid": one}, {"a1": zero}), ({"a1": zero}, {"x1.mid": one})]:
        with replace_activations(model, outside), replace_activations(model, inside):
            assert torch.equal(read(model, "x1.mid")[0], torch.ones(2, 9, 32))
    for site in ("x1.mid", "x1.post"):  # the inner one goes first
        with replace_activations(model, {site: lambda h: 2 * h}), replace_activations(model, {site: one}):
            assert torch.equal(read(model, site)[0], torch.full((2, 9, 32), 2.0))


def test_captured_tensors_survive_later_replacements() -> None:
    model = build("gpt2")
    names = list_sites(model)
    clean = read(model, *names)
    with replace_activations(model, {"x2.pre": lambda h: h.zero_()}):
        captured = read(model, *names)
    before = names.index("blocks.2.hook_resid_pre")
    assert all(map(torch.equal, captured[:before], clean[:before]))


@pytest.mark.parametrize("family", ["gpt2", "neox_sequential", "bert"])  # RMSNorms compute in fp32
@pytest.mark.parametrize("site", ["x1.pre", "x1.mid", "x1.post"])
def test_gradients_flow_through_a_replacement(family: str, site: str) -> None:
    model = build(family)

    def loss(shift: Tensor) -> Tensor:
        with replace_activations(model, {site: lambda h: h * 2 + shift * h**2}):
            return output(model).logsumexp(-1).sum()

    model.double()
    try:
        assert torch.autograd.gradcheck(loss, torch.zeros(32, requires_grad=True).double(), fast_mode=True)
    finally:
        model.float()


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(autocast: bool) -> None:
    model = build("llama") if autocast else AutoModelForCausalLM.from_config(build("llama").config).bfloat16()
    with (
        torch.inference_mode(),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        replace_activations(model, {"x1.mid": lambda h: h.float() * 2, "x2.pre": lambda h: h.double() + 1}),
        collect_activations(model, ["x1.mid", "x2.pre", "x2.post"]) as captured,
    ):
        model(TOKENS)
    assert autocast or {t.dtype for t in captured.values()} == {torch.bfloat16}


def test_keyword_only_calls_tuples_and_model_outputs() -> None:
    class Inner(nn.Module):
        def forward(self, *, hidden_states: Tensor) -> tuple[None, Tensor, str]:
            return None, hidden_states + 1, "rest"

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: Tensor) -> dict[str, object]:
            nothing, y, rest = self.inner(hidden_states=x)
            assert (nothing, rest) == (None, "rest")
            y *= 10  # a model that writes in place to what was captured
            return {"state": y}

    model, x = Outer(), torch.zeros(1, 2, 3)
    with (
        replace_activations(model, {"inner": lambda h: h + 1}),
        collect_activations(model, "inner", stop_after_last=False) as captured,
    ):
        assert torch.equal(model(x)["state"], x + 20)
    assert torch.equal(captured["inner"], x + 2)
    llama = build("llama")  # `model` returns a ModelOutput; its calls into self_attn are keyword-only
    with replace_activations(llama, {"model": torch.zeros_like, "model.layers.1.self_attn": lambda h: h}):
        assert not output(llama).any()


def test_a_stopped_pass_frees_its_tensors_without_the_garbage_collector() -> None:
    model = build("gpt2")
    alive: list[weakref.ref[Tensor]] = []
    handle = model.transformer.h[0].register_forward_hook(
        lambda m, a, out: alive.append(weakref.ref(tensor(out)))
    )
    gc.collect()
    gc.disable()
    try:
        with collect_activations(model, "x1.mid"):
            model(TOKENS)
        assert alive[0]() is None
    finally:
        gc.enable()
        handle.remove()


def test_errors_name_cause_and_remedy() -> None:
    model = build("gpt2")
    with (
        pytest.raises(InputError, match=r"reached x1\.mid.*call the model once"),
        collect_activations(model, "x1.mid"),
    ):
        pass
    with (
        pytest.raises(InputError, match=r"reached x2\.mid before another.*in one collect_activations"),
        collect_activations(model, "x0.mid"),
        collect_activations(model, ["x0.pre", "x2.mid"]),
    ):
        model(TOKENS)
    with (
        pytest.raises(InputError, match=r"no site 'x9\.mid'"),
        replace_activations(model, {"x9.mid": torch.relu}),
    ):
        pass
    same = {"x1.post": torch.relu, "transformer.h.1": torch.relu}
    with pytest.raises(InputError, match="are the same site"), replace_activations(model, same):
        pass
    for bad, got in [(lambda h: h[:1], r"returned \(1, 9, 32\)"), (lambda h: None, "returned NoneType")]:
        with pytest.raises(InputError, match=got), replace_activations(model, {"x1.pre": bad}):
            model(TOKENS)


def test_train_mode_and_gradients_are_left_alone() -> None:
    model = build("gpt2")
    model.train()
    try:
        with torch.enable_grad(), replace_activations(model, {"x0.post": lambda h: h}):
            with collect_activations(model, "x1.mid") as captured:
                model(TOKENS)
            assert model.training
            assert torch.is_grad_enabled()
    finally:
        model.eval()
    assert not captured["x1.mid"].requires_grad
