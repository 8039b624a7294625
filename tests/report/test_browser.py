"""The report and the live page in a real headless Chromium; skipped where none is installed."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import torch
from processes import wait_for

from ndm_fast.files import write_json
from ndm_fast.report.index.format import PreimageIndex

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver (Debian packages)"),
    pytest.mark.usefixtures("one_thread"),
]

HOSTILE = [
    "<script>window.ran=1</script>",
    "<img src=x onerror=window.ran=1>",
    '"><svg onload=window.ran=1>',
    "{{ 7*7 }}</style></title>",
    "\u202egnp.exe",
]
_FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
_SECONDS = 10.0


class Browser:
    """The few commands of the WebDriver protocol that the tests need."""

    def __init__(self, port: int, profile: Path) -> None:
        self._base = f"http://127.0.0.1:{port}/session"
        options = {"binary": CHROMIUM, "args": [*_FLAGS, f"--user-data-dir={profile}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        answer = self._send("POST", "", {"capabilities": {"alwaysMatch": wanted}})
        self._base += f"/{answer['sessionId']}"

    def _send(self, method: str, path: str, content: Any = None) -> Any:
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(self._base + path, data, method=method)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)["value"]

    def open(self, url: str) -> None:
        self._send("POST", "/url", {"url": url})

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        return self._send("POST", "/execute/sync", {"script": f"return {script}", "args": []})

    def until(self, expression: str) -> Any:
        """The value of an expression, as soon as it is true."""
        end = time.monotonic() + _SECONDS
        while not (value := self.run(expression)):
            assert time.monotonic() < end, f"{expression} did not become true; {self.complaints()}"
            time.sleep(0.02)
        return value

    def keys(self, *keys: str) -> None:
        """Press keys one after the other, as a person would."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._send("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def emulate(self, scheme: str, width: int) -> None:
        for command, parameters in (
            ("setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}),
            (
                "setDeviceMetricsOverride",
                {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600},
            ),
        ):
            self._send("POST", "/goog/cdp/execute", {"cmd": f"Emulation.{command}", "params": parameters})

    def complaints(self) -> list[str]:
        """What the console said since the last call."""
        return [entry["message"] for entry in self._send("POST", "/se/log", {"type": "browser"})]

    def close(self) -> None:
        self._send("DELETE", "")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    port = free_port()
    assert DRIVER is not None
    said = tmp_path_factory.mktemp("chromedriver") / "said"  # no pipe of pytest's, should it outlive that
    with (
        said.open("w") as out,
        subprocess.Popen([DRIVER, f"--port={port}"], stdout=out, stderr=out) as driver,
    ):
        try:
            wait_for(lambda: listens(port) or driver.poll() is not None)
            assert driver.poll() is None, said.read_text()
            opened = Browser(port, tmp_path_factory.mktemp("profile"))
            yield opened
            opened.close()
        finally:
            driver.terminate()


@pytest.fixture(scope="module")
def hostile_run(
    tiny_model: Path, corpus: Path, train_flags: Callable[..., list[str]], tmp_path_factory: Any
) -> Path:
    """A finished run on a text full of markup, each piece of it a single token, and its report."""
    from transformers import AutoModel, AutoTokenizer

    from ndm_fast.cli.main import main

    folder = tmp_path_factory.mktemp("hostile")
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_model), AutoModel.from_pretrained(tiny_model)
    tokenizer.add_tokens(HOSTILE)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for part in (tokenizer, model):
        part.save_pretrained(folder / "model")
    (folder / "text").mkdir()
    for number, path in enumerate(sorted(corpus.iterdir())):
        words = path.read_text().split()
        for place, token in enumerate(HOSTILE * 3):
            words.insert((7 * place + number) % len(words), token)
        (folder / "text" / path.name).write_text(" ".join(words) + " naïve 日本\t</body>\n")
    run = folder / "run"
    flags = train_flags(run, merging=True, model=folder / "model", data=folder / "text")
    assert main(flags) == 0
    write_json(run / "connections.json", connections(), seal=True)
    assert main(["report", str(run), "--rows", "1500"]) == 0
    return run


