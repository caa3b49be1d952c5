"""The HTTP server of pages on this machine: access control, limits, and headers that forbid loading anything else."""

from __future__ import annotations

import contextlib
import errno
import hmac
import json
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qs, urlsplit

from lm.experiment import UserError
from lm.web.connections import BoundedServer

LOCAL = ("localhost", "127.0.0.1", "::1")
LARGEST_BODY = 1 << 16
LINGER_SECONDS = 0.5  # wait for the rest of a refused request's body
HTML, CSS, SCRIPT, JSON = "text/html", "text/css", "text/javascript", "application/json"
MARKDOWN_CSS = Path(__file__).with_name("markdown.css")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True)
class Reply:
    """An HTTP response."""

    status: HTTPStatus
    kind: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


Page = Callable[[Mapping[str, str]], Reply]
"""The response to GET of a path, from the parameters of its query; of a repeated parameter the last."""
Action = Callable[[str, bytes, str], Reply]
"""The response to POST of a path, from the path, the untrusted body and the client's address."""


def text_reply(kind: str, text: str) -> Reply:
    """A successful response with a text."""
    return Reply(HTTPStatus.OK, f"{kind}; charset=utf-8", text.encode())


def json_reply(value: Any) -> Reply:
    """A successful response with a JSON value."""
    return Reply(HTTPStatus.OK, JSON, json.dumps(value).encode())


def error_reply(status: HTTPStatus, message: str) -> Reply:
    """A response with an error message as JSON."""
    return Reply(status, JSON, json.dumps({"error": message}).encode())


def file_page(path: Path, kind: str) -> Page:
    """The page that is the text of a file, read at each request."""
    return lambda query: text_reply(kind, path.read_text("utf-8"))


def no_action(path: str, body: bytes, address: str) -> Reply:
    """The action of a server that takes none."""
    return error_reply(HTTPStatus.NOT_FOUND, "there is no such action")


def address_error(error: OSError, host: str, port: int) -> UserError:
    """What to tell somebody whose server cannot listen on an address."""
    if error.errno == errno.EADDRINUSE:
        return UserError(f"port {port} is in use: choose another with --port N, or 0 for any that is free")
    return UserError(f"cannot serve on {host} port {port}: {error.strerror or error}")


class LocalServer(BoundedServer):
    """Serves pages by path; with `token` None it serves only this machine, without a token.

    Args:
        command: the `lm` command that serves them; names the cookie, and is named in refusals.

    Raises UserError if the port is in use or the host is not an address of this machine.
    """

    def __init__(
        self,
        command: str,
        pages: Mapping[str, Page],
        action: Action = no_action,
        host: str = "localhost",
        port: int = 0,
        token: str | None = None,
    ):
        if host not in LOCAL and token is None:
            raise ValueError("a server for other machines needs a token")
        self.command, self.pages, self.action, self.token = command, pages, action, token
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), Handler)
        except OSError as error:
            raise address_error(error, host, port) from None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore disconnected browsers; print other errors without the request."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """Handler of one request: access check, routing, response."""

    server: LocalServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "lm", ""
    disable_nagle_algorithm = (
        True  # a response is two writes; the second would wait for the acknowledgement of the first
    )
    timeout = 60

    def parse_request(self) -> bool:
        self.server.begin(self.connection)
        return super().parse_request()

    def handle_one_request(self) -> None:
        super().handle_one_request()
        self.server.rest(self.connection)

    def do_GET(self) -> None:
        path = split_url(self.path)
        query = {name: values[-1] for name, values in parse_qs(path.query).items()}
        given = query.get("token", "")
        if self.server.token is not None and path.path == "/" and same_text(given, self.server.token):
            # The link that the command printed: move the token from the URL into a cookie.
            cookie = f"{self._cookie_name}={self.server.token}; HttpOnly; SameSite=Strict; Path=/"
            self._send(Reply(HTTPStatus.SEE_OTHER, "text/plain", b"", {"Location": "/", "Set-Cookie": cookie}))
        elif (refused := self._refused()) is not None:
            self._send(refused)
        elif path.path in self.server.pages:
            self._send(self.server.pages[path.path](query))
        else:
            self._send(error_reply(HTTPStatus.NOT_FOUND, "there is no such page"))

    def do_POST(self) -> None:
        size = self.headers.get("Content-Length", "")
        refused = self._refused()
        if refused is None and not (size.isdecimal() and len(size) < 10 and int(size) <= LARGEST_BODY):
            refused = error_reply(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a request has at most {LARGEST_BODY} bytes")
        if refused is not None:
            self.close_connection = True  # the body is not read
            self._send(refused)
            self._linger()
            return
        body = self.rfile.read(int(size))
        if len(body) < int(size):  # the client has disconnected, or missed its deadline
            self.close_connection = True
            return
        self._send(self.server.action(self.path, body, self.client_address[0]))

    def _linger(self) -> None:
        """Read the rest of an unread body for a moment; otherwise the system would reset the connection and lose the response."""
        until, left = time.monotonic() + LINGER_SECONDS, LARGEST_BODY
        self.wfile.flush()
        with contextlib.suppress(OSError):  # the client may have disconnected
            self.connection.shutdown(socket.SHUT_WR)
            while left > 0 and (wait := until - time.monotonic()) > 0:
                self.connection.settimeout(wait)
                data = self.connection.recv(LARGEST_BODY)
                if not data:
                    break
                left -= len(data)

    def _refused(self) -> Reply | None:
        """The refusal of this request, if any; also notes whether the connection is authenticated."""
        refused = self._reason_against()
        self.server.trust(self.connection, refused is None)
        return refused

    def _reason_against(self) -> Reply | None:
        """The reason to refuse: no token, a page of another site, or another host name; checked before the body is read."""
        token = self.server.token
        if token is not None:
            if not (
                same_text(self._cookie(), token) or same_text(self.headers.get("Authorization", ""), f"Bearer {token}")
            ):
                told = f"this page needs its token: open the link that `lm {self.server.command}` printed"
                return error_reply(HTTPStatus.UNAUTHORIZED, told)
        elif split_url(f"//{self.headers.get('Host', '')}").hostname not in LOCAL:
            return error_reply(HTTPStatus.FORBIDDEN, "this page is for this machine only: open it as localhost")
        if self.command == "POST":
            origin = self.headers.get("Origin")
            if self.headers.get_content_type() != JSON:
                return error_reply(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "a request must be application/json")
            if origin is not None and split_url(origin).netloc != self.headers.get("Host"):
                return error_reply(HTTPStatus.FORBIDDEN, "this request comes from another site")
        return None

    @property
    def _cookie_name(self) -> str:
        """Name of the cookie; it has the port, since cookies are per host, not per port."""
        return f"lm-{self.server.command}-{self.server.server_port}"

    def _cookie(self) -> str:
        try:
            morsel = SimpleCookie(self.headers.get("Cookie", "")).get(self._cookie_name)
        except CookieError:  # another server on this host may have set an invalid cookie
            return ""
        return morsel.value if morsel else ""

    def _send(self, reply: Reply) -> None:
        self.send_response(reply.status)
        for name, value in {**HEADERS, **reply.headers}.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.send_header("Content-Type", reply.kind)
        self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        self.wfile.write(reply.body)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: the URL may contain the token."""


def split_url(address: str) -> SplitResult:
    """Split a URL; empty parts where it is invalid."""
    try:
        return urlsplit(address)
    except ValueError:
        return urlsplit("")


def same_text(given: str, token: str) -> bool:
    """Constant-time comparison of two texts."""
    return hmac.compare_digest(given.encode(errors="replace"), token.encode())
