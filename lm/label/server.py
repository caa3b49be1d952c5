"""The label page's server: its pages and actions."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from http import HTTPStatus
from pathlib import Path
from typing import Any

from lm.choices.desk import Desk, View, clean_name
from lm.choices.pairs import Answer, Turns, text_of
from lm.experiment import UserError
from lm.label.safe_markdown import to_html
from lm.label.summary import summarise
from lm.label.summary_page import render_summary
from lm.web.local_server import (
    CSS,
    HTML,
    MARKDOWN_CSS,
    SCRIPT,
    LocalServer,
    Reply,
    error_reply,
    file_page,
    json_reply,
    text_reply,
)
from lm.web.text import visible

HERE = Path(__file__).parent


class Server(LocalServer):
    """The label page's server; with `token` None it serves only this machine, without a token.

    Raises UserError if the port is in use or the host is not an address of this machine.
    """

    def __init__(self, desk: Desk, host: str = "localhost", port: int = 0, token: str | None = None):
        self.desk = desk
        pages = {
            "/": file_page(HERE / "page.html", HTML),
            "/markdown.css": file_page(MARKDOWN_CSS, CSS),
            "/page.css": file_page(HERE / "page.css", CSS),
            "/page.js": file_page(HERE / "page.js", SCRIPT),
            "/summary": lambda query: text_reply(HTML, render_summary(summarise(desk.records()))),
        }
        super().__init__("label", pages, functools.partial(answer, desk), host, port, token)


def answer(desk: Desk, path: str, body: bytes, address: str) -> Reply:
    """The reply to an action of the page; `body` is untrusted, `address` is the client's."""
    action = ACTIONS.get(path)
    if action is None:
        return error_reply(HTTPStatus.NOT_FOUND, "there is no such action")
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError) as error:
        return error_reply(HTTPStatus.BAD_REQUEST, f"a request must be JSON: {error}")
    try:
        if not isinstance(asked, dict):
            raise UserError("a request must be a JSON object")
        view = action(desk, clean_name(asked.get("name")), asked, address)
    except UserError as error:
        return error_reply(HTTPStatus.CONFLICT, str(error))
    except OSError as error:
        print(f"lm label: {desk.log.path}: {error.strerror}", file=sys.stderr)
        return error_reply(HTTPStatus.INSUFFICIENT_STORAGE, f"not saved: {error.strerror}")
    return json_reply(shown(view))


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