def connections() -> dict[str, Any]:
    """Two sites of two subspaces, a block of one head and an MLP between them, and prompts full of markup."""
    weak = {"share": 0.1, "times": 0.2, "effect": 0.05, "by_prompt": None}
    hot = {"share": 0.9, "times": 1.8, "effect": 1.0, "by_prompt": [0.1, 2.5, -1.0]}
    same = {"block": 1, "head": 0, "deviations": 3.0, "error": 0.1, "attributed": 0.7, "arriving": [0.5, 0.1]}
    edges = [
        {"subspace": s, "side": side, **same, **one} for s, one in enumerate((hot, weak)) for side in "QKV"
    ]
    tested = {"test": "1", "what": HOSTILE[0], "texts": HOSTILE[:3], "clean": 3.0, "whole": 2.0}
    tested["subspaces"] = [1.5, 0.1]
    head = {"block": 1, "head": 0, "writes": [1.5, 0.5], "effects": [1.0, 1.0, 1.0]}
    mlp = {"block": 1, "read": [0.6, 0.4], "write": [0.5, 0.5], "times": [1, 1], "deviations": [0, 0]}
    mlp |= {
        "effects": [0.0, 0.06],
        "errors": [0, 0.01],
        "attributed": [0, 0.05],
        "by_prompt": [[0, 0, 0], [0.01, 0.02, 0.15]],
        "arriving": [[0, 0], [0.01, 0]],
    }
    pair = {"below": 0, "above": 1, "heads": [head], "edges": edges, "mlps": [mlp], "tested": tested}
    return {
        "model": HOSTILE[2],
        "sites": [{"site": f"blocks.{n}.hook_resid_post", "widths": [20, 12]} for n in (0, 1)],
        "pairs": [pair],
        "left_out": [HOSTILE[1]],
    }


@pytest.fixture(scope="module")
def pages(hostile_run: Path) -> list[Path]:
    return sorted((hostile_run / "report").glob("*.html"))


@pytest.fixture(scope="module")
def index(hostile_run: Path) -> PreimageIndex:
    return PreimageIndex(hostile_run / "preimages")


def nearest_by_hand(index: PreimageIndex, query: torch.Tensor, subspace: int, k: int, skip: int) -> list[int]:
    """Numbers of the k nearest rows to a stored query, by an fp64 pass over all rows."""
    rows = index.stored(torch.arange(len(index))).double()
    columns = index.rows.columns[subspace]
    distances = (rows[:, columns] - query[columns].double()).norm(dim=1)
    if skip >= 0:
        distances[skip] = torch.inf
    return distances.sort(stable=True).indices[:k].tolist()


def test_every_page_opens_without_complaint_and_runs_nothing(browser: Browser, pages: list[Path]) -> None:
    assert pages[0].name == "index.html"
    for path in pages:
        browser.open(path.as_uri())
        assert browser.run("typeof window.ran") == "undefined"
        assert (
            browser.run("document.querySelectorAll('script, iframe, object, [onload], [onerror]').length")
            == 0
        )
        broken = "[...document.images].filter((i) => !i.naturalWidth).length"
        assert browser.run(broken) == 0
        assert browser.complaints() == []


def test_hostile_and_odd_tokens_are_shown_as_they_are(browser: Browser, pages: list[Path]) -> None:
    shown = ""
    for path in pages[1:]:
        browser.open(path.as_uri())
        shown += browser.run("document.querySelector('main').textContent")
    for token in (*HOSTILE[:4], "⟨U+202E⟩gnp.exe"):
        assert token in shown
    assert "\u202e" not in shown
    assert "49" not in [word for word in shown.split() if word == "49"]


def test_galleries_hold_the_nearest_rows(browser: Browser, pages: list[Path], index: PreimageIndex) -> None:
    texts = index.token_rows(torch.arange(len(index))).token.tolist()
    for subspace, path in enumerate(pages[1:]):
        browser.open(path.as_uri())
        galleries = browser.run(
            "[...document.querySelectorAll('details')].map((d) => [+d.dataset.row,"
            " [...d.querySelectorAll('li.line')].map((l) => [+l.dataset.row,"
            " l.querySelector('mark').textContent])])"
        )
        assert len(galleries) >= 4
        for query, lines in galleries:
            stored = index.stored(torch.tensor([query]))[0]
            expected = nearest_by_hand(index, stored, subspace, len(lines), skip=query)
            assert [row for row, _ in lines] == expected
            assert [text for _, text in lines] == [index.pieces[texts[row]].text for row in expected]


