"""The server's routes: the OpenAI protocol, health, metrics, and the chat page."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import anyio
import anyio.to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from lm.experiment import UserError
from lm.serve import access, page, replies
from lm.serve.completions import Delta, LiveCompletion
from lm.serve.metrics import Metrics
from lm.serve.models import DEFAULT, Served, find
from lm.serve.protocol import Asked, Refused, parse
from lm.serve.scheduler import Scheduler

LARGEST_BODY = 4 << 20  # bytes
BODY_SECONDS = 30.0
PREPARED_AT_ONCE = 2  # requests whose prompts are encoded at the same time
PATHS = {"/v1/chat/completions": True, "/v1/completions": False}
GONE = 499  # status of a request whose client has gone, for the metrics


class Post:
    """Carries deltas from the engine's thread to that of the connections: one wake-up for all of a step."""

    def __init__(self) -> None:
        self._carried: deque[tuple[asyncio.Queue[Delta], Delta]] = deque()
        self._called = False

    def put(self, loop: asyncio.AbstractEventLoop, queue: asyncio.Queue[Delta], delta: Delta) -> None:
        """Put a delta into a queue of the loop's thread."""
        self._carried.append((queue, delta))
        if not self._called and not loop.is_closed():
            self._called = True
            loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._called = False  # before the queue is emptied: what comes now calls again
        while self._carried:
            queue, delta = self._carried.popleft()
            queue.put_nowait(delta)


@dataclass(frozen=True)
class State:
    """What the routes use. `seconds` is the time of a request; `token` is None where only this machine is served."""

    models: Mapping[str, Served]
    scheduler: Scheduler
    metrics: Metrics
    seconds: float
    token: str | None
    port: int
    post: Post = field(default_factory=Post)


def make_app(state: State) -> Starlette:
    """The application that serves the models."""
    routes = [
        *(
            Route(path, guarded(state, partial(complete, state, chat)), methods=["POST"])
            for path, chat in PATHS.items()
        ),
        Route("/v1/models", guarded(state, partial(list_models, state))),
        Route("/v1/models/{name:path}", guarded(state, partial(show_model, state))),
        Route("/health", guarded(state, partial(health, state))),
        Route("/metrics", guarded(state, partial(show_metrics, state))),
        *(Route(path, guarded(state, show_file)) for path in page.FILES),
    ]
    handlers: dict[Any, Any] = {HTTPException: _http_error, Exception: _failed}
    return Starlette(routes=routes, exception_handlers=handlers)


def guarded(state: State, handler: Callable[..., Any]) -> Callable[..., Any]:
    """A route's function with the access check, errors in the protocol's shape, and a count of its responses."""

    async def answer(request: Request) -> Response:
        try:
            response = page.opened(request, state.token, state.port)
            if response is None:
                access.check(request, state.token, state.port)
                response = await handler(request)
        except Refused as error:
            response = _refusal(error)
        except ClientDisconnect:
            response = Response(status_code=GONE)
        path = request.scope["route"].path
        state.metrics.requests.labels(path, str(response.status_code)).inc()
        return response

    return answer


async def complete(state: State, chat: bool, request: Request) -> Response:
    """Answer a request for completions."""
    began = time.monotonic()
    asked = parse(await _body(request), chat)
    served = find(state.models, asked.model)
    arrived = asyncio.Queue[Delta]()
    sink = partial(state.post.put, asyncio.get_running_loop(), arrived)
    completions = await _prepared(served, asked, began + state.seconds, sink)
    state.scheduler.submit(served.name, completions)
    state.metrics.prompt_tokens.labels(served.name).inc(sum(len(one.prompt) for one in completions if not one.sample))
    reply = replies.Replies(asked, served.name, served.tokens, completions)
    deltas = _deltas(state, completions, arrived, began)
    if asked.stream:
        return CompletionStream(state.scheduler, completions, _events(reply, deltas))
    found = await _unless_gone(request, _all(deltas))
    return JSONResponse(reply.whole(found))


class CompletionStream(StreamingResponse):
    """The events of completions, which are given up when the client has gone, even before the first event."""

    def __init__(self, scheduler: Scheduler, completions: list[LiveCompletion], events: AsyncIterator[bytes]):
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._give_up = partial(scheduler.cancel, completions)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._give_up()


