"""Models whose weights are quantized: read where that can be, else one line that names what is missing."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ndm_fast.activations.models import load_model
from ndm_fast.errors import InputError

BLOCK = 16
"""Rows and columns that share a scale."""


@pytest.fixture(scope="module")
def plain(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with its head; GPT-2's products are of a class of its own, which few ways quantize."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("plain")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def quantized(plain: Path, folder: Path, settings: dict[str, object], restored: bool = False) -> Path:
    """The model with 8-bit floats for the weights of its blocks; ``restored``: with what these stand for."""
    folder.mkdir()
    for path in plain.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = {}
    for name, weight in load_file(plain / "model.safetensors").items():
        weights[name] = weight
        if name.endswith("proj.weight"):
            blocks = weight.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
            scale = blocks.abs().amax((1, 3)) / 448  # the largest of these floats
            small = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
            if restored:
                weights[name] = (small.float() * scale[:, None, :, None]).reshape(weight.shape)
            else:
                weights[name], weights[f"{name}_scale_inv"] = small.reshape(weight.shape), scale
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {} if restored else {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="needs accelerate")
@pytest.mark.parametrize("head", [False, True])
def test_eight_bit_floats_are_read(plain, tmp_path, head):
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    found, _ = load_model(str(quantized(plain, tmp_path / "small", settings)), head=head)
    expected, _ = load_model(str(quantized(plain, tmp_path / "restored", settings, True)), head=head)
    assert type(found) is type(expected)
    tokens = torch.arange(24).view(2, 12)
    assert torch.allclose(found(tokens)[0], expected(tokens)[0], rtol=0.02, atol=0.02)
    weights = dict(expected.named_parameters())
    for name, weight in found.named_parameters():
        assert torch.allclose(weight, weights[name], rtol=2**-8, atol=0), name


def torchao_settings():
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def bitsandbytes_settings():
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True)


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("settings", [torchao_settings, bitsandbytes_settings])
def test_eight_bit_numbers_are_read_where_their_package_is(plain, tmp_path, settings, head):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pytest.importorskip(settings.__name__.removesuffix("_settings"))
    small = AutoModelForCausalLM.from_pretrained(plain, quantization_config=settings())
    small.save_pretrained(tmp_path / "small")
    AutoTokenizer.from_pretrained(plain).save_pretrained(tmp_path / "small")
    found, _ = load_model(str(tmp_path / "small"), head=head)
    expected, _ = load_model(str(plain), head=head)
    assert type(found) is type(expected)
    tokens = torch.arange(24).view(2, 12)
    exact = expected(tokens)[0]
    assert torch.dist(found(tokens)[0], exact) < 0.05 * exact.norm()


PACKAGES = {
    "aqlm": "aqlm",
    "auto-round": "auto_round",
    "awq": "gptqmodel",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed_tensors",
    "gptq": "optimum",
    "hqq": "hqq",
    "quanto": "optimum",
    "torchao": "torchao",
    "vptq": "vptq",
}
"""Way of quantizing -> the module that reads it."""

SETTINGS = {
    "auto-round": {"bits": 4, "group_size": 32},
    "awq": {"bits": 4, "group_size": 32},
    "bitsandbytes": {"load_in_8bit": True},
    "gptq": {"bits": 4},
    "torchao": {"quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_version": 1, "_data": {}}}},
}


@pytest.mark.parametrize("method", PACKAGES)
def test_the_missing_package_is_named(plain, tmp_path, method):
    if importlib.util.find_spec(PACKAGES[method]) is not None:
        pytest.skip(f"{PACKAGES[method]} is installed")
    folder = quantized(plain, tmp_path / "model", {"quant_method": method, **SETTINGS.get(method, {})})
    with pytest.raises(InputError) as raised:
        load_model(str(folder))
    said = str(raised.value)
    assert said.endswith("install the package that it names")
    assert PACKAGES[method].replace("_", "-") in said.lower().replace("_", "-")
    assert "network" not in said


def test_a_way_that_nobody_knows_is_refused(plain, tmp_path):
    """transformers would warn, and take packed numbers for weights."""
    folder = quantized(plain, tmp_path / "model", {"quant_method": "own"})
    with pytest.raises(
        InputError, match="quantized by 'own', which the installed transformers does not read"
    ):
        load_model(str(folder))
    folder = quantized(plain, tmp_path / "none", {"bits": 4})
    with pytest.raises(InputError, match="no `quant_method`"):
        load_model(str(folder))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_missing_is_no_matter_of_the_network(plain, tmp_path):
    folder = quantized(plain, tmp_path / "model", {"quant_method": "spqr"})
    with pytest.raises(InputError, match=r"GPU is required.*quantized by spqr: take a device"):
        load_model(str(folder))