def test_links_lead_where_they_say(browser: Browser, pages: list[Path]) -> None:
    for path in pages:
        browser.open(path.as_uri())
        targets = browser.run("[...document.querySelectorAll('a')].map((a) => a.getAttribute('href'))")
        names = {found.name for found in pages}
        for target in targets:
            inside = target.startswith("#") and browser.run(f"!!document.querySelector('{target}')")
            assert inside or target in names
    browser.open(pages[0].as_uri())
    browser.run("document.querySelector('.bar a:nth-child(2)').click()")
    browser.until("document.title.startsWith('Subspace 1 of')")
    browser.run("document.querySelector('a[rel=prev]').click()")
    browser.until("document.title.startsWith('Subspace 0 of')")


@pytest.mark.parametrize("width", [360, 1200])
def test_pages_fit_the_screen_in_light_and_dark(browser: Browser, pages: list[Path], width: int) -> None:
    colours = set()
    for scheme in ("light", "dark"):
        browser.emulate(scheme, width)
        for path in pages[:2]:
            browser.open(path.as_uri())
            assert browser.run("document.documentElement.scrollWidth") <= width
        colours.add(browser.run("getComputedStyle(document.body).backgroundColor"))
    assert len(colours) == 2
    browser.emulate("light", 1200)


def test_report_can_be_used_with_the_keyboard(browser: Browser, pages: list[Path]) -> None:
    browser.open(pages[1].as_uri())
    browser.keys("\ue004")
    assert browser.run("document.activeElement.className") == "skip"
    browser.run("document.querySelector('details summary').focus()")
    was_open = browser.run("document.querySelector('details').open")
    browser.keys("\ue007")
    assert browser.run("document.querySelector('details').open") != was_open