_preparing = anyio.CapacityLimiter(PREPARED_AT_ONCE)


async def _prepared(
    served: Served, asked: Asked, deadline: float, sink: Callable[[Delta], None]
) -> list[LiveCompletion]:
    """The request's completions; prompts are encoded in another thread."""
    try:
        return await anyio.to_thread.run_sync(served.prepare, asked, deadline, sink, limiter=_preparing)
    except UserError as error:
        raise Refused(str(error)) from error


async def _body(request: Request) -> bytes:
    size = request.headers.get("content-length", "0")
    too_large = Refused(f"the body has more than {LARGEST_BODY} bytes", status=413, code="request_too_large")
    if not (size.isdecimal() and len(size) < 12) or int(size) > LARGEST_BODY:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > LARGEST_BODY:
                    raise too_large
    except TimeoutError:
        raise Refused(f"the body did not arrive within {BODY_SECONDS:.0f} s", status=408) from None
    return bytes(body)


async def _deltas(
    state: State, completions: list[LiveCompletion], arrived: asyncio.Queue[Delta], began: float
) -> AsyncIterator[list[Delta]]:
    """The deltas of a request as they arrive, several at once where the client is slow; gives up the completions at its end."""
    left, first = len(completions), True
    try:
        while left:
            found = [await arrived.get()]
            while not arrived.empty():
                found.append(arrived.get_nowait())
            if first:
                state.metrics.first_token.observe(time.monotonic() - began)
                if completions[0].first is not None:
                    state.metrics.first_steps.observe(completions[0].first)
                first = False
            left -= sum(one.finish is not None or one.error is not None for one in found)
            yield found
        state.metrics.whole.observe(time.monotonic() - began)
    finally:
        if left:
            state.metrics.cancelled.inc()
            state.scheduler.cancel(completions)


async def _events(reply: replies.Replies, deltas: AsyncIterator[list[Delta]]) -> AsyncIterator[bytes]:
    """The events of a stream; an error is its last one."""
    yield reply.first()
    async for found in deltas:
        yield b"".join(map(reply.chunk, found))
        if any(one.error for one in found):
            return
    yield reply.last()


async def _all(deltas: AsyncIterator[list[Delta]]) -> list[Delta]:
    return [one async for found in deltas for one in found]


async def _unless_gone(request: Request, work: Any) -> Any:
    """The result of `work`, which is cancelled when the client goes.

    Raises:
        ClientDisconnect: it has gone.
    """

    async def until_gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, waiting = asyncio.ensure_future(work), asyncio.ensure_future(until_gone())
    try:
        await asyncio.wait({working, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        for task in (working, waiting):
            task.cancel()


async def list_models(state: State, request: Request) -> Response:
    """The models by name; the last entry is the other name of the first."""
    names = {name: served.created for name, served in state.models.items()}
    return JSONResponse(replies.model_list({**names, DEFAULT: next(iter(names.values()))}))


async def show_model(state: State, request: Request) -> Response:
    """One model."""
    name = request.path_params["name"]
    return JSONResponse(replies.model_object(name, find(state.models, name).created))


async def health(state: State, request: Request) -> Response:
    """Whether the engine's thread works."""
    failed = state.scheduler.failure is not None
    return JSONResponse({"status": "failed" if failed else "ok"}, status_code=503 if failed else 200)


async def show_metrics(state: State, request: Request) -> Response:
    """The metrics for Prometheus."""
    return Response(state.metrics.text(), media_type="text/plain; version=0.0.4")


async def show_file(request: Request) -> Response:
    """A file of the chat page."""
    return page.file_of(request.url.path)


def _refusal(error: Refused) -> Response:
    headers = (
        {"Retry-After": "1"} if error.status == 429 else {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
    )
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


async def _http_error(request: Request, error: HTTPException) -> Response:
    """The errors of routing: no such path, or a method that it does not have."""
    if error.status_code == 404:
        return _refusal(replies.no_route(request.url.path))
    return _refusal(Refused(f"{request.url.path}: {error.detail}", status=error.status_code))


async def _failed(request: Request, error: Exception) -> Response:
    """The response to a fault of the server, whose traceback goes to its log."""
    return _refusal(Refused("the server has a fault; its log says which", status=500))
