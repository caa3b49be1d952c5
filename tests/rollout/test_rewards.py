"""Rewards are finite numbers that come in time; anything else is named, or counted."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest

from lm.between_batches import calling_between_batches
from lm.data.workers import cores
from lm.experiment import UserError
from lm.rollout import rewards
from lm.rollout.rewards import compute_rewards
from lm.rollout.timed import TimedWorker
from lm.rollout.verifiers import VERIFIERS
from lm.user_functions import load_function

ROWS = [{"question": f"What is {n}?", "answer": str(n)} for n in range(4)]
COMPLETIONS = ["0", "1", "3", "3"]


def test_rewards_are_the_verifiers():
    found = compute_rewards("answer", ROWS, COMPLETIONS, "reason")
    np.testing.assert_array_equal(found.values, np.float32([1, 1, 0, 1]))
    assert found.values.dtype == np.float32
    assert found.timeouts == 0


@pytest.mark.parametrize(
    "bad", [float("nan"), float("inf"), -float("inf"), None, "1", [1.0], 1e38, np.float32("nan"), 10**400]
)
def test_what_is_no_finite_number_is_refused_by_name(monkeypatch, bad):
    monkeypatch.setitem(VERIFIERS, "mine", lambda row, completion: bad if completion == "3" else 1)
    with pytest.raises(
        UserError, match=r"reason: verifier 'mine' gave .* 'What is 2\?'; a reward is a number from -1e\+09 to 1e\+09"
    ):
        compute_rewards("mine", ROWS, COMPLETIONS, "reason")


@pytest.mark.parametrize("good", [True, 1, 1.0, np.float32(1), np.int64(1), np.bool_(True)])
def test_every_kind_of_number_is_a_reward(monkeypatch, good):
    monkeypatch.setitem(VERIFIERS, "mine", lambda row, completion: good)
    assert compute_rewards("mine", ROWS, COMPLETIONS, "reason").values.tolist() == [1.0] * 4


@pytest.mark.parametrize("error", [ValueError("no\nsandbox"), SystemExit(0), KeyError("x"), RecursionError()])
def test_what_a_verifier_raises_is_said_in_one_line(monkeypatch, error):
    def mine(row, completion):
        raise error

    monkeypatch.setitem(VERIFIERS, "mine", mine)
    with pytest.raises(UserError, match=f"raised {type(error).__name__}") as caught:
        compute_rewards("mine", ROWS, COMPLETIONS, "reason")
    assert "What is 0?" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_verifier_that_hangs_costs_its_limit_and_is_counted(monkeypatch):
    def mine(row, completion):
        while completion == "3":
            try:
                time.sleep(1)
            except Exception:
                continue
        return 1.0

    monkeypatch.setitem(VERIFIERS, "mine", mine)
    began = time.monotonic()
    found = compute_rewards("mine", ROWS, COMPLETIONS, "reason", seconds=0.2)
    assert found.values.tolist() == [1, 1, 0, 0]
    assert found.timeouts == 2
    assert time.monotonic() - began < 30


@pytest.mark.slow
def test_a_verifier_of_a_file_is_killed_where_it_hangs_and_goes_on(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import os\n"
        "def score(row, completion):\n"
        "    while row['answer'] == '1':\n"
        "        pass\n"
        "    if row['answer'] == '2':\n"
        "        os._exit(0)\n"
        "    return float(row['answer'] == completion)\n"
    )
    name = f"{tmp_path}/mine.py:score"
    found = compute_rewards(name, [ROWS[0], ROWS[1], ROWS[3]], ["0", "1", "3"], "reason", seconds=2.0)
    assert found.values.tolist() == [1, 0, 1]
    assert found.timeouts == 1
    with pytest.raises(UserError, match="the process that ran it ended"):
        compute_rewards(name, [ROWS[2]], ["2"], "reason", seconds=2.0)


def test_a_worker_that_replaces_a_killed_one_does_without_jax():
    """Importing it takes a second, which every late reward would cost besides its limit."""
    worker = rewards._workers()[0]
    assert worker.call(eval, "'lm.rollout.verifiers' in __import__('sys').modules", seconds=60).value
    assert not worker.call(eval, "'jax' in __import__('sys').modules", seconds=60).value


def test_what_a_timed_call_has_started_ends_with_it_and_ctrl_c_reaches_neither(tmp_path):
    worker, started = TimedWorker(), tmp_path / "started"
    try:
        assert worker.call(os.getsid, 0, seconds=60).value != os.getsid(0)
        assert worker.call(os.system, f"sleep 60 & echo $! > {started}; wait", seconds=2).timed_out
        sleeper = Path(f"/proc/{int(started.read_text())}/stat")
        until = time.monotonic() + 20
        while time.monotonic() < until and sleeper.exists() and sleeper.read_text().split()[2] != "Z":
            time.sleep(0.05)
        assert not sleeper.exists() or sleeper.read_text().split()[2] == "Z"
    finally:
        worker.close()


class Stopped(Exception):
    pass


@pytest.mark.parametrize("kind", ["a built-in verifier", "one of a file", "one that waits for others"])
def test_a_signal_is_not_kept_waiting_by_slow_verifiers(tmp_path, monkeypatch, kind):
    mine, calls = tmp_path / "mine.py", tmp_path / "calls"
    mine.write_text(
        f"import time\ndef score(row, completion):\n    open({str(calls)!r}, 'a').write('x')\n    time.sleep(0.5)\n    return 1.0\n"
    )
    score = load_function(f"{mine}:score", "verifier")
    name = f"{mine}:score" if kind == "one of a file" else "mine"
    monkeypatch.setitem(VERIFIERS, "mine", score)
    monkeypatch.setattr(rewards, "IN_THREADS", ("mine",) if kind == "one that waits for others" else ())
    monkeypatch.setattr(rewards, "THREADS", 2)

    def check():
        if calls.exists():
            raise Stopped

    with calling_between_batches(check), pytest.raises(Stopped):
        compute_rewards(name, ROWS * 25, COMPLETIONS * 25, "reason")
    assert len(calls.read_text()) <= 2 * max(2, cores())
