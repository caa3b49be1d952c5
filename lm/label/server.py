"""The HTTP server of the label page: routes, access control, and headers that forbid loading anything else."""

from __future__ import annotations

import contextlib
import errno
import hmac
import json
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qs, urlsplit

from lm.choices.desk import Desk, View, clean_name
from lm.choices.pairs import Answer, Turns, text_of
from lm.experiment import UserError
from lm.label.connections import BoundedServer
from lm.label.safe_markdown import to_html
from lm.label.summary import summarise
from lm.label.summary_page import render_summary
from lm.web.text import visible

HERE = Path(__file__).parent
LOCAL = ("localhost", "127.0.0.1", "::1")
LARGEST_BODY = 1 << 16
LINGER_SECONDS = 0.5  # wait for the rest of a refused request's body
FILES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
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
    headers: Mapping[str, str]


class Server(BoundedServer):
    """The label page's server; with `token` None it serves only this machine, without a token.

    Raises UserError if the port is in use or the host is not an address of this machine.
    """

    def __init__(self, desk: Desk, host: str = "localhost", port: int = 0, token: str | None = None):
        if host not in LOCAL and token is None:
            raise ValueError("a server for other machines needs a token")
        self.desk, self.token = desk, token
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), Handler)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise UserError(
                    f"port {port} is in use: choose another with --port N, or 0 for any that is free"
                ) from None
            raise UserError(f"cannot serve on {host} port {port}: {error.strerror or error}") from None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore disconnected browsers; print other errors without the request."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """Handler of one request: access check, routing, response."""

    server: Server
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
        path = _split(self.path)
        given = parse_qs(path.query).get("token", [""])[0]
        if self.server.token is not None and path.path == "/" and _same(given, self.server.token):
            # The link that `lm label` printed: move the token from the URL into a cookie.
            cookie = f"{self._cookie_name}={self.server.token}; HttpOnly; SameSite=Strict; Path=/"
            self._send(Reply(HTTPStatus.SEE_OTHER, "text/plain", b"", {"Location": "/", "Set-Cookie": cookie}))
        elif (refused := self._refused()) is not None:
            self._send(refused)
        elif path.path in FILES:
            name, kind = FILES[path.path]
            self._send(Reply(HTTPStatus.OK, kind, (HERE / name).read_bytes(), {}))
        elif path.path == "/summary":
            page = render_summary(summarise(self.server.desk.records()))
            self._send(Reply(HTTPStatus.OK, FILES["/"][1], page.encode(), {}))
        else:
            self._send(_error(HTTPStatus.NOT_FOUND, "there is no such page"))

    def do_POST(self) -> None:
        size = self.headers.get("Content-Length", "")
        refused = self._refused()
        if refused is None and not (size.isdecimal() and len(size) < 10 and int(size) <= LARGEST_BODY):
            refused = _error(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a request has at most {LARGEST_BODY} bytes")
        if refused is not None:
            self.close_connection = True  # the body is not read
            self._send(refused)
            self._linger()
            return
        body = self.rfile.read(int(size))
        if len(body) < int(size):  # the client has disconnected, or missed its deadline
            self.close_connection = True
            return
        self._send(answer(self.server.desk, self.path, body, self.client_address[0]))

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
            if not (_same(self._cookie(), token) or _same(self.headers.get("Authorization", ""), f"Bearer {token}")):
                return _error(
                    HTTPStatus.UNAUTHORIZED, "this page needs its token: open the link that `lm label` printed"
                )
        elif _split(f"//{self.headers.get('Host', '')}").hostname not in LOCAL:
            return _error(HTTPStatus.FORBIDDEN, "this page is for this machine only: open it as localhost")
        if self.command == "POST":
            origin = self.headers.get("Origin")
            if self.headers.get_content_type() != "application/json":
                return _error(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "a request must be application/json")
            if origin is not None and _split(origin).netloc != self.headers.get("Host"):
                return _error(HTTPStatus.FORBIDDEN, "this request comes from another site")
        return None

    @property
    def _cookie_name(self) -> str:
        """Name of the cookie; it has the port, since cookies are per host, not per port."""
        return f"lm-label-{self.server.server_port}"

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


def answer(desk: Desk, path: str, body: bytes, address: str) -> Reply:
    """The reply to an action of the page; `body` is untrusted, `address` is the client's."""
    action = ACTIONS.get(path)
    if action is None:
        return _error(HTTPStatus.NOT_FOUND, "there is no such action")
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError) as error:
        return _error(HTTPStatus.BAD_REQUEST, f"a request must be JSON: {error}")
    try:
        if not isinstance(asked, dict):
            raise UserError("a request must be a JSON object")
        view = action(desk, clean_name(asked.get("name")), asked, address)
    except UserError as error:
        return _error(HTTPStatus.CONFLICT, str(error))
    except OSError as error:
        print(f"lm label: {desk.log.path}: {error.strerror}", file=sys.stderr)
        return _error(HTTPStatus.INSUFFICIENT_STORAGE, f"not saved: {error.strerror}")
    return Reply(HTTPStatus.OK, "application/json", json.dumps(shown(view)).encode(), {})


def _choose(desk: Desk, name: str, asked: Mapping[str, Any], address: str) -> View:
    pair, choice, strength, comment = (asked.get(field) for field in ("pair", "choice", "strength", "comment"))
    return desk.choose(name, pair, choice, strength, "" if comment is None else comment, address)


ACTIONS: dict[str, Callable[[Desk, str, Mapping[str, Any], str], View]] = {
    "/api/show": lambda desk, name, asked, address: desk.show(name, address),
    "/api/choose": _choose,
    "/api/undo": lambda desk, name, asked, address: desk.undo(name, asked.get("of"), address),
}


def shown(view: View) -> dict[str, Any]:
    """A view as JSON for the page: texts as safe HTML and as source; never the source of an answer."""
    pair = view.pair
    return {
        "pair": None if pair is None else pair.key,
        "prompt": [] if pair is None else _turns(pair.prompt),
        "left": _said(view.left),
        "right": _said(view.right),
        "busy": view.busy,
        "progress": asdict(view.progress),
        "last": view.last and {"id": view.last["id"], "choice": view.last["choice"]},
    }


def _turns(prompt: Turns) -> list[dict[str, str]]:
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [{"role": turn["role"], **_both(turn["content"])} for turn in turns]


def _said(answer: Answer | None) -> dict[str, str] | None:
    return None if answer is None else _both(text_of(answer.answer))


def _both(text: str) -> dict[str, str]:
    return {"html": to_html(text), "text": visible(text)}


def _split(address: str) -> SplitResult:
    """Split a URL; empty parts where it is invalid."""
    try:
        return urlsplit(address)
    except ValueError:
        return urlsplit("")


def _same(given: str, token: str) -> bool:
    """Constant-time comparison of two texts."""
    return hmac.compare_digest(given.encode(errors="replace"), token.encode())


def _error(status: HTTPStatus, message: str) -> Reply:
    return Reply(status, "application/json", json.dumps({"error": message}).encode(), {})
