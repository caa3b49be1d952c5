"""Reward by a language model behind an OpenAI-compatible endpoint, recorded so that a resumed run gets the same rewards.

The verifier `endpoint:FILE` reads a JSON file with `url` (up to /v1), `model`, `prompt` (with {prompt}, {completion} and columns of the
row in braces) and `most`, the score that is worth 1. The score is the last number of the reply. A request that fails is
sent again, and one that has not succeeded within `reward_seconds` counts as a reward that took too long.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.client
import json
import math
import os
import re
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

from lm.config.field import UserError, shown
from lm.data.chat import prompt_messages
from lm.json_lines import JsonLines, read_json_lines
from lm.rollout.timed import TookTooLong, seconds_left
from lm.stored import read_json

FIELDS = {"url": str, "model": str, "prompt": str, "most": int | float}
OPTIONAL = {"key_variable": str}  # the environment variable with the API key, which is sent and never stored
FIRST_WAIT, LONGEST_WAIT = 0.25, 8.0  # seconds between attempts, doubled after each
LONGEST_REPLY = 16 << 20  # bytes of a response
# Down, overloaded, not a server of HTTP, cut off, or no such reply.
FAILURES = (OSError, http.client.HTTPException, ValueError, LookupError, TypeError, RecursionError)
NAME = re.compile(r"\{(\w+)\}")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


class JudgeRecord:
    """The replies of a stage's judge by request and step, in a JSON-lines file; a request that failed is recorded as null."""

    def __init__(self, folder: Path, process: int = 0):
        self._lock = threading.Lock()
        # Those of all processes: after a resume with other processes, another one may judge an answer. A file that is gone has
        # left its checksums; to open it comes last, since that writes them anew.
        files = sorted({folder / path.name.removesuffix(".crc32") for path in folder.glob("judge-*.jsonl*")})
        self._replies: dict[str, dict[int, str | None]] = {}
        self._asked: dict[str, Future[str | None]] = {}  # requests that wait for their reply
        for path in files:
            for _, line in read_json_lines(path, {"request": str}):
                reply = _recorded_reply(path, line.get("reply", ""))
                self._replies.setdefault(line["request"], {})[_recorded_step(path, line.get("step", 0))] = reply
        self._file = JsonLines(folder / f"judge-{process}.jsonl")

    def at(self, step: int) -> StepRecord:
        """The record as the rollout of a step reads it and adds to it."""
        return StepRecord(self, step)

    def reply(self, request: str, step: int, ask: Callable[[], str | None]) -> str | None:
        """The recorded reply, else that of `ask`, which is then recorded; equal requests at the same time are asked once.

        A step finds what it recorded itself, failures too, and the replies of earlier steps, but not their failures: a resumed
        run then gets the rewards that it had, and a judge that was down is asked again at the next step.
        """
        with self._lock:
            known = self._replies.get(request, {})
            earlier = [reply for at, reply in known.items() if at < step and reply is not None]
            if step in known or earlier:
                return known[step] if step in known else earlier[-1]
            waiting = self._asked.get(request)
            if waiting is None:
                mine = self._asked[request] = Future()
        if waiting is not None:
            return waiting.result()
        try:
            mine.set_result(ask())
        except BaseException as error:
            mine.set_exception(error)
            raise
        finally:
            with self._lock:
                del self._asked[request]
                if not mine.exception():
                    self._add(request, step, mine.result())
        return mine.result()

    def _add(self, request: str, step: int, reply: str | None) -> None:
        self._replies.setdefault(request, {})[step] = reply
        self._file.append([json.dumps({"request": request, "step": step, "reply": reply}).encode()])


class StepRecord(NamedTuple):
    """The replies of a judge, as the rollout of one step reads them and adds to them."""

    record: JudgeRecord
    step: int

    def reply(self, request: str, ask: Callable[[], str | None]) -> str | None:
        """`JudgeRecord.reply` at this step."""
        return self.record.reply(request, self.step, ask)


def _recorded_step(path: Path, step: Any) -> int:
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise UserError(f"{path} has the step {shown(step)}; remove that line, and the judge is asked again")
    return step


def _recorded_reply(path: Path, reply: Any) -> str | None:
    """A reply of the record: null, or a text that has a number."""
    if reply is not None and not (isinstance(reply, str) and NUMBER.search(reply)):
        raise UserError(
            f"{path} has the reply {shown(reply)}, which has no score; remove that line, and the judge is asked again"
        )
    return reply


