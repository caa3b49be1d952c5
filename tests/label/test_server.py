"""The page's server at HTTP: nothing lost or doubled, nothing told to whom it is not for, nothing that runs."""

import http.client
import json
import socket
import threading
from collections import Counter
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.choices.desk import LEASE, LEASES_PER_ADDRESS
from lm.choices.log import read_log
from lm.experiment import UserError
from lm.label.server import Server, answer
from lm.web import connections
from tests.label.label_rows import desk_of, questions

TOKEN = "a-token-of-the-test-0123"


class Client:
    """One person's connection."""

    def __init__(self, server: Server, name: str = "Ann", **headers: str):
        self.connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
        self.name, self.headers = name, headers

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str):
        sent = (
            {"Content-Type": "application/json", **self.headers, **headers}
            if body is not None
            else {**self.headers, **headers}
        )
        self.connection.request(method, path, body, sent)
        reply = self.connection.getresponse()
        return reply, reply.read()

    def post(self, action: str, **body):
        reply, said = self.ask("POST", f"/api/{action}", json.dumps({"name": self.name, **body}).encode())
        return reply.status, json.loads(said)


@contextmanager
def serving(folder, rows, token=None, host="localhost", **options):
    with desk_of(folder, rows, **options) as desk:
        server = Server(desk, host, 0, token)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
            server.server_close()


def work(server: Server, name: str, count: int, failed: list) -> None:
    client = Client(server, name)
    status, view = client.post("show")
    for number in range(count):
        if status != 200 or view["pair"] is None:
            failed.append((name, number, status, view))
            return
        choice = ("left", "right", "tie")[number % 3]
        status, view = client.post("choose", pair=view["pair"], choice=choice, strength=None, comment="")


# Whoever is done with 500 is shown one more, which is then kept for them: two pairs are there for that.
@pytest.mark.slow
@pytest.mark.parametrize("pairs, per_pair", [(1002, 1), (500, 2)])
def test_two_people_at_once_make_500_choices_each_and_nothing_is_lost_or_doubled(tmp_path, pairs, per_pair):
    failed: list = []
    with serving(tmp_path, questions(pairs), per_pair=per_pair) as server:
        people = [threading.Thread(target=work, args=(server, name, 500, failed)) for name in ("Ann", "Bob")]
        for person in people:
            person.start()
        for person in people:
            person.join()
        assert not failed
        assert Client(server, "Cy").post("show")[1]["pair"] is None
    records = read_log(tmp_path / "labels.jsonl").records
    assert [record["id"] for record in records] == list(range(1, 1001))
    assert Counter(record["annotator"] for record in records) == {"Ann": 500, "Bob": 500}
    assert len({(record["annotator"], record["pair"]) for record in records}) == 1000
    assert set(Counter(record["pair"] for record in records).values()) == {per_pair}


def test_a_choice_is_in_the_file_before_the_next_pair_comes(tmp_path):
    with serving(tmp_path, questions(3)) as server:
        client = Client(server)
        view = client.post("show")[1]
        for count in (1, 2, 3):
            view = client.post("choose", pair=view["pair"], choice="left", strength=2, comment="é")[1]
            records = read_log(tmp_path / "labels.jsonl").records
            assert len(records) == count and records[-1]["comment"] == "é"
        assert view["pair"] is None and view["progress"] == {"yours": 3, "done": 3, "total": 3, "left": 0}
        view = client.post("undo", of=view["last"]["id"])[1]
        assert view["pair"] == records[-1]["pair"] and view["last"]["id"] == 2


def test_an_answer_is_shown_as_text_and_never_says_whose_it_is(tmp_path):
    evil = "<script>alert(1)</script> <img src=x onerror=alert(1)> [a](javascript:alert(1)) ![b](http://x/y.png)"
    evil += "\n\n**bold**\x1b"
    rows = [{"prompt": evil, "answers": [evil, ""], "sources": ["secret-one", "secret-two"]}]
    with serving(tmp_path, rows) as server:
        _, view = Client(server).post("show")
    shown = view["left"] if view["left"]["text"] else view["right"]
    for part in (shown, view["prompt"][0]):
        assert "&lt;script&gt;" in part["html"] and "<strong>bold</strong>␛" in part["html"]
        assert not [tag for tag in ("<script", "<img", "<a ") if tag in part["html"]]
    assert "secret" not in json.dumps(view)


