"""The judge behind an endpoint: its score is the reward, failures are retried and counted, replies are recorded and replayed."""

from __future__ import annotations

import contextlib
import json
import socketserver
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lm.data.bad_rows import BadRow, check_columns
from lm.experiment import UserError
from lm.rollout.endpoint_judge import JudgeRecord
from lm.rollout.rewards import compute_rewards
from lm.rollout.verifiers import find_verifier, needed_columns

ROWS = [{"question": f"What is {n}?", "answer": str(n)} for n in range(3)]


class Judge(BaseHTTPRequestHandler):
    """Scores a completion by its length; answers `failures` requests with an error first."""

    failures = 0
    reply = "I give {} of 10. Score: {}"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((body, self.headers.get("Authorization")))
        failed = len(self.server.asked) <= self.server.failures
        text = body["messages"][0]["content"]
        content = self.server.reply.format(1, len(text.rpartition("|")[2]))
        data = json.dumps({"choices": [{"message": {"content": content}}]}).encode()
        self.send_response(503 if failed else 200)
        self.end_headers()
        self.wfile.write(b"busy" if failed else data)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Judge) as found:
        found.asked, found.failures, found.reply = [], 0, Judge.reply
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield found
        found.shutdown()


@pytest.fixture
def name(server, tmp_path):
    judge = {
        "url": f"http://127.0.0.1:{server.server_port}/v1",
        "model": "big",
        "most": 10,
        "key_variable": "JUDGE_KEY",
    }
    (tmp_path / "judge.json").write_text(
        json.dumps(judge | {"prompt": "Rate {prompt} ({answer}, {other}):|{completion}"})
    )
    return f"endpoint:{tmp_path}/judge.json"


