"""`lm env check` finds each fault that an environment can have, and says which."""

import contextlib
import random
import time
from pathlib import Path

import pytest

from lm.cli.main import main
from lm.experiment import UserError
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


class CatchesEverything(Right):
    def step(self, completion):
        self.said = completion
        with contextlib.suppress(BaseException):
            time.sleep(10)


class GoesOn(Right):
    def step(self, completion):
        self.said = completion
        return [{"role": "user", "content": "And again?"}]


class Overpaid(Right):
    def reward(self):
        return {"right": 2.0 * (self.said == self.secret)}


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "tasks.jsonl"
    file.write_text("".join(f'{{"secret": {number}, "key": "secret {number}"}}\n' for number in range(100)))
    return str(file)


def failed(name, data, heldout="", seconds=30.0):
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
        ("CatchesEverything", "solvable", "took longer than 0.3 s"),
        ("GoesOn", "solvable", "after the last turn of a known answer, '45', the episode goes on"),
        ("Overpaid", "reward range", "above the full reward 1"),
    ],
)
def test_every_fault_is_found(data, name, check, said):
    found = failed(name, data, seconds=0.3 if "0.3 s" in said else 30.0)
    assert said in found[check] and "\n" not in found[check]


FAULTY = [
    ("columns = ('missing',)", "needs the column missing"),
    ("tools = ('calc',)", "whose tools is ('calc',); it should be a tuple of Tool values"),
    ("unrewarded = 'right'", "whose unrewarded is 'right'; it should be a tuple of names of rewards"),
    ("full_reward = float('nan')", "whose full_reward is nan; it should be a finite number"),
    ("solution = '84'", "whose solution is '84'; it should be a function"),
    ("solution = lambda self, task: ['84']", "solution(task) raised TypeError"),
    ("solution = staticmethod(lambda task: task['x'])", "solution(task) raised KeyError: 'x'"),
    ("solution = staticmethod(lambda task: [x for x in iter(int, 1)])", "solution(task) took longer than 0.3 s"),
    ("solution = staticmethod(lambda task: '84')", "solution(task) gave '84'"),
    ("solution = staticmethod(lambda task: [84])", "solution(task) gave [84]"),
]


@pytest.mark.parametrize(("line", "said"), FAULTY)
def test_an_attribute_that_cannot_be_used_is_told_in_a_line(data, tmp_path, line, said):
    file = tmp_path / "faulty.py"
    file.write_text(f"from tests.rollout.test_environment_check import Right\n\nclass Faulty(Right):\n    {line}\n")
    with pytest.raises(UserError) as told:
        list(check_tasks(f"{file}:Faulty", data, "", 0.2, 3, 0.3))
    assert said in str(told.value) and "\n" not in str(told.value)


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