def test_every_reply_forbids_what_the_page_has_no_use_for(tmp_path):
    with serving(tmp_path, questions(1)) as server:
        client = Client(server)
        replies = [
            client.ask("GET", path)[0] for path in ("/", "/page.js", "/page.css", "/markdown.css", "/summary", "/none")
        ]
        replies.append(client.ask("POST", "/api/show", b"{}")[0])
    assert [reply.status for reply in replies] == [200] * 5 + [404, 409]
    for reply in replies:
        policy = reply.getheader("Content-Security-Policy")
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'") and "unsafe" not in policy
        assert reply.getheader("X-Content-Type-Options") == "nosniff"


@pytest.mark.parametrize(
    "body, headers, status",
    [
        (b"{broken", {}, 400),
        (b"[" * 60_000, {}, 400),
        (b"[1]", {}, 409),
        (b'{"name": ""}', {}, 409),
        (b'{"name": "Ann"}', {"Content-Type": "text/plain"}, 415),
        (b'{"name": "Ann"}', {"Origin": "http://elsewhere.example"}, 403),
        (b'{"name": "Ann"}', {"Host": "elsewhere.example"}, 403),
        (b'{"name": "Ann"}', {"Host": "["}, 403),
        (b'{"name": "Ann"}', {"Origin": "http://["}, 403),
        (b'{"name": "Ann"}', {"Content-Length": "99999999"}, 413),
    ],
)
def test_a_request_that_the_page_would_not_make_is_refused(tmp_path, body, headers, status):
    with serving(tmp_path, questions(1)) as server:
        reply, said = Client(server).ask("POST", "/api/show", body, **headers)
        assert reply.status == status and json.loads(said)["error"]
        for pair in ("none", ["none"], {}):
            assert Client(server).post("choose", pair=pair, choice="left")[0] == 409
        assert Client(server).post("fly")[0] == 404
    assert (tmp_path / "labels.jsonl").read_bytes() == b""


def test_other_machines_need_the_token_for_everything(tmp_path, capfd):
    with serving(tmp_path, questions(2), TOKEN, "0.0.0.0") as server:
        stranger = Client(server)
        wrong = (
            {},
            {"Cookie": f"lm-label-{server.server_port}=wrong"},
            {"Authorization": "Bearer wrong"},
            {"Cookie": "a=;b\x01;;="},
        )
        for headers in wrong:
            for path in (
                "/",
                "/page.js",
                "/markdown.css",
                "/summary",
                "/?token=wrong",
                f"/summary?token={TOKEN}",
                "/none",
            ):
                reply, said = stranger.ask("GET", path, **headers)
                assert (reply.status, "open the link" in said.decode()) == (401, True)
            assert stranger.ask("POST", "/api/show", b'{"name": "Ann"}', **headers)[0].status == 401

        reply, _ = stranger.ask("GET", f"/?token={TOKEN}")
        cookie = reply.getheader("Set-Cookie")
        assert reply.status == 303 and reply.getheader("Location") == "/"
        assert "HttpOnly" in cookie and "SameSite=Strict" in cookie
        friend = Client(server, Cookie=cookie.split(";")[0])
        assert friend.ask("GET", "/")[0].status == 200 and friend.post("show")[0] == 200
        assert Client(server, Authorization=f"Bearer {TOKEN}", Host="any.example").post("show")[0] == 200
    said = capfd.readouterr()
    assert TOKEN not in said.out + said.err
    assert TOKEN not in (tmp_path / "labels.jsonl").read_text("utf-8")


def test_a_server_for_other_machines_cannot_be_made_without_a_token(tmp_path):
    with desk_of(tmp_path, questions(1)) as desk, pytest.raises(ValueError, match="needs a token"):
        Server(desk, "0.0.0.0", 0, None)