def test_the_score_of_the_reply_is_the_reward(server, name, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    found = compute_rewards(name, ROWS, ["a" * 5, "", "a" * 40], "reason")
    assert found.values.tolist() == pytest.approx([0.5, 0, 1])
    body, key = next(one for one in server.asked if "aaaaa" in str(one) and "a" * 40 not in str(one))
    assert body["messages"][0]["content"] == "Rate What is 0? (0, {other}):|aaaaa"
    assert (body["model"], body["temperature"], key) == ("big", 0, "Bearer secret")


def test_the_columns_that_the_prompt_of_a_judge_names_are_needed(name):
    check_columns({"answer": 1, "other": "x"}, needed_columns(name), "row 1")
    with pytest.raises(BadRow, match="row 1: the verifier needs the column other"):
        check_columns({"answer": 1}, needed_columns(name), "row 1")


def test_a_judge_that_fails_is_asked_again(server, name):
    server.failures = 2
    assert compute_rewards(name, ROWS[:1], ["aaa"], "reason").values.tolist() == pytest.approx([0.3])
    assert len(server.asked) == 3


@pytest.mark.parametrize("trouble", ["down", "no number"])
def test_a_judge_that_never_answers_is_counted(server, name, trouble):
    if trouble == "down":
        server.failures = 1000
    else:
        server.reply = "I cannot say."
    found = compute_rewards(name, ROWS, ["a", "b", "c"], "reason", seconds=3.0)
    assert found.late.tolist() == [True] * 3
    assert len(server.asked) >= 6


def sent(body: bytes, length: int | None = None) -> list[bytes]:
    return [b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (len(body) if length is None else length), body]


REPLY = json.dumps({"choices": [{"message": {"content": "Score: 7"}}]}).encode()
TROUBLE = {
    "no HTTP": [b"SSH-2.0-OpenSSH_9\r\n"],
    "closed": [b""],
    "cut body": sent(REPLY[:20], 500),
    "cut chunk": [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nabc"],
    "half a JSON": sent(REPLY[:20]),
    "long header": [b"HTTP/1.1 200 OK\r\nA: " + b"x" * 70_000],
    "redirect to no port": [b"HTTP/1.1 302 F\r\nLocation: http://h:zz/\r\nContent-Length: 0\r\n\r\n"],
    "content that is no text": sent(b'{"choices":[{"message":{"content":{"a":3}}}]}'),
    "a byte at a time": [*sent(b"", 1000), *[b" "] * 100],
    "no end": [b"HTTP/1.1 200 OK\r\n\r\n", *[b"[1," * 10**6] * 100],
}


@pytest.mark.parametrize("trouble", TROUBLE)
@pytest.mark.parametrize("recovers", [False, True])
def test_a_reply_that_is_none_is_asked_again_then_counted(tmp_path, trouble, recovers):
    asked = []

    class Bytes(socketserver.BaseRequestHandler):
        def handle(self):
            self.request.recv(65536)
            asked.append(trouble)
            with contextlib.suppress(OSError):  # the judge's client has gone
                for part in sent(REPLY) if recovers and len(asked) > 1 else TROUBLE[trouble]:
                    self.request.sendall(part)
                    time.sleep(0.1 * (part == b" "))

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Bytes) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        (tmp_path / "judge.json").write_text(described(url=f"http://127.0.0.1:{server.server_address[1]}/v1"))
        endless = trouble == "a byte at a time"  # which takes the whole limit at the first attempt
        seconds, start = 5.0 if recovers and not endless else 1.0, time.monotonic()
        found = compute_rewards(f"endpoint:{tmp_path}/judge.json", ROWS[:1], ["a"], "reason", seconds=seconds)
        server.shutdown()
    assert time.monotonic() - start < seconds + 8  # a byte at a time would take ten
    succeeds = recovers and not endless
    assert found.late.tolist() == [not succeeds] and found.values[0] == pytest.approx(0.7 * succeeds)
    assert len(asked) >= 1 + (not endless and trouble != "no end")


def test_a_key_that_cannot_be_sent_is_refused_and_not_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret\n")
    (tmp_path / "judge.json").write_text(described(key_variable="JUDGE_KEY"))
    with pytest.raises(UserError, match="the variable JUDGE_KEY is no key: it has spaces, line ends") as caught:
        find_verifier(f"endpoint:{tmp_path}/judge.json", "reason.objective.verifier")
    assert "secret" not in str(caught.value)


def test_replies_are_replayed_and_failures_too(server, name, tmp_path):
    record = JudgeRecord(tmp_path).at(3)
    first = compute_rewards(name, ROWS, ["a", "bb", "ccc"], "reason", record=record)
    server.failures = 1000
    missing = compute_rewards(name, ROWS[:1], ["dddd"], "reason", seconds=0.5, record=record)
    server.shutdown()
    asked, again = len(server.asked), JudgeRecord(tmp_path, 1).at(3)
    assert (
        compute_rewards(name, ROWS, ["a", "bb", "ccc"], "reason", record=again).values.tolist() == first.values.tolist()
    )
    assert (
        missing.late.tolist()
        == compute_rewards(name, ROWS[:1], ["dddd"], "reason", record=again).late.tolist()
        == [True]
    )
    assert len(server.asked) == asked
    assert "secret" not in (tmp_path / "judge-0.jsonl").read_text()


def test_a_judge_that_was_down_is_asked_again_at_the_next_step(server, name, tmp_path):
    record = JudgeRecord(tmp_path)
    server.failures = 1000
    assert compute_rewards(name, ROWS[:1], ["dddd"], "reason", seconds=0.5, record=record.at(3)).timeouts == 1
    server.failures = 0
    later = compute_rewards(name, ROWS[:1], ["dddd"], "reason", record=record.at(4))
    assert later.values.tolist() == pytest.approx([0.4])
    # A run that is resumed at step 3 gets what each step had.
    asked, resumed = len(server.asked), JudgeRecord(tmp_path, 1)
    for step, values in ((3, [0.0]), (4, [0.4]), (5, [0.4])):
        found = compute_rewards(name, ROWS[:1], ["dddd"], "reason", record=resumed.at(step))
        assert found.values.tolist() == pytest.approx(values)
    assert len(server.asked) == asked


def test_equal_requests_of_a_step_are_asked_once(server, name, tmp_path):
    found = compute_rewards(name, ROWS[:1] * 20, ["aaa"] * 20, "reason", record=JudgeRecord(tmp_path).at(0))
    assert found.values.tolist() == pytest.approx([0.3] * 20) and len(server.asked) == 1


def described(**fields) -> str:
    return json.dumps({"url": "http://here/v1", "model": "m", "prompt": "p", "most": 10} | fields)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"url": 1}',
        "[" * 100_000,
        "\udcff",
        described(most=0),
        described(most=True),
        described(most=float("nan")),
        described(most=float("inf")),
        described(url="u"),
        described(url="ftp://here"),
        described(url="http://[here"),
        described(url="http://:80"),
        described(url="http://here:zz"),
        described(url="http://here:99999"),
        described(url="http://here:0"),
        described(key_variable="\ud800"),
        described(more=1),
    ],
)
def test_a_file_that_describes_no_judge_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "judge.json").write_text(content, errors="surrogateescape")
    with pytest.raises(UserError, match=r"reason\.objective\.verifier is 'endpoint:.*judge\.json") as caught:
        find_verifier(f"endpoint:{tmp_path}/judge.json", "reason.objective.verifier")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("left", [None, 0, 1])
def test_replies_that_are_gone_are_told_before_the_judge_is_asked_again(tmp_path, left):
    record = JudgeRecord(tmp_path)
    for request in ("a", "b"):
        record.at(0).reply(request, lambda: "7")
    file = tmp_path / "judge-0.jsonl"
    kept = file.read_bytes().splitlines(keepends=True)[:left]
    file.unlink()
    if left is not None:
        file.write_bytes(b"".join(kept))
    with pytest.raises(UserError, match=r"judge-0\.jsonl:\d is gone: 2 lines were written"):
        JudgeRecord(tmp_path)


@pytest.mark.parametrize("step", ["-1", "true", '"1"', "null", "1.5"])
def test_a_recorded_step_that_is_none_is_refused(tmp_path, step):
    (tmp_path / "judge-0.jsonl").write_text(f'{{"request": "a", "step": {step}, "reply": "7"}}\n')
    with pytest.raises(UserError, match=r"judge-0\.jsonl has the step .*; remove that line"):
        JudgeRecord(tmp_path)


@pytest.mark.parametrize("reply", ['"no number"', "7", "[]", "{}", '""'])
def test_a_recorded_reply_without_a_score_is_refused(tmp_path, reply):
    (tmp_path / "judge-0.jsonl").write_text(f'{{"request": "a", "reply": {reply}}}\n')
    with pytest.raises(UserError, match=r"judge-0\.jsonl has the reply .*, which has no score; remove that line"):
        JudgeRecord(tmp_path)
