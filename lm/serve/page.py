"""The chat page's files, and the link with a token that opens it."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, RedirectResponse, Response

from lm.serve import access
from lm.web.local_server import CSS, HEADERS, HTML, MARKDOWN_CSS, SCRIPT, same_text

HERE = Path(__file__).parent
FILES = {
    "/": (HERE / "page.html", HTML), "/page.css": (HERE / "page.css", CSS), "/markdown.css": (MARKDOWN_CSS, CSS),
    "/page.js": (HERE / "page.js", SCRIPT), "/markdown.js": (HERE / "markdown.js", SCRIPT),
}  # fmt: skip
"""The file of each path, and its media type."""


def file_of(path: str) -> Response:
    """The response with a file of the page."""
    file, kind = FILES[path]
    return FileResponse(file, media_type=f"{kind}; charset=utf-8", headers=dict(HEADERS))


def opened(request: Request, token: str | None, port: int) -> Response | None:
    """The response to the link that the command printed, which moves the token from the URL into a cookie; None otherwise."""
    given = request.query_params.get("token", "")
    if token is None or request.url.path != "/" or not same_text(given, token):
        return None
    response = RedirectResponse("/", status_code=303, headers=dict(HEADERS))
    response.set_cookie(access.cookie_name(port), token, httponly=True, samesite="strict", path="/")
    return response