def test_a_port_that_is_taken_is_named(tmp_path):
    with serving(tmp_path, questions(1)) as server:
        with pytest.raises(UserError, match=rf"port {server.server_port} is in use.*--port N"):
            Server(server.desk, "localhost", server.server_port)
        with pytest.raises(UserError, match=r"cannot serve on no\.such\.host\.invalid"):
            Server(server.desk, "no.such.host.invalid", 0, TOKEN)


def test_a_full_disk_is_told_and_the_choice_can_be_sent_again(tmp_path, small_disk, capfd):
    with serving(small_disk, questions(2)) as server:
        filler = small_disk / "filler"
        client = Client(server)
        view = client.post("show")[1]
        with pytest.raises(OSError), filler.open("wb", buffering=0) as stream:
            while True:
                stream.write(bytes(4096))
        given = {"pair": view["pair"], "choice": "left", "strength": None, "comment": "x" * 4000}
        status, said = client.post("choose", **given)
        assert (status, said["error"]) == (507, "not saved: No space left on device")
        filler.unlink()
        assert client.post("choose", **given)[0] == 200
    assert "labels.jsonl: No space left on device" in capfd.readouterr().err
    assert len(read_log(small_disk / "labels.jsonl").records) == 1


# ---- what is accepted can be read back -----------------------------------------------------------------------------

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 5) | st.integers() | st.floats() | st.text(max_size=8),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=8), inside, max_size=3),
    max_leaves=8,
)
KEYS = st.deferred(lambda: st.sampled_from(["PAIR", "OTHER"])) | PLAIN
BODIES = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from(["Ann", " Ann  B", "Zoe\u0308"]) | PLAIN,
        "pair": KEYS,
        "choice": st.sampled_from(["left", "right", "tie", "both bad", "skip"]) | PLAIN,
        "strength": st.sampled_from([None, 1, 2, 3, 1.0, 2.0, True, 3.5]) | PLAIN,
        "comment": st.sampled_from(["", "\ud800", "\u2028\r\n"]) | PLAIN,
        "of": st.sampled_from([1, 1.0, True, "1", 2, 3.0]) | PLAIN,
        "kind": PLAIN,
        "id": PLAIN,
    },
)


@settings(max_examples=150)
@given(st.lists(st.tuples(st.sampled_from(["show", "choose", "undo"]), BODIES | PLAIN), min_size=1, max_size=6))
def test_whatever_is_sent_is_refused_or_can_be_read_back(tmp_path_factory, requests):
    with desk_of(tmp_path_factory.mktemp("desk"), questions(2)) as desk:
        keys = dict(zip(("PAIR", "OTHER"), desk._pairs, strict=True))
        for action, body in requests:
            if isinstance(body, dict) and isinstance(body.get("pair"), str):
                body = body | {"pair": keys.get(body["pair"], body["pair"])}
            before = len(desk.records())
            reply = answer(desk, f"/api/{action}", json.dumps(body).encode(), "here")
            assert reply.status == 200 or (400 <= reply.status < 500 and json.loads(reply.body)["error"])
            records = read_log(desk.log.path).records
            assert records == desk.records() and len(records) - before <= (reply.status == 200)


@pytest.mark.parametrize("of", [1.0, True, "1", [1], None, {}, 10**30])
def test_only_the_number_of_a_choice_undoes_it(tmp_path, of):
    with desk_of(tmp_path, questions(2)) as desk:
        desk.choose("Ann", desk.show("Ann").pair.key, "left")
        with pytest.raises(UserError, match="choice"):
            desk.undo("Ann", of)
        with pytest.raises(UserError, match=r"the strength is 2\.0"):
            desk.choose("Ann", desk.show("Ann").pair.key, "left", 2.0)
        assert len(read_log(desk.log.path).records) == 1


# ---- nobody holds the server ---------------------------------------------------------------------------------------

SLOW = b"POST /api/show HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 60000\r\n"
FRIEND = {"Authorization": f"Bearer {TOKEN}"}


