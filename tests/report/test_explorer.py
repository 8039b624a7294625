"""The live page's answers over HTTP, its limits, and what it refuses; in a browser: test_browser.py."""

from __future__ import annotations

import io
import json
import socket
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from processes import wait_for

from ndm_fast.report.explorer import Explorer

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")
pytestmark = pytest.mark.usefixtures("one_thread")

SITES = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]


@pytest.fixture(scope="module")
def run(train_flags: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished runs of two sites, in one folder."""
    from ndm_fast.cli.main import main

    folder = tmp_path_factory.mktemp("explorer") / "runs"
    assert main(train_flags(folder, site=["x0.post", "x1.post"], max_steps=8)) == 0
    return folder


@pytest.fixture(scope="module")
def explorer(run: Path) -> Explorer:
    return Explorer(run, rows=800)


@pytest.fixture(scope="module")
def site(explorer: Explorer) -> Iterator[str]:
    import uvicorn

    from ndm_fast.report.server import application

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(
            uvicorn.Config(application(explorer), log_level="warning", timeout_graceful_shutdown=1)
        )
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        wait_for(lambda: server.started or not thread.is_alive())
        assert thread.is_alive()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join(10)


def get(url: str, headers: dict[str, str] | None = None) -> tuple[int, str, Any]:
    request = urllib.request.Request(url, headers=headers or {})
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.read().decode(), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(), error.headers


def test_sites_and_their_subspaces(site: str) -> None:
    about = json.loads(get(f"{site}/api/about")[1])
    assert [one["name"] for one in about["sites"]] == SITES
    assert all(one["rows"] == 800 and sum(one["widths"]) == 32 for one in about["sites"])
    row = json.loads(get(f"{site}/api/random?site={SITES[1]}")[1])["row"]
    assert 0 <= row < 800


@pytest.mark.parametrize("name", SITES)
def test_row_and_its_text_are_the_same_query(explorer: Explorer, name: str) -> None:
    # Row 100 by its number leaves itself out; by its text it finds itself first.
    by_row = explorer.query({"site": name, "row": "100", "k": "3"})
    places = [token["place"] for token in by_row["tokens"]]
    text = "".join(token["text"] for token in by_row["tokens"])
    by_text = explorer.query({"site": name, "text": text, "token": str(places.index(100)), "k": "4"})
    assert [token["text"] for token in by_text["tokens"]] == [token["text"] for token in by_row["tokens"]]
    for one, other in zip(by_row["subspaces"], by_text["subspaces"], strict=True):
        near, *rest = other["neighbors"]
        assert near["row"] == 100
        assert near["relative"] < 0.02  # stored in half precision
        assert {n["row"] for n in rest} & {n["row"] for n in one["neighbors"]}


def test_distance_window_and_choice_of_subspaces(explorer: Explorer) -> None:
    asked = {"row": "5", "k": "100", "within": "0.7", "window": "2", "subspaces": "3,1"}
    parts = explorer.query(asked)["subspaces"]
    assert [part["subspace"] for part in parts] == [1, 3]
    for part in parts:
        assert len(part["neighbors"]) == min(100, part["within"])
        assert all(n["relative"] <= 0.7 for n in part["neighbors"])
    everything = explorer.query({**asked, "within": ""})["subspaces"][0]
    assert everything["within"] is None
    assert len(everything["neighbors"]) == 100


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "nothing asked"),
        ({"text": " \n"}, "text is empty"),
        ({"text": "a" * 4001}, "4001 characters, at most 4000"),
        ({"text": "a <|endoftext|>", "token": "9"}, "token 9"),
        ({"text": "é" * 40}, "80 tokens, at most 64"),
        ({"text": "<|endoftext|>"}, "no tokens of its own"),
        ({"row": "800"}, "from 0 to 799"),
        ({"row": "-1"}, "whole number"),
        ({"row": "1", "k": "101"}, "from 1 to 100"),
        ({"row": "1", "window": "²"}, "window"),
        ({"row": "1", "within": "nan"}, "above 0"),
        ({"row": "1", "subspaces": "1,9"}, "from 0 to 3"),
        ({"row": "1", "metric": "l1"}, "euclidean, cosine"),
        ({"row": "1", "site": "x9.post"}, "no site"),
    ],
)
def test_bad_questions_are_answered_with_a_line(site: str, asked: dict[str, str], message: str) -> None:
    code, content, _ = get(f"{site}/api/query?{urlencode(asked)}")
    assert code == 400
    assert message in json.loads(content)["error"]


def test_answers_carry_a_policy_and_other_hosts_are_refused(site: str) -> None:
    code, page, headers = get(f"{site}/")
    assert code == 200
    assert "script-src 'self'" in headers["Content-Security-Policy"]
    assert "<script src=" in page
    assert get(f"{site}/explorer.js")[0] == 200
    assert get(f"{site}/../pyproject.toml")[0] == 404
    assert get(f"{site}/", {"Host": "evil.example"})[0] == 400


def test_text_at_its_limit_passes_in_any_script(site: str) -> None:
    code, content, _ = get(f"{site}/api/query?{urlencode({'text': '日' * 4000})}")
    assert code == 400
    assert "12000 tokens" in json.loads(content)["error"]


def test_more_requests_than_may_wait_are_turned_away(
    site: str, explorer: Explorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    monkeypatch.setattr(explorer, "about", lambda: {"free": release.wait(20)})
    with ThreadPoolExecutor(20) as pool:
        answers = [pool.submit(get, f"{site}/api/about") for _ in range(20)]
        wait_for(lambda: sum(answer.done() for answer in answers) >= 11)
        release.set()
        codes = [answer.result()[0] for answer in answers]
    assert codes.count(503) == 11  # one is answered, eight wait
    assert codes.count(200) == 9


def test_failure_inside_is_told_without_its_insides(
    site: str, explorer: Explorer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(site: str) -> int:
        raise RuntimeError("secret")

    monkeypatch.setattr(explorer, "random", fail)
    code, content, _ = get(f"{site}/api/random?site={SITES[0]}")
    assert code == 500
    assert "secret" not in content
    assert "secret" in capfd.readouterr().err


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "192.0.2.1"])
def test_addresses_that_others_reach_need_a_word(run: Path, ndm: Callable[..., Any], address: str) -> None:
    assert "--allow-remote" in ndm("explore", run, "--host", address).refusal()


def test_command_line_refusals(run: Path, tmp_path: Path, ndm: Callable[..., Any]) -> None:
    assert "no run of ndm-fast" in ndm("explore", tmp_path, "--port", "0").refusal()
    assert "is no address" in ndm("explore", run, "--host", "example.org").refusal()
    assert "is no port" in ndm("explore", run, "--port", "70000").refusal()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "cannot listen" in ndm("explore", run, "--port", taken.getsockname()[1]).refusal()


class Insides:
    """Stands for an explorer."""

    connections = None

    def about(self) -> dict[str, Any]:
        return {"names": ["a\u202eb\x00", "\u2028\n"], "sites": {"one": ("\u2066",)}}

    def random(self, site: str) -> int:
        return 1

    def query(self, asked: Any) -> dict[str, Any]:
        return {"text": asked.get("text")}


class Printed(io.StringIO):
    """Stands for stdout; capsys may lose what another thread prints while it is read."""

    def __init__(self) -> None:
        super().__init__()
        self.greeting = threading.Event()

    def write(self, text: str) -> int:
        if "here it is" in text:
            self.greeting.set()
        return super().write(text)


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, int]]:
    """Address of a server as ``explore`` starts it, around no run; it waits half a second for a request."""
    from ndm_fast.report import web_server
    from ndm_fast.report.server import application

    printed = Printed()
    monkeypatch.setattr(sys, "stdout", printed)
    monkeypatch.setattr(web_server, "REQUEST_SECONDS", 0.5)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        address = listening.getsockname()
        server = web_server.make_server(
            application(Insides()),
            "here it is",
            limit_concurrency=8,
            timeout_graceful_shutdown=1,
            log_config=None,
        )
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)
        assert not printed.greeting.is_set()
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        assert printed.greeting.wait(30)
        yield address
        server.should_exit = True
        thread.join(10)


def ask(address: tuple[str, int], request: bytes) -> bytes:
    with socket.create_connection(address, timeout=5) as connection:
        connection.sendall(request)
        return connection.recv(100)


def test_connections_are_accepted_when_the_address_is_said(bare: tuple[str, int]) -> None:
    assert ask(bare, b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n").startswith(b"HTTP/1.1 200")


HOST = b"\r\nHost: 127.0.0.1\r\n"
MALFORMED = [
    b"\xff\xfe\r\n\r\n",
    b"GET /\xff HTTP/1.1" + HOST + b"\r\n",
    b"GET / HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: [::1\r\n\r\n",
    b"POST /api/about HTTP/1.1" + HOST + b"Content-Length: -3\r\n\r\n",
    b"POST /api/about HTTP/1.1" + HOST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"GET / HTTP/1.1" + HOST + b"A: " + b"a" * 200_000 + b"\r\n\r\n",
]


def test_malformed_requests_print_no_traceback(
    bare: tuple[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    for request in MALFORMED:
        assert ask(bare, request).startswith(b"HTTP/1.1 4"), request
    assert ask(bare, b"GET /api/query?text=%ff%00 HTTP/1.1" + HOST + b"\r\n").startswith(b"HTTP/1.1 200")
    wait_for(lambda: "LocalProtocolError" in caplog.text)  # of an answer to a request that broke off
    assert "Traceback" not in caplog.text
    assert all("\n" not in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"GET / HTTP/1.1" + HOST])
def test_half_open_requests_do_not_keep_others_out(bare: tuple[str, int], sent: bytes) -> None:
    held = [socket.create_connection(bare, timeout=5) for _ in range(8)]
    for connection in held:
        connection.sendall(sent)
    wait_for(lambda: ask(bare, b"GET / HTTP/1.1" + HOST + b"\r\n").startswith(b"HTTP/1.1 200"))
    for connection in held:
        connection.close()


def test_a_second_request_may_be_half_open_no_longer_than_the_first(bare: tuple[str, int]) -> None:
    with socket.create_connection(bare, timeout=5) as connection:
        connection.sendall(b"GET /api/about HTTP/1.1" + HOST + b"\r\n")
        assert connection.recv(10_000).startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET / HT")
        with suppress(ConnectionResetError):
            while connection.recv(10_000):  # the rest of the answer, then the end
                pass


def test_what_would_not_be_seen_is_written_out(bare: tuple[str, int]) -> None:
    about = json.loads(get(f"http://{bare[0]}:{bare[1]}/api/about")[1])
    assert about["names"] == ["a⟨U+202E⟩b⟨U+0000⟩", "⟨U+2028⟩\n"]
    assert about["sites"] == {"one": ["⟨U+2066⟩"]}
