"""The web server below the live page: uvicorn, made to wait for nobody and to log one line an error."""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

REQUEST_SECONDS = 10
"""A connection that has not sent a whole request by then is closed."""


class Connection(H11Protocol):
    """A connection that is closed when its request takes too long to come."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._expect()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._answering():
            self._stop_waiting()
        elif self._deadline is None:  # the next request has begun
            self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _answering(self) -> bool:
        """Whether a whole request has come."""
        return self.conn.their_state not in (h11.IDLE, h11.SEND_BODY)

    def _expect(self) -> None:
        self._deadline = self.loop.call_later(REQUEST_SECONDS, self._give_up)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        self._deadline = None
        self.transport.abort()


class Server(uvicorn.Server):
    """Says where it is once it accepts connections."""

    def __init__(self, config: uvicorn.Config, greeting: str) -> None:
        super().__init__(config)
        self._greeting = greeting

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self._greeting, flush=True)


class OneLine(logging.Filter):
    """Leaves of a traceback its last line: what it is about is the fault of a request, or said elsewhere."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            record.msg = f"{str(record.msg).strip()} ({type(error).__name__}: {error})"
            record.exc_info = record.exc_text = None
        return True


def make_server(app: Any, greeting: str, **options: Any) -> Server:
    """A server for an application.

    Args:
        greeting: line that is printed once connections are accepted.
        options: of ``uvicorn.Config``.
    """
    config = uvicorn.Config(app, http=Connection, ws="none", log_level="warning", **options)
    log = logging.getLogger("uvicorn.error")
    if not any(isinstance(one, OneLine) for one in log.filters):
        log.addFilter(OneLine())
    return Server(config, greeting)