_call = threading.local()  # `record`: of the call that a thread is making


@contextlib.contextmanager
def recorded_in(record: StepRecord | None) -> Iterator[None]:
    """Context of a call whose replies are read from a record, and added to it."""
    _call.record = record
    try:
        yield
    finally:
        _call.record = None


def endpoint(file: str) -> Callable[[Mapping[str, Any], str], float]:
    """The verifier `endpoint:FILE`: the judge's score divided by `most`, from 0 to 1.

    Raises:
        UserError: the file is missing or lacks a field.
    """
    judge = _read(file)

    def score(row: Mapping[str, Any], completion: str) -> float:
        body = _body(judge, row, completion)
        request = hashlib.sha256(body).hexdigest()
        kept: StepRecord | None = getattr(_call, "record", None)
        ask = functools.partial(_reply, judge, body)
        reply = kept.reply(request, ask) if kept else ask()
        if reply is None:
            raise TookTooLong
        return max(0.0, min(1.0, float(NUMBER.findall(reply)[-1]) / judge["most"]))

    return score


def prompt_columns(file: str) -> tuple[str, ...]:
    """The columns that the judge's prompt names in braces."""
    names = dict.fromkeys(NAME.findall(_read(file)["prompt"]))
    return tuple(name for name in names if name not in ("prompt", "completion"))


def _read(file: str) -> dict[str, Any]:
    judge = read_json(Path(file))
    known = FIELDS | OPTIONAL
    right = isinstance(judge, dict) and FIELDS.keys() <= judge.keys() <= known.keys()
    if (
        not right
        or not all(isinstance(value, known[name]) for name, value in judge.items())
        or not _is_most(judge["most"])
    ):
        raise UserError(
            f"endpoint:{file} is {shown(judge)}; it should have {', '.join(FIELDS)} (above 0), and may have {', '.join(OPTIONAL)}"
        )
    if not _is_url(judge["url"]):
        raise UserError(f"endpoint:{file}: url is {shown(judge['url'])}; it should be as http://HOST:PORT/v1")
    if not re.fullmatch(r"\w+", judge.get("key_variable", "_"), re.ASCII):
        raise UserError(
            f"endpoint:{file}: key_variable is {shown(judge['key_variable'])}; it should be the name of a variable"
        )
    if not re.fullmatch(r"[!-~]*", os.environ.get(judge.get("key_variable", ""), "")):
        raise UserError(
            f"endpoint:{file}: the variable {judge['key_variable']} is no key: it has spaces, line ends or letters outside ASCII"
        )
    return judge


def _is_url(url: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(url)
        return bool(re.fullmatch(r"https?://[!-~]+", url) and parts.hostname and parts.port != 0)
    except ValueError:
        return False


def _is_most(most: Any) -> bool:
    return not isinstance(most, bool) and 0 < most < math.inf


def _body(judge: Mapping[str, Any], row: Mapping[str, Any], completion: str) -> bytes:
    values = {**row, "prompt": prompt_messages(row, "the prompt")[-1]["content"], "completion": completion}
    text = NAME.sub(lambda match: str(values.get(match[1], match[0])), judge["prompt"])
    asked = {"model": judge["model"], "temperature": 0, "messages": [{"role": "user", "content": text}]}
    return json.dumps(asked, sort_keys=True).encode()


def _content(response: http.client.HTTPResponse) -> bytes:
    """The body of a response. Raises ValueError if it has not ended in time, or is longer than LONGEST_REPLY."""
    parts = bytearray()
    while part := response.read1(1 << 16):
        parts += part
        if len(parts) > LONGEST_REPLY or seconds_left() <= 0:
            raise ValueError("the reply does not end")
    return bytes(parts)


def _reply(judge: Mapping[str, Any], body: bytes) -> str | None:
    """The judge's reply, which has a number; None if no attempt succeeded in time."""
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(judge.get("key_variable", "")):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(f"{judge['url'].rstrip('/')}/chat/completions", body, headers)
    wait = FIRST_WAIT
    while (left := seconds_left()) > 0:
        try:
            with urllib.request.urlopen(request, timeout=min(left, 3600.0)) as response:
                text = json.loads(_content(response))["choices"][0]["message"]["content"]
            if NUMBER.search(text):
                return text
        except FAILURES:  # asked again
            pass
        time.sleep(max(0.0, min(wait, seconds_left())))
        wait = min(2 * wait, LONGEST_WAIT)
    return None
