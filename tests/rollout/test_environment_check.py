"""`lm env check` finds each fault that an environment can have, and says which."""

import random
from pathlib import Path

import pytest

from lm.cli.main import main
from lm.rollout.environment_check import check_tasks

ROOT = Path(__file__).parents[2]
HERE = Path(__file__)


class Right:
    """1 for the secret."""

    columns = ("secret",)

    @staticmethod
    def solution(task):
        return [str(task["secret"])]

    def reset(self, task):
        self.secret = str(task["secret"])
        return [{"role": "user", "content": f"Say {self.secret}."}]

    def step(self, completion):
        self.said = completion

    def reward(self):
        return {"right": float(self.said == self.secret)}


class Unsolvable(Right):
    def reward(self):
        return {"right": 0.0}


class Generous(Right):
    def reward(self):
        return {"right": float(self.said == self.secret or len(self.said) > 1000)}


class Lenient(Right):
    def reward(self):
        return {"right": float(self.said.isdigit())}


class Random(Right):
    def reward(self):
        return {"right": float(self.said == self.secret) - random.random()}


class Raising(Right):
    def reward(self):
        return {"right": float(self.said.encode() == self.secret.encode())}


class NotFinite(Right):
    def reward(self):
        return {"right": float("nan") if not self.said else float(self.said == self.secret)}


class Endless(Right):
    def step(self, completion):
        self.said = completion
        while not completion:
            pass


class Overpaid(Right):
    def reward(self):
        return {"right": 2.0 * (self.said == self.secret)}


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "tasks.jsonl"
    file.write_text("".join(f'{{"secret": {number}, "key": "secret {number}"}}\n' for number in range(100)))
    return str(file)


def failed(name, data, heldout="", seconds=0.3):
    return {
        one.check: one.problem for one in check_tasks(f"{HERE}:{name}", data, heldout, 0.2, 10, seconds) if one.problem
    }


def test_a_right_environment_passes(data):
    assert failed("Right", data) == {}


@pytest.mark.parametrize(
    ("name", "check", "said"),
    [
        ("Unsolvable", "solvable", "10 of 10 known answers do not get the full reward 1"),
        ("Generous", "bad answers", "very long answer gets 1"),
        ("Lenient", "bad answers", "the answer to another task"),
        ("Random", "deterministic", "rewards of the same answer"),
        ("Raising", "bad answers", "UnicodeEncodeError"),
        ("NotFinite", "bad answers", "gave nan"),
        ("Endless", "bad answers", "took longer than 0.3 s"),
        ("Overpaid", "reward range", "above the full reward 1"),
    ],
)
def test_every_fault_is_found(data, name, check, said):
    found = failed(name, data)
    assert said in found[check] and "\n" not in found[check]


def test_a_held_out_task_that_is_trained_on_is_found(data):
    assert "10 of 100" not in failed("Right", data).get("leaks", "")
    assert failed("Right", data, data)["leaks"].startswith("100 of 100 held-out tasks are training tasks")


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["countdown", "--rows", "10"],
        ["calculator", "--rows", "10"],
        ["answer", "--rows", "10"],
        ["helpful", "--rows", "10"],
        [f"{ROOT}/experiments/guess_number.py:GuessNumber", "--data", f"{ROOT}/experiments/guess_number.jsonl"],
    ],
    ids=lambda words: words[0].rpartition(":")[2],
)
def test_what_is_built_in_passes(capsys, words):
    assert main(["env", "check", *words]) == 0
    assert "FAILED" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["check", "countdwn"], "no environment or verifier 'countdwn'"),
        (["check"], "takes the name of an environment"),
        (["check", f"{HERE}:Right"], "--data FILE"),
        (["check", f"{HERE}:Nothing"], "defines no 'Nothing'"),
        (["check", "countdown", "--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["chek", "countdown"], "invalid choice"),
    ],
)
def test_a_mistake_is_told_in_a_line(capsys, words, said):
    assert main(["env", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_failed_check_exits_with_2_after_the_table(capsys, data):
    assert main(["env", "check", f"{HERE}:Unsolvable", "--data", data]) == 2
    said = capsys.readouterr()
    assert "FAILED  solvable" in said.out and "time a call" in said.out and said.err.count("\n") == 1


def test_the_list_names_every_environment(capsys):
    assert main(["env", "list"]) == 0
    assert "search:FILE" in capsys.readouterr().out