@pytest.fixture(scope="module")
def site(hostile_run: Path) -> Iterator[str]:
    """Address of the live page of the run."""
    pytest.importorskip("uvicorn")
    import uvicorn

    from ndm_fast.report.explorer import Explorer
    from ndm_fast.report.server import application

    config = uvicorn.Config(
        application(Explorer(hostile_run, rows=1500)), log_level="warning", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        wait_for(lambda: server.started or not thread.is_alive())
        assert thread.is_alive()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        server.should_exit = True
        thread.join(_SECONDS)


CARDS = (
    "[...document.querySelectorAll('.card')].map((c) => [+c.dataset.subspace,"
    " [...c.querySelectorAll('li')].map((l) => +l.dataset.row)])"
)


def test_typed_text_leads_to_neighbors_and_a_deep_link(
    browser: Browser, site: str, index: PreimageIndex, hostile_run: Path
) -> None:
    from ndm_fast import RunFolder, collect_activations, load_model

    text = f"a red cat {HOSTILE[0]} sees {HOSTILE[1]}"
    browser.open(site)
    browser.until("document.querySelectorAll('#site option').length")
    browser.run(f"document.getElementById('text').value = {json.dumps(text)}")
    browser.run("document.querySelector('button.main').click()")
    browser.until("document.querySelectorAll('button.token').length")
    assert browser.run("document.getElementById('tokens').textContent") == text
    browser.run("[...document.querySelectorAll('button.token')].at(-2).click()")
    place = browser.until("Number(new URLSearchParams(location.search).get('token'))")
    browser.until(f"document.querySelectorAll('button.token')[{place}].ariaPressed === 'true'")
    cards = browser.run(CARDS)

    harvest = RunFolder(hostile_run).config().harvest
    model, tokenizer = load_model(harvest.model)
    tokens = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad(), collect_activations(model, harvest.site) as captured:
        model(tokens)
    query = index.rotated(captured[harvest.site[0]][0, place][None])[0]
    assert [subspace for subspace, _ in cards] == list(range(len(index.rows.widths)))
    for subspace, rows in cards:
        assert rows == nearest_by_hand(index, query, subspace, 10, skip=-1)

    browser.open(browser.run("location.href"))
    browser.until("document.querySelectorAll('.card li').length")
    assert browser.run(CARDS) == cards
    assert browser.run("typeof window.ran") == "undefined"
    assert browser.complaints() == []


def test_neighbors_can_be_followed_and_left_again(browser: Browser, site: str, index: PreimageIndex) -> None:
    state = {"row": 40, "k": 4, "subspaces": "1", "window": 2}
    browser.open(f"{site}?{urlencode(state)}")
    browser.until("document.querySelectorAll('.card li').length")
    first = browser.run(CARDS)
    assert first == [[1, nearest_by_hand(index, index.stored(torch.tensor([40]))[0], 1, 4, skip=40)]]
    browser.run("document.querySelector('.card button.target').click()")
    followed = first[0][1][0]
    browser.until(f"new URLSearchParams(location.search).get('row') === '{followed}'")
    browser.until(f"{CARDS}[0][1].join() !== {json.dumps(first[0][1])}.join()")
    assert browser.run("new URLSearchParams(location.search).get('subspaces')") == "1"
    browser.run("history.back()")
    browser.until(f"{CARDS}[0]?.[1].join() === {json.dumps(first[0][1])}.join()")
    browser.run("document.getElementById('random').click()")
    browser.until("!['40', null].includes(new URLSearchParams(location.search).get('row'))")


def test_live_page_says_what_is_wrong(browser: Browser, site: str) -> None:
    browser.open(site)
    browser.until("document.querySelectorAll('#site option').length")
    error = "document.getElementById('error')"
    browser.run("document.querySelector('button.main').click()")
    assert browser.run(f"{error}.textContent") == "the text is empty: type some words"
    browser.run("document.getElementById('text').value = 'a '.repeat(2500)")
    browser.run("document.querySelector('button.main').click()")
    assert re.search("5000 characters.*4000", browser.run(f"{error}.textContent"))
    assert browser.complaints() == []
    browser.open(f"{site}?{urlencode({'row': 10**9})}")
    assert "whole number" in browser.until(f"!{error}.hidden && {error}.textContent")
    browser.open(f"{site}?{urlencode({'row': 3, 'within': 1e-6})}")
    assert "No activation is that near" in browser.until("document.querySelector('.card')?.textContent")
    browser.complaints()


SEEN = "[...document.querySelectorAll('path[data-edge]:not([hidden])')].map((p) => p.dataset.edge)"


def test_an_edge_tells_of_its_prompts(browser: Browser, site: str) -> None:
    browser.open(f"{site}connections")
    assert browser.until("document.querySelector('#shown').value.includes('3 edges')")
    assert browser.run(SEEN) == ["0.1.0.Q", "0.1.0.K", "0.1.0.V"]
    edge = "document.querySelector('path[data-edge=\"0.1.0.K\"]')"
    click = f"{edge}.dispatchEvent(new MouseEvent('click', {{bubbles: true}}))"
    browser.until(f"{click} && document.querySelector('#edge li')")
    prompts = "[...document.querySelectorAll('#edge li')].map((l) => l.textContent)"
    told = browser.run(prompts)
    assert [line[: line.index(".") + 4] for line in told] == ["2.500", "-1.000", "0.100"]
    assert told[0].endswith(HOSTILE[1])
    assert "1.0.0" not in browser.run("document.querySelector('#edge h3').textContent")
    move = (
        "(() => { const s = document.querySelector('#threshold'); s.value = 2;"
        " s.dispatchEvent(new Event('input')); return true; })()"
    )
    assert browser.run(move)
    assert len(browser.run(SEEN)) == 7
    click = click.replace("0.1.0.K", "1.1.mlp.in")
    assert browser.run(f"{click} && document.querySelector('#edge h3').textContent").endswith(
        "MLP of block 1"
    )
    assert "0.060 ± 0.010" in browser.run("document.querySelector('#edge dl').textContent")
    assert browser.run(prompts)[0].startswith("0.150")
    by_weights = (
        "(() => { const s = document.querySelector('#way'); s.value = 'weights';"
        " s.dispatchEvent(new Event('change')); return true; })()"
    )
    assert browser.run(by_weights)
    assert browser.run(SEEN) == ["0.1.0.Q", "0.1.0.K", "0.1.0.V"]  # the others are below chance
    assert browser.run("typeof window.ran") == "undefined"
    assert browser.complaints() == []


@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_of_connections_fits_the_screen(browser: Browser, site: str, width: int, scheme: str) -> None:
    browser.emulate(scheme, width)
    browser.open(f"{site}connections")
    browser.until("document.querySelector('#shown').value")
    assert browser.run("document.documentElement.scrollWidth") <= width
    browser.emulate("light", 1200)


@pytest.mark.parametrize("width", [360, 1200])
def test_live_page_fits_the_screen(browser: Browser, site: str, width: int) -> None:
    browser.emulate("dark", width)
    browser.open(f"{site}?{urlencode({'row': 7, 'window': 60})}")
    browser.until("document.querySelectorAll('.card li').length")
    assert browser.run("document.documentElement.scrollWidth") <= width
    browser.emulate("light", 1200)