def held(server: Server, count: int, start: bytes) -> list[socket.socket]:
    found = []
    for _ in range(count):
        found.append(socket.create_connection(("127.0.0.1", server.server_port), timeout=30))
        found[-1].sendall(start)
    return found


def is_closed(one: socket.socket) -> bool:
    """Whether the server ends a connection without waiting for more of its request; fails if nothing comes for half a minute."""
    try:
        while one.recv(4096):
            pass
    except ConnectionError:
        pass
    return True


def test_without_the_token_no_body_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(connections, "REQUEST_SECONDS", 600.0)
    with serving(tmp_path, questions(1), TOKEN, "127.0.0.1") as server:
        (one,) = held(server, 1, SLOW + b"\r\n{")
        assert one.recv(4096).startswith(b"HTTP/1.1 401") and is_closed(one)


@pytest.mark.parametrize(
    "start", [b"", b"POST /api/show HTTP/1.1\r\nHost:", SLOW + f"Authorization: Bearer {TOKEN}\r\n\r\n{{".encode()]
)
def test_a_request_that_does_not_come_is_ended_whoever_sends_it(tmp_path, monkeypatch, start):
    monkeypatch.setattr(connections, "REQUEST_SECONDS", 1.0)
    with serving(tmp_path, questions(1), TOKEN, "127.0.0.1") as server:
        (one,) = held(server, 1, start)
        dripping = threading.Event()

        def drip():
            while not dripping.wait(0.2):
                try:
                    one.sendall(b" ")
                except OSError:
                    return

        thread = threading.Thread(target=drip)
        thread.start()
        assert is_closed(one)
        dripping.set()
        thread.join()
        assert Client(server, **FRIEND).post("show")[0] == 200


def test_slow_connections_take_a_bounded_number_of_threads_and_nobody_elses_turn(tmp_path, monkeypatch):
    monkeypatch.setattr(connections, "MOST_CONNECTIONS", 20)
    monkeypatch.setattr(connections, "REQUEST_SECONDS", 600.0)
    with serving(tmp_path, questions(2), TOKEN, "127.0.0.1") as server:
        friend = Client(server, **FRIEND)
        assert friend.post("show")[0] == 200
        slow = held(server, 60, b"POST /api/show HTTP/1.1\r\nHost:")
        assert Client(server, **FRIEND).post("show")[0] == 200
        assert len(server._open) <= 20
        connection = friend.connection.sock
        assert friend.post("show")[0] == 200 and friend.connection.sock is connection, "who may ask is not cut off"
        for one in slow:
            one.close()


def test_many_requests_at_once_are_all_answered(tmp_path):
    failed, answered = [], []

    def ask(server, place):
        for _ in range(20):
            try:
                answered.append(Client(server, f"n{place % 5}", **FRIEND).post("show")[0])
            except OSError as error:
                failed.append(error)

    with serving(tmp_path, questions(20), TOKEN, "127.0.0.1") as server:
        threads = [threading.Thread(target=ask, args=(server, place)) for place in range(50)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failed and answered == [200] * 1000


def test_one_address_does_not_keep_all_pairs_under_many_names(tmp_path):
    now = [0.0]
    with desk_of(tmp_path, questions(LEASES_PER_ADDRESS + 5), clock=lambda: now[0]) as desk:
        for place in range(100):
            now[0] += 1
            assert desk.show(f"n{place}", "far").pair is not None
        assert len(desk._leases) == LEASES_PER_ADDRESS and sum(map(len, desk._leases.values())) == LEASES_PER_ADDRESS
        assert len({desk.show(f"honest {place}", "near").pair.key for place in range(5)}) == 5
    with desk_of(tmp_path, questions(3), clock=lambda: now[0]) as desk:
        for place in range(4):
            now[0] += 1
            desk.show(f"n{place}", "far")
        pair = desk.show("honest", "near").pair
        assert pair is not None and desk.choose("honest", pair.key, "left", address="near").progress.yours == 1
        now[0] += LEASE + 1
        assert desk.show("n0", "far").pair is not None
