"""``evaluate connections`` from partitions to files and pages, on a random model with GPT-2's words."""

import asyncio
import json
import xml.etree.ElementTree as ElementTree
from types import SimpleNamespace

import pytest
import torch
from tiny import gpt2_like

from ndm_fast.errors import InputError
from ndm_fast.evaluate.connections.connections import run_connections
from ndm_fast.evaluate.connections.measured import ConnectionOptions
from ndm_fast.evaluate.connections.results import connection_rows, read_connections
from ndm_fast.geometry.orthogonal import random_rotation
from ndm_fast.partition import SubspacePartition
from ndm_fast.report.connections import picture_of
from ndm_fast.report.server import connections_page

WIDTH, WIDTHS = 32, [16, 8, 8]
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Tiny tensors."""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    from transformers import GPT2Config, GPT2LMHeadModel

    folder, tokenizer = tmp_path_factory.mktemp("gpt2"), gpt2_like()
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=WIDTH, n_layer=4, n_head=4, initializer_range=0.3,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def partition(site, seed=0):
    rotation = random_rotation(WIDTH, torch.Generator().manual_seed(seed))
    return SubspacePartition(rotation, WIDTHS, {"site": site})


@pytest.fixture(scope="module")
def found(model_folder):
    sites = {"top": partition("x3.post", 2), "bottom": partition("x0.post"), "middle": partition("x1.mid", 1)}
    options = ConnectionOptions(prompts=3)
    return run_connections(sites, str(model_folder), tests=["1", "3"], options=options)


def test_sites_are_ordered_and_every_edge_is_there(found):
    assert [site.partition for site in found.sites] == ["bottom", "middle", "top"]
    assert [sorted({node.block for node in pair.heads}) for pair in found.pairs] == [[1], [2, 3]]
    assert [len(pair.edges) for pair in found.pairs] == [3 * 4 * 3, 3 * 8 * 3]
    for pair, test in zip(found.pairs, ("1", "3"), strict=True):
        assert pair.tested.test == test
        assert all(abs(sum(e.share for e in pair.edges if (e.block, e.head, e.side) == one) - 1) < 1e-4
                   for one in {(e.block, e.head, e.side) for e in pair.edges})  # fmt: skip
        assert {len(e.by_prompt) for e in pair.edges if e.by_prompt} == {3}
        assert [len(node.effects) for node in pair.heads] == [3] * len(pair.heads)
        assert all(len(mlp.read) == len(mlp.write) == len(mlp.effects) == 3 for mlp in pair.mlps)
        assert all(len(mlp.arriving) == len(mlp.arriving[0]) == 3 for mlp in pair.mlps)
        assert all(len(by_prompt) == 3 for mlp in pair.mlps for by_prompt in mlp.by_prompt)
        assert len(pair.tested.skip.effects) == 3
    assert [[mlp.block for mlp in pair.mlps] for pair in found.pairs] == [[], [1, 2, 3]]
    assert (found.pairs[0].tested.mlp_agreement, found.pairs[1].tested.mlp_agreement.edges) == (None, 9)
    assert len(connection_rows(found, 5)) == 10
    assert {row["into"] for row in connection_rows(found, 99)} >= {"MLP 1", "MLP 3", "1.0", "3.3"}
    assert any("biases" in what for what in found.left_out)


def test_what_does_not_fit_is_refused(model_folder):
    def run(*sites, **given):
        parts = {f"p{n}": partition(site) for n, site in enumerate(sites)}
        return run_connections(parts, str(model_folder), **given)

    with pytest.raises(InputError, match="two sites or more"):
        run("x1.post")
    with pytest.raises(InputError, match=r"both of blocks\.1\.hook_resid_post"):
        run("x1.post", "x1.post")
    with pytest.raises(InputError, match="no attention lies between"):
        run("x1.mid", "x1.post")
    with pytest.raises(InputError, match="not in the residual stream"):
        run("x1.post", "m2")
    with pytest.raises(InputError, match="3 tests for 1 pairs"):
        run("x1.post", "x2.post", tests=["1", "2", "3"])
    with pytest.raises(InputError, match="0 prompts are too few"):
        run("x1.post", "x2.post", options=ConnectionOptions(prompts=0))


@pytest.mark.parametrize("tests", [[], ["--tests", "1"]])
def test_command_writes_numbers_and_picture(ndm, model_folder, tmp_path, tests):
    for number, site in enumerate(("x0.post", "x2.post")):
        partition(site, number).save_pretrained(tmp_path / f"p{number}")
    outcome = ndm(
        "evaluate", "connections", tmp_path / "p0", tmp_path / "p1", "--model", model_folder, *tests,
        "--prompts", 2, "--out", tmp_path / "out", "--top", 3,
    )  # fmt: skip
    assert outcome.code == 0
    content = read_connections(tmp_path / "out" / "connections.json")
    assert [site["site"] for site in content["sites"]] == [
        "blocks.0.hook_resid_post",
        "blocks.2.hook_resid_post",
    ]
    assert (content["pairs"][0]["tested"] is not None) == bool(tests)
    drawn = ElementTree.parse(tmp_path / "out" / "connections.svg").getroot()
    edges = [path for path in drawn.iter(f"{SVG}path") if path.get("data-edge")]
    assert edges
    assert {path.get("data-way") for path in edges} == {"data" if tests else "weights"}


def plain(found):
    return json.loads(json.dumps(found.to_json()))


def test_live_picture_has_both_ways_and_hides_the_weak(found):
    drawn = ElementTree.fromstring(picture_of(plain(found), live=True))
    edges = [path for path in drawn.iter(f"{SVG}path") if path.get("data-strength")]
    assert {path.get("data-way") for path in edges} == {"data", "weights"}
    for path in edges:
        shown = path.get("data-way") == "data" and float(path.get("data-strength")) >= 0.1
        assert (path.get("hidden") is None) == shown
    into_mlps = [path for path in edges if (path.get("data-edge") or "").endswith(".mlp.in")]
    assert {path.get("data-pair") for path in into_mlps} == {"1"}
    marks = [mark.get("data-head") for mark in drawn.iter(f"{SVG}g") if mark.get("class") == "cx-head"]
    assert [name for name in marks if name.endswith("mlp")] == ["1.mlp", "2.mlp", "3.mlp"]
    blocks = [rect for rect in drawn.iter(f"{SVG}rect") if rect.get("class") == "cx-block"]
    assert len(blocks) == 9
    assert float(blocks[0].get("width")) == pytest.approx(2 * float(blocks[1].get("width")), rel=1e-3)


def test_names_of_others_are_only_text(found):
    content = plain(found)
    content["model"] = '"><script>window.ran=1</script>'
    content["sites"][0]["site"] = "blocks.0.hook_<img onerror=1>"
    content["left_out"] = ["<b>x</b>"]
    page = connections_page(content)
    assert "<script>window" not in page
    assert "<img" not in page
    assert "<b>" not in page
    ElementTree.fromstring(picture_of(content))


def test_the_server_gives_page_script_and_numbers(found):
    pytest.importorskip("starlette")
    from ndm_fast.report.server import application

    app = application(SimpleNamespace(connections=plain(found), about=dict))

    def get(path):
        sent = []

        async def receive():
            return {"type": "http.request", "body": b""}

        async def send(message):
            sent.append(message)

        scope = {
            "type": "http", "method": "GET", "path": path, "raw_path": path.encode(), "query_string": b"",
            "headers": [(b"host", b"localhost")], "root_path": "", "scheme": "http", "http_version": "1.1",
        }  # fmt: skip
        asyncio.run(app(scope, receive, send))
        return sent[0]["status"], b"".join(m.get("body", b"") for m in sent[1:]).decode()

    assert 'href="connections"' in get("/")[1]
    status, page = get("/connections")
    assert status == 200
    assert 'id="threshold"' in page
    assert get("/connections.js")[0] == 200
    assert json.loads(get("/api/connections")[1])["pairs"][0]["tested"]["test"] == "1"
