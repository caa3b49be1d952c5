"""A threading HTTP server with a deadline for every request and a limit on the number of open connections.

The timeout of `http.server` is per read, not per request, so a client that sends one byte a second would keep its thread for ever.
Here a watcher thread closes connections whose request misses its deadline. At the limit on connections, a new one replaces the
one that has waited longest; unauthenticated connections are replaced first.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from typing import Any

MOST_CONNECTIONS = 256
REQUEST_SECONDS = (
    10.0  # from the request's first line to the last byte of the response; unauthenticated: from connecting
)
IDLE_SECONDS = 60.0  # between two requests of an authenticated connection
LOOK_SECONDS = 0.5
BACKLOG = 1024  # connections that the system queues until they are accepted


@dataclass
class Connection:
    """State of an open connection: waiting since when, whether inside a request, and whether it is authenticated."""

    since: float
    asking: bool = True
    trusted: bool = False

    @property
    def deadline(self) -> float:
        return self.since + (REQUEST_SECONDS if self.asking or not self.trusted else IDLE_SECONDS)


class BoundedServer(ThreadingHTTPServer):
    """HTTP server with one thread per connection, at most MOST_CONNECTIONS connections, and a deadline for each."""

    daemon_threads = True
    request_queue_size = BACKLOG

    def __init__(self, address: tuple[str, int], handler: Any):
        self._open: dict[socket.socket, Connection] = {}
        self._mutex = threading.Lock()
        self._closed = threading.Event()
        super().__init__(address, handler)
        threading.Thread(target=self._watch, daemon=True).start()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._mutex:
            if len(self._open) >= MOST_CONNECTIONS:
                oldest = min(self._open, key=lambda one: (self._open[one].trusted, self._open[one].since))
                self._end(oldest)
            self._open[request] = Connection(time.monotonic())
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._mutex:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def server_close(self) -> None:
        self._closed.set()
        super().server_close()

    def begin(self, request: socket.socket) -> None:
        """Note that a request's first line has arrived; an unauthenticated connection's deadline stays as it was."""
        with self._mutex:
            one = self._open.get(request)
            if one is not None:
                one.asking, one.since = True, time.monotonic() if one.trusted else one.since

    def trust(self, request: socket.socket, trusted: bool) -> None:
        """Note whether the client of a connection is authenticated."""
        with self._mutex:
            if request in self._open:
                self._open[request].trusted = trusted

    def rest(self, request: socket.socket) -> None:
        """Note that a request has been answered; the connection may wait for the next one."""
        with self._mutex:
            if request in self._open:
                self._open[request].asking, self._open[request].since = False, time.monotonic()

    def _watch(self) -> None:
        while not self._closed.wait(LOOK_SECONDS):
            now = time.monotonic()
            with self._mutex:
                for request in [request for request, one in self._open.items() if one.deadline < now]:
                    self._end(request)

    def _end(self, request: socket.socket) -> None:
        """Close a connection; the next read or write of its thread then finds it closed."""
        self._open.pop(request, None)
        with contextlib.suppress(OSError):  # the client has closed it already
            request.shutdown(socket.SHUT_RDWR)
