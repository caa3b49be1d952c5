"""Runs the application on a socket until Ctrl-C or a failure of the engine."""

from __future__ import annotations

import asyncio
import signal
import socket
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from lm.serve.scheduler import Scheduler
from lm.web.local_server import address_error

MOST_CONNECTIONS = 1024
REQUEST_SECONDS = (
    30.0  # from connecting to the end of the first request's headers; a later request has at most twice as long
)
IDLE_SECONDS = 60  # between two requests of a connection
LARGEST_HEAD = 1 << 16  # bytes of a request's headers
END_SECONDS = 2  # for open streams, when the server ends


def bind(host: str, port: int) -> socket.socket:
    """A socket at this address.

    Raises:
        UserError: the port is in use, or the host is not an address of this machine.
    """
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=MOST_CONNECTIONS
        )
    except OSError as error:
        raise address_error(error, host, port) from None


class PatientProtocol(H11Protocol):
    """A connection that is closed when a request stays unfinished: one byte a second would hold it for ever."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        asyncio.get_running_loop().call_later(REQUEST_SECONDS, self._look, None, True)

    def _look(self, before: Any, unfinished: bool) -> None:
        """Close the connection if nothing has changed since the last look: no request begun, and part of one there then.

        Args:
            before: the last request then; None before the first.
            unfinished: whether a part of the next one was there, or the body of one that had been answered was to come.
        """
        idle = self.cycle is None or self.cycle.response_complete
        if self.cycle is before and idle and unfinished:
            self.transport.close()
        elif not self.transport.is_closing():
            unfinished = bool(self.conn.trailing_data[0]) or self.conn.their_state is h11.SEND_BODY
            asyncio.get_running_loop().call_later(REQUEST_SECONDS, self._look, self.cycle, unfinished)


def run(server: EndingServer, listener: socket.socket) -> None:
    """Serve until Ctrl-C; raises what has ended the engine's thread, if that has."""
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt as error:  # the server has ended its streams
        if signal.SIGTERM in error.args:
            raise
    finally:
        listener.close()
    if server.scheduler.failure is not None:
        raise RuntimeError("the engine has failed") from server.scheduler.failure


class EndingServer(uvicorn.Server):
    """A server of an application, which ends with the engine's thread."""

    def __init__(self, app: Any, scheduler: Scheduler):
        self.scheduler = scheduler
        super().__init__(
            uvicorn.Config(
                app, http=PatientProtocol, ws="none", lifespan="off", log_level="error", access_log=False,
                server_header=False, proxy_headers=False, limit_concurrency=MOST_CONNECTIONS,
                timeout_keep_alive=IDLE_SECONDS, timeout_graceful_shutdown=END_SECONDS,
                h11_max_incomplete_event_size=LARGEST_HEAD,
            )
        )  # fmt: skip

    async def on_tick(self, counter: int) -> bool:
        """Whether to end; called ten times a second."""
        return await super().on_tick(counter) or self.scheduler.failure is not None
