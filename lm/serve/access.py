"""Who may ask the server: a token where other machines are served, otherwise this machine's own pages and programs."""

from __future__ import annotations

from starlette.requests import Request

from lm.serve.protocol import Refused
from lm.web.local_server import LOCAL, same_text, split_url

OPEN = ("/health",)  # paths that need no token
COOKIE = "lm-serve"


def check(request: Request, token: str | None, port: int) -> None:
    """Raise Refused unless the request may be answered."""
    headers = request.headers
    if token is not None:
        given = (headers.get("authorization", ""), f"Bearer {request.cookies.get(cookie_name(port), '')}")
        if request.url.path not in OPEN and not any(same_text(one, f"Bearer {token}") for one in given):
            raise Refused(
                "this server needs its token: send Authorization: Bearer TOKEN (api_key of a client)",
                status=401, code="invalid_api_key", kind="authentication_error",
            )  # fmt: skip
    elif split_url(f"//{headers.get('host', '')}").hostname not in LOCAL:
        raise Refused("this server is for this machine only: ask it as localhost", status=403, kind="permission_error")
    if request.method == "POST":
        origin = headers.get("origin")
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused("the body should have the content type application/json", status=415)
        if origin is not None and split_url(origin).netloc != headers.get("host"):
            raise Refused("this request comes from another site", status=403, kind="permission_error")


def cookie_name(port: int) -> str:
    """Name of the page's cookie; it has the port, since cookies are per host, not per port."""
    return f"{COOKIE}-{port}"
