"""The live page: a small web server around an ``Explorer``."""

from __future__ import annotations

import ipaddress
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from ndm_fast.errors import InputError
from ndm_fast.report.connections import THRESHOLD, is_measured, picture_of
from ndm_fast.report.explorer import Explorer
from ndm_fast.report.index.tokens import shown
from ndm_fast.report.site import templates
from ndm_fast.version import __version__

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1", "[::1]")


_WAITING = 8
"""Requests that may wait while one is answered; more are turned away."""


_CONNECTIONS = 64


_REQUEST_BYTES = 1 << 17
"""Longest request line with its headers: a text at its limit, percent-encoded."""


_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'unsafe-inline'; img-src data:; "
        "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def serve(path: Path, *, host: str, port: int, allow_remote: bool, rows: int, device: str = "cpu") -> None:
    """Serve the explorer of a run until it is interrupted.

    Args:
        host: address to listen on; one that other machines can reach only with ``allow_remote``.
        port: 0 takes a free one.

    Raises:
        InputError: the web library is missing, the address is refused or taken, or the run is not whole.
    """
    listening = _listen(host, port, allow_remote)
    with listening:
        try:
            from ndm_fast.report.web_server import make_server
        except ImportError:
            raise InputError(
                "exploring needs starlette and uvicorn: pip install 'ndm-fast[explore]'"
            ) from None
        hosts = ["*"] if allow_remote else [*LOCAL_HOSTS, host]
        app = application(Explorer(path, rows=rows, device=device), hosts)
        address = f"[{host}]" if ":" in host else host
        server = make_server(
            app,
            f"explore: http://{address}:{listening.getsockname()[1]}/  (Ctrl-C ends it)",
            server_header=False,
            limit_concurrency=_CONNECTIONS,
            h11_max_incomplete_event_size=_REQUEST_BYTES,
            timeout_keep_alive=10,
            timeout_graceful_shutdown=3,
        )
        with suppress(KeyboardInterrupt):
            server.run(sockets=[listening])


def application(explorer: Explorer, hosts: Sequence[str] = LOCAL_HOSTS) -> Starlette:
    """The web application: the pages, their scripts, ``api/about``, ``api/random`` and ``api/query``; with
    ``connections``, ``connections.js`` and ``api/connections`` where the explorer has any.

    Args:
        hosts: names that requests may have for this machine. A page elsewhere can give its own name our
            address, but not change the name that its requests carry.
    """
    import anyio
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import HTMLResponse, JSONResponse, Response
    from starlette.routing import Route

    one_at_a_time = anyio.Semaphore(1)
    page, script = _page(explorer.connections is not None), _source("explorer.js")

    async def answer(work: Callable[[], dict[str, Any]]) -> Response:
        if one_at_a_time.statistics().tasks_waiting >= _WAITING:
            return JSONResponse({"error": "too many requests at once: try again in a moment"}, 503, _HEADERS)
        async with one_at_a_time:
            try:
                return JSONResponse(shown(await run_in_threadpool(work)), headers=_HEADERS)
            except InputError as error:
                return JSONResponse({"error": shown(str(error))}, 400, _HEADERS)
            except Exception as error:  # the page must say something, the terminal has the rest
                print(f"explore: {type(error).__name__}: {error}", file=sys.stderr)
                return JSONResponse(
                    {"error": "this failed; the terminal of the server says why"}, 500, _HEADERS
                )

    async def home(request: Request) -> Response:
        return HTMLResponse(page, headers=_HEADERS)

    async def code(request: Request) -> Response:
        return Response(script, media_type="text/javascript", headers=_HEADERS)

    async def about(request: Request) -> Response:
        return await answer(explorer.about)

    async def random(request: Request) -> Response:
        return await answer(lambda: {"row": explorer.random(request.query_params.get("site", ""))})

    async def query(request: Request) -> Response:
        return await answer(lambda: explorer.query(request.query_params))

    routes = [
        Route("/", home),
        Route("/explorer.js", code),
        Route("/api/about", about),
        Route("/api/random", random),
        Route("/api/query", query),
    ]
    if explorer.connections is not None:
        routes += _connection_routes(explorer.connections)
    trusted = Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    return Starlette(routes=routes, middleware=[trusted])


def _listen(host: str, port: int, allow_remote: bool) -> socket.socket:
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        raise InputError(f"--host {host!r} is no address: give one such as 127.0.0.1") from None
    if not address.is_loopback and not allow_remote:
        raise InputError(
            f"--host {host} can be reached from other machines, and the page has no password: pass "
            "--allow-remote if you want that, or leave --host away"
        )
    if not 0 <= port <= 65535:
        raise InputError(f"--port {port} is no port: give 1 to 65535, or 0 for a free one")
    listening = socket.socket(socket.AF_INET6 if address.version == 6 else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((str(address), port))
    except OSError as error:
        listening.close()
        raise InputError(
            f"cannot listen on {host}:{port} ({error.strerror}): choose another --port"
        ) from None
    return listening


def _page(connected: bool) -> str:
    return (
        templates()
        .get_template("explorer.html")
        .render(style=Markup(_source("style.css")), version=__version__, connected=connected)
    )


def _connection_routes(found: dict[str, Any]) -> list[Any]:
    """The page of connections, its script and its numbers."""
    from starlette.responses import HTMLResponse, JSONResponse, Response
    from starlette.routing import Route

    page, script = connections_page(found), _source("connections.js")

    async def home(request: Request) -> Response:
        return HTMLResponse(page, headers=_HEADERS)

    async def code(request: Request) -> Response:
        return Response(script, media_type="text/javascript", headers=_HEADERS)

    async def edges(request: Request) -> Response:
        return JSONResponse(shown(found), headers=_HEADERS)

    return [
        Route("/connections", home),
        Route("/connections.js", code),
        Route("/api/connections", edges),
    ]


def connections_page(found: dict[str, Any]) -> str:
    """The page with the picture of a ``connections.json``, for the script to work on."""
    return (
        templates()
        .get_template("connections.html")
        .render(
            style=Markup(_source("style.css")),
            picture=Markup(picture_of(found, live=True)),
            found=found,
            measured=is_measured(found),
            threshold=round(100 * THRESHOLD),
            version=__version__,
        )
    )


def _source(name: str) -> str:
    environment = templates()
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]
