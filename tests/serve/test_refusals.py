"""Everything that cannot be answered gets the protocol's error and no more, and leaves the server as it was."""

import http.client
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import openai
import pytest

from lm.serve import server
from lm.serve.protocol import Refused, parse
from tests.serve.running import wait_until

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
TURN = {"role": "user", "content": "What is 3 + 4?"}
GOOD = {"model": "default", "messages": [TURN], "max_tokens": 2}
DEEP = b'{"model":' + b"[" * 100_000 + b"]" * 100_000 + b"}"


def post(port, path, body, headers=None):
    """The status and the JSON of a response."""
    connection = http.client.HTTPConnection("localhost", port, timeout=60)
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", path, body, {"Content-Type": "application/json"} | (headers or {}))
    response = connection.getresponse()
    found = response.status, json.loads(response.read())
    connection.close()
    return found


DEEP_SCHEMA: dict = {"type": "integer"}
for _ in range(200):
    DEEP_SCHEMA = {"type": "array", "items": DEEP_SCHEMA}
UNUSABLE = [
    {"type": "integer", "minimum": 5, "maximum": 3},
    {"enum": []},
    {"$ref": "#"},
    {"$ref": "http://elsewhere.example/schema"},
    {"type": "string", "pattern": "("},
    {"not": {}},
    {"type": "object", "properties": {f"name {number}": {"type": "string"} for number in range(3000)}},
    DEEP_SCHEMA,
]
BAD = [
    (CHAT, b"", 400, None),
    (CHAT, b"{", 400, None),
    (CHAT, b"\xff\xfe", 400, None),
    (CHAT, b"[]", 400, None),
    (CHAT, b'{"model": NaN}', 400, None),
    (CHAT, b'{"n": ' + b"9" * 5000 + b"}", 400, None),
    (CHAT, DEEP, 400, None),
    (CHAT, {}, 400, "model"),
    (CHAT, GOOD | {"model": None}, 400, "model"),
    (CHAT, GOOD | {"model": "nobody"}, 404, "model"),
    (CHAT, GOOD | {"model": "x" * 10**6}, 404, "model"),
    (CHAT, GOOD | {"x" * 10**6: 1}, 400, "x" * 60),
    (CHAT, GOOD | {"temprature": 1}, 400, "temprature"),
    (CHAT, GOOD | {"temperature": "hot"}, 400, "temperature"),
    (CHAT, GOOD | {"temperature": 3}, 400, "temperature"),
    (CHAT, GOOD | {"temperature": True}, 400, "temperature"),
    (CHAT, GOOD | {"top_p": -0.1}, 400, "top_p"),
    (CHAT, GOOD | {"max_tokens": 0}, 400, "max_tokens"),
    (CHAT, GOOD | {"max_tokens": 2.5}, 400, "max_tokens"),
    (CHAT, GOOD | {"max_tokens": 10**8}, 400, "max_tokens"),
    (CHAT, GOOD | {"max_completion_tokens": 3}, 400, "max_completion_tokens"),
    (CHAT, GOOD | {"n": 0}, 400, "n"),
    (CHAT, GOOD | {"n": 120}, 400, "n"),
    (CHAT, GOOD | {"stop": ""}, 400, "stop"),
    (CHAT, GOOD | {"stop": ["a"] * 17}, 400, "stop"),
    (CHAT, GOOD | {"stop": {"a": 1}}, 400, "stop"),
    (CHAT, GOOD | {"seed": "7"}, 400, "seed"),
    (CHAT, GOOD | {"stream": "yes"}, 400, "stream"),
    (CHAT, GOOD | {"stream_options": 1}, 400, "stream_options"),
    (CHAT, GOOD | {"logprobs": 2}, 400, "logprobs"),
    (CHAT, GOOD | {"top_logprobs": 2}, 400, "top_logprobs"),
    (CHAT, GOOD | {"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
    (TEXT, {"model": "default", "prompt": "a", "logprobs": 21}, 400, "logprobs"),
    (CHAT, GOOD | {"presence_penalty": 0.5}, 400, "presence_penalty"),
    (CHAT, GOOD | {"tools": [{"type": "function"}]}, 400, "tools"),
    (CHAT, GOOD | {"response_format": "json"}, 400, "response_format"),
    (CHAT, GOOD | {"response_format": {"type": "xml"}}, 400, "response_format"),
    (CHAT, GOOD | {"response_format": {"type": "json_schema"}}, 400, "response_format.json_schema"),
    (CHAT, GOOD | {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "objct"}}}}, 400,
     "response_format"),
    *(
        (CHAT, GOOD | {"response_format": {"type": "json_schema", "json_schema": {"schema": one}}}, 400, "response_format")
        for one in UNUSABLE
    ),
    (CHAT, GOOD | {"\ud800": 1}, 400, "?"),
    (CHAT, GOOD | {"messages": []}, 400, "messages"),
    (CHAT, GOOD | {"messages": "hello"}, 400, "messages"),
    (CHAT, GOOD | {"messages": ["hello"]}, 400, "messages[0]"),
    (CHAT, GOOD | {"messages": [{"role": "king", "content": ""}]}, 400, "messages[0].role"),
    (CHAT, GOOD | {"messages": [{"role": ["user"], "content": ""}]}, 400, "messages[0].role"),
    (CHAT, GOOD | {"messages": [{"role": "user", "content": None}]}, 400, "messages[0].content"),
    (CHAT, GOOD | {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages[0].content"),
    (CHAT, GOOD | {"messages": [TURN, {"role": "assistant", "content": "7"}]}, 400, "messages"),
    (CHAT, GOOD | {"messages": [TURN, {"role": "assistant", "content": "7"}] * 5000 + [TURN]}, 400, "messages"),
    (CHAT, GOOD | {"messages": [TURN, {"role": "assistant", "content": "7"}] * 40 + [TURN]}, 400, "messages"),
    (CHAT, GOOD | {"messages": [{"role": "user", "content": "x" * 10**6}]}, 400, "messages"),
    (TEXT, {"model": "default"}, 400, "prompt"),
    (TEXT, {"model": "default", "prompt": []}, 400, "prompt"),
    (TEXT, {"model": "default", "prompt": [[]]}, 400, "prompt"),
    (TEXT, {"model": "default", "prompt": [True]}, 400, "prompt"),
    (TEXT, {"model": "default", "prompt": [10**9]}, 400, "prompt"),
    (TEXT, {"model": "default", "prompt": [-1]}, 400, "prompt"),
    (TEXT, {"model": "default", "prompt": "a", "messages": []}, 400, "messages"),
    (TEXT, {"model": "default", "prompt": "a", "echo": True}, 400, "echo"),
    (CHAT, b"x" * (5 << 20), 413, None),
    ("/v1/nothing", GOOD, 404, None),
    ("/v1/models", GOOD, 405, None),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("path", "body", "status", "param"), BAD, ids=range(len(BAD)))
def test_a_bad_request_gets_the_protocols_error(running, path, body, status, param):
    found, told = post(running.port, path, body)
    assert found == status
    assert set(told) == {"error"} and set(told["error"]) == {"message", "type", "param", "code"}
    assert told["error"]["param"] == param
    message = told["error"]["message"]
    assert message and "\n" not in message and len(message) < 700
    assert running.engine().running == 0


def test_a_good_request_after_all_of_them_is_answered(running):
    assert post(running.port, CHAT, GOOD)[0] == 200


def test_lone_surrogates_are_text(running):
    status, _ = post(
        running.port,
        CHAT,
        b'{"model": "default", "max_tokens": 2, "messages": [{"role": "user", "content": "\\ud800"}]}',
    )
    assert status == 200


@pytest.mark.parametrize(
    "raw",
    [
        b"GET /health HTTP/1.1\r\n\r\n",  # without a host
        b"\x16\x03\x01\x00\xa5\x01",  # the beginning of TLS
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
    ],
)
def test_what_is_no_http_is_refused(running, raw):
    with socket.create_connection(("localhost", running.port), timeout=10) as one:
        one.sendall(raw)
        one.settimeout(10)
        told = one.recv(1000)
    assert b" 400 " in told
    assert post(running.port, CHAT, GOOD)[0] == 200


@pytest.mark.parametrize(
    "rest",
    [b"GET /health HTTP/1.1\r\nX: ", b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999\r\n\r\n"],
)
def test_a_request_that_never_ends_is_closed_though_one_was_answered_before(running, monkeypatch, rest):
    monkeypatch.setattr(server, "REQUEST_SECONDS", 1.0)
    port = running.port
    with socket.create_connection(("localhost", port), timeout=30) as connection:
        connection.sendall(f"GET /health HTTP/1.1\r\nHost: localhost:{port}\r\n\r\n".encode())
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
        connection.sendall(rest)

        def closed():
            try:
                connection.sendall(b"a")
            except OSError:
                return True
            return False

        wait_until(closed, 60)


def test_a_body_of_unknown_size_is_limited_too(running):
    connection = http.client.HTTPConnection("localhost", running.port, timeout=60)
    parts = (b" " * (1 << 20) for _ in range(5))
    headers = {"Content-Type": "application/json", "Transfer-Encoding": "chunked"}
    connection.request("POST", CHAT, parts, headers, encode_chunked=True)
    assert connection.getresponse().status == 413


def test_other_sites_and_other_names_of_this_machine_are_refused(running):
    elsewhere = {"Origin": "http://elsewhere.example"}
    assert post(running.port, CHAT, GOOD, elsewhere)[0] == 403
    assert post(running.port, CHAT, GOOD, {"Host": "elsewhere.example"})[0] == 403
    assert post(running.port, CHAT, GOOD, {"Content-Type": "text/plain"})[0] == 415
    assert post(running.port, CHAT, GOOD, {"Origin": f"http://localhost:{running.port}"})[0] == 200


def test_with_a_token_nothing_but_health_is_served_without_it(serve):
    with serve(token="0123456789abcdef") as guarded:
        assert [one.id for one in guarded.client.models.list()] == ["first", "default"]
        for key in ("", "0123456789abcdeg", "é"):
            status, told = post(guarded.port, CHAT, GOOD, {"Authorization": f"Bearer {key}".encode("latin-1")})
            assert status == 401 and told["error"]["code"] == "invalid_api_key"
        with pytest.raises(openai.AuthenticationError):
            guarded.client.with_options(api_key="another").models.list()
        connection = http.client.HTTPConnection("localhost", guarded.port, timeout=60)
        for path, status in (("/health", 200), ("/metrics", 401), ("/v1/models", 401)):
            connection.request("GET", path)
            response = connection.getresponse()
            response.read()
            assert response.status == status


@pytest.mark.slow
def test_a_full_queue_and_a_request_whose_time_is_over(serve, monkeypatch):
    long = {"model": "default", "messages": [TURN], "temperature": 0}
    with serve(slots=1, queue=1, seconds=600.0, max_len=4000, new=3900) as small, ThreadPoolExecutor(2) as pool:
        engine = small.engine()
        first = pool.submit(post, small.port, CHAT, long)
        wait_until(lambda: engine.running == 1, 60)
        second = pool.submit(post, small.port, CHAT, long)
        wait_until(lambda: small.scheduler.waiting() == 1, 60)
        with pytest.raises(openai.RateLimitError) as refused:
            small.client.chat.completions.create(**long)
        assert refused.value.code == "queue_full" and "Retry-After" in refused.value.response.headers
        assert post(small.port, CHAT, long | {"n": 3})[0] == 400, "it would never fit"
        # The time is over once all the above has been seen, however long that takes.
        monkeypatch.setattr("lm.serve.scheduler.time", SimpleNamespace(monotonic=lambda: time.monotonic() + 600))
        for one in (first, second):
            status, told = one.result()
            assert (status, told["error"]["code"]) == (504, "timeout")
        wait_until(lambda: engine.running == 0 and small.scheduler.waiting() == 0, 60)
        stream = small.client.chat.completions.create(**long, stream=True)
        with pytest.raises(openai.APIError, match="time is over"):
            list(stream)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failure_of_the_engine_is_told_and_ends_the_server(serve, monkeypatch):
    with serve() as broken:
        monkeypatch.setattr(broken.engine(), "_begin_step", lambda burst: 1 // 0)
        status, told = post(broken.port, CHAT, GOOD)
        assert status == 500 and told["error"]["type"] == "server_error"
        assert isinstance(broken.scheduler.failure, ZeroDivisionError)


def test_metrics_count_what_has_been_asked(running):
    before = _metrics(running.port)
    assert post(running.port, CHAT, GOOD)[0] == 200
    after = _metrics(running.port)
    name = f'lm_requests_total{{path="{CHAT}",status="200"}}'
    assert after[name] == before.get(name, 0) + 1
    assert after['lm_slots{model="first"}'] == 4 and after['lm_running{model="first"}'] == 0
    assert after["lm_first_token_seconds_count"] > before.get("lm_first_token_seconds_count", 0)


def _metrics(port):
    connection = http.client.HTTPConnection("localhost", port, timeout=60)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


def test_a_request_for_nothing_in_particular_has_the_protocols_defaults():
    asked = parse(
        json.dumps({"model": "m", "messages": [TURN], "tools": None, "user": "me", "stop": None}).encode(), True
    )
    assert (asked.n, asked.stream, asked.settings.temperature, asked.settings.top_p) == (1, False, 1.0, 1.0)
    assert asked.settings.max_tokens is None and asked.settings.alternatives is None
    with pytest.raises(Refused):
        parse(b"null", True)
