"""A threading server that nobody can hold: every request has a deadline, and there are only so many connections.

`http.server` waits for each read and not for a request, so a peer that sends a byte a second keeps its thread for as long as
it likes. Here a watch shuts connections down whose request is not done in time. At the limit a new connection takes the place
of the one that has waited longest, first of those that have not shown that they may ask.
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
REQUEST_SECONDS = 10.0  # from its first line to the last byte of its answer; for strangers from their connection on
IDLE_SECONDS = 60.0  # between two requests of one who may ask
LOOK_SECONDS = 0.5
BACKLOG = 1024  # connections that the system keeps until they are accepted


@dataclass
class Connection:
    """What is known of an open connection: since when it waits, whether inside a request, and whether it may ask."""

    since: float
    asking: bool = True
    trusted: bool = False

    @property
    def deadline(self) -> float:
        return self.since + (REQUEST_SECONDS if self.asking or not self.trusted else IDLE_SECONDS)


class BoundedServer(ThreadingHTTPServer):
    """A thread for each connection, of which there are at most MOST_CONNECTIONS, none held beyond its deadline."""

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
        """A request's first line has come; a stranger's time runs since the connection."""
        with self._mutex:
            one = self._open.get(request)
            if one is not None:
                one.asking, one.since = True, time.monotonic() if one.trusted else one.since

    def trust(self, request: socket.socket, trusted: bool) -> None:
        """Whether whoever is at the other end has shown that they may ask."""
        with self._mutex:
            if request in self._open:
                self._open[request].trusted = trusted

    def rest(self, request: socket.socket) -> None:
        """A request has been answered, and the connection may wait for the next."""
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
        """Wake the thread of a connection, whose next read or write then finds its end."""
        self._open.pop(request, None)
        with contextlib.suppress(OSError):  # the peer was faster
            request.shutdown(socket.SHUT_RDWR)
