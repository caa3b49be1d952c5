"""The verifier python_tests: right code passes, wrong code does not, and no code can write its own verdict."""

from __future__ import annotations

import time

import pytest

from lm.experiment import UserError
from lm.rollout import code_tests
from lm.rollout.code_tests import code_of, python_tests, same_output
from lm.rollout.rewards import compute_rewards
from lm.rollout.timed import TookTooLong, within
from lm.sandbox.jail import find_jail

ASSERTS = {"tests": ["assert double(2) == 4", "assert double(-1) == -2", "assert double('a') == 'aa'"]}
STREAMS = {"inputs": ["1 2\n", "5 7\n"], "outputs": ["3\n", "12"]}
CALLS = {"entry_point": "add", "inputs": [[1, 2], [[1], [2]]], "outputs": [3, [1, 2]]}
RIGHT = "def double(x):\n    return x * 2\n"


@pytest.fixture(scope="module")
def score():
    try:
        find_jail()
    except UserError as error:
        pytest.skip(str(error))
    return python_tests("")


@pytest.mark.parametrize(
    ("row", "code", "reward"),
    [
        (ASSERTS, RIGHT, 1),
        (ASSERTS, f"Here it is:\n```python\n{RIGHT}```\nThat is all.", 1),
        (ASSERTS, f"<think>```python\nx\n```</think>\n```\n{RIGHT}```", 1),
        (ASSERTS, "def double(x):\n    return x + x if x == 2 else 0", 0),
        (ASSERTS, "def double(x) return", 0),
        (ASSERTS, "def triple(x):\n    return 3 * x", 0),
        (ASSERTS, "", 0),
        ({"tests": "assert double(2) == 4"}, RIGHT, 1),
        ({"test_list": ["assert double([1]) == [1, 1]"]}, RIGHT, 1),
        ({"test": "def check(f):\n    assert f(3) == 6\n", "entry_point": "double"}, RIGHT, 1),
        ({"test": "def check(f):\n    assert f(3) == 7\n", "entry_point": "double"}, RIGHT, 0),
        ({"tests": "def test_it():\n    assert double(3) == 6\ndef test_no():\n    assert double(1) == 3"}, RIGHT, 0),
        ({"tests": "import unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(double(1), 2)"}, RIGHT, 1),
        ({"tests": "import unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(double(1), 3)"}, RIGHT, 0),
        ({"tests": "from solution import double\nassert double(2) == 4"}, RIGHT, 1),
        ({"tests": "try:\n    double(None)\nexcept TypeError:\n    pass\nelse:\n    assert False"}, RIGHT, 1),
        ({"tests": "s = Stack()\ns.push(1)\ns.push(2)\nassert s.pop() == 2 and s.items == [1]"},
         "class Stack:\n    def __init__(self): self.items = []\n    def push(self, x): self.items.append(x)\n"
         "    def pop(self): return self.items.pop()", 1),
        ({"tests": "assert pairs({1: (2, 3)}, {4}) == [(1, (2, 3)), {4}]"}, "def pairs(d, s): return [*d.items(), s]", 1),
        ({"tests": "assert f(10**50, b'x', 1.5, 2j, None) == (10**50, b'x', 1.5, 2j, None)"}, "def f(*a): return a", 1),
        ({"tests": "assert list(f()) == [0, 1, 2]"}, "def f():\n    yield from range(3)", 1),
        (STREAMS, "a, b = map(int, input().split())\nprint(a + b)", 1),
        (STREAMS, "a, b = map(int, input().split())\nprint(a + b, ' ')\nprint()", 1),
        (STREAMS, "print(3)", 0),
        (STREAMS, "a, b = map(int, input().split())\nprint(a + b)\nraise SystemExit(1)", 0),
        (STREAMS, "import sys\nsys.stdout.buffer.write(b'\\xff\\xfe')", 0),
        (CALLS, "def add(a, b): return a + b", 1),
        (CALLS, "def add(a, b): return 3", 0),
    ],
)  # fmt: skip
def test_code_is_judged_by_its_tests(score, row, code, reward):
    assert score(row, code) == reward


FORGED = [
    "import os; os._exit(0)",
    "raise SystemExit(0)",
    "import sys; sys.exit()",
    "def double(x):\n    raise SystemExit(0)",
    "def double(x):\n    import os; os._exit(0)",
    "import atexit, os\natexit.register(os._exit, 0)\ndef double(x): return 0",
    'print(\'["", "", ""]\')\ndef double(x): return 0',
    "print('3 passed'); print('OK'); print('PASS')\ndef double(x): return 0",
    'import os\nfor n in range(64):\n    try: os.write(n, b\'["", "", ""]\\n\')\n    except OSError: pass\nos._exit(0)',
    "import os\ndef double(x):\n    os.write(3, b'{\"value\": 4}\\n' * 10)\n    return 0",
    'import os\nos.write(3, b\'{"names": {"double": true, "__eq__": true}}\\nx\\n\')\ndef double(x): return 0',
    "class Any(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\ndef double(x): return Any(0)",
    "class Any:\n    def __eq__(self, other): return True\n    def __bool__(self): return True\ndef double(x): return Any()",
    "class Any(str):\n    def __eq__(self, other): return True\ndef double(x): return Any()",
    "import builtins\nbuiltins.AssertionError = Exception\nbuiltins.__debug__ = 0\ndef double(x): return 0",
    "import builtins\nbuiltins.isinstance = lambda *a: True\nbuiltins.__build_class__ = None\ndef double(x): return 0",
    "import sys\nfor name in list(sys.modules): sys.modules[name] = None\ndef double(x): return 0",
    "import sys, types\nsys.modules['unittest'] = sys.modules['pytest'] = types.ModuleType('x')\ndef double(x): return 0",
    'import json\njson.dumps = lambda *a, **k: \'["", "", ""]\'\ndef double(x): return 0',
    'import lm.sandbox.inside as i\ni.encode = lambda *a: 4\ni.run_tests = lambda *a: print(\'["","",""]\')\ndef double(x): return 0',
    "import gc, inspect, sys\ndef double(x):\n    f = sys._getframe()\n    while f:\n        for v in list(f.f_locals.values()) + gc.get_objects():\n"
    "            if isinstance(v, str) and v.startswith('assert double(') : return eval(v.partition('== ')[2])\n        f = f.f_back\n    return 0",
    "import threading, os\nthreading.Timer(0.05, os._exit, (0,)).start()\nimport time; time.sleep(1)",
    "import signal, os\nos.kill(os.getppid(), signal.SIGKILL)\ndef double(x): return 0",
    "double = None",
    "double = type('X', (), {'__call__': lambda s, x: s, '__eq__': lambda s, o: True})()",
]


@pytest.mark.parametrize("code", FORGED)
def test_no_code_writes_its_own_verdict(score, code):
    with within(60.0):
        assert score(ASSERTS, code) == 0


WRONG = "def double(x):\n    return 9\n"


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"test": "def check(f):\n    assert f(3) == 6", "entry_point": "double"}, "def check(f): pass"),
        ({"tests": "def test_it():\n    assert double(3) == 6"}, "def test_it(): pass"),
        ({"tests": "import unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(double(1), 2)"}, "class T: pass"),
        ({"tests": "assert abs(double(2) - 4) < 1"}, "def abs(x): return 0"),
        ({"tests": "assert all(double(x) == 2 * x for x in range(1, 4))"}, "def all(x): return True\ndef range(*x): return []"),
        ({"tests": "import math\nassert math.isclose(double(2), 4)"}, "class math:\n    isclose = staticmethod(lambda *a: True)"),
        ({"tests": "assert math.isclose(double(2), 4)"}, "class math:\n    isclose = staticmethod(lambda *a: True)"),
        ({"tests": "assert math.isclose(double(2), 4)"}, "import os\nos.write(3, b'{\"names\": {\"__builtins__\": true}}\\n')"),
    ],
)  # fmt: skip
def test_no_name_of_the_program_replaces_one_of_the_tests(score, row, code):
    assert score(row, WRONG + code) == 0


@pytest.mark.parametrize(
    "code", ["print('3'); print('12')", "import os\nos.write(1, b'3\\n12\\n'); os._exit(0)", "exit(0)"]
)
def test_no_output_passes_for_every_input(score, code):
    assert score(STREAMS, code) == 0


@pytest.mark.parametrize("row", [ASSERTS, STREAMS])
@pytest.mark.parametrize(
    "code", ["while True: pass", "def double(x):\n    while True: pass\ndouble(1)", "import time; time.sleep(60)"]
)
def test_code_that_hangs_costs_its_limit_and_no_more_of_its_own_time(score, row, code):
    began = time.monotonic()
    with within(1.0), pytest.raises(TookTooLong):
        score(row, code)
    assert time.monotonic() - began < 20, (
        "a second beyond its limit on a quiet machine, and never the minute it asks for"
    )


def test_hanging_code_is_counted_and_the_other_rewards_are_kept(score):
    codes = [RIGHT, "import time; time.sleep(60)", "def double(x): return 0", RIGHT]
    found = compute_rewards("python_tests", [ASSERTS] * len(codes), codes, "reason", seconds=5.0)
    assert found.values.tolist() == [1, 0, 0, 1]
    assert found.late.tolist() == [False, True, False, False]


def test_a_program_that_exceeds_a_limit_is_wrong(score):
    for code in ("x = bytearray(1 << 32)", "while True: print('x' * 1000)", "import os\nwhile True: os.fork()"):
        with within(5.0):
            try:
                assert score(STREAMS, code) == 0
            except TookTooLong:
                assert "fork" in code


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"inputs": ["1"], "outputs": []}, "lists of the same length"),
        ({"inputs": "1", "outputs": "1"}, "lists of the same length"),
        ({"tests": [1]}, "Python code, or a list of it"),
    ],
)
def test_rows_that_hold_no_tests_are_refused_by_name(score, row, problem):
    with pytest.raises(UserError, match=problem):
        score(row, RIGHT)


def test_a_machine_without_a_jail_refuses_code_unless_it_is_told(monkeypatch):
    def none(unjailed: bool = False):
        if unjailed:
            return find_jail(True)
        raise UserError("sandbox: this machine cannot jail model-written code")

    monkeypatch.setattr(code_tests, "find_jail", none)
    with pytest.raises(UserError, match="cannot jail"):
        python_tests("")
    assert python_tests("unjailed")(ASSERTS, RIGHT) == 1
    with pytest.raises(UserError, match="python_tests has the parameter 'fast'; it should be unjailed, or none"):
        python_tests("fast")


@pytest.mark.parametrize(
    ("printed", "expected", "same"),
    [("3\n", "3", True), ("3  4 \n\n", "3 4", True), ("3\n4", "3 4", False), ("", "", True), ("3", "", False)],
)
def test_output_is_compared_without_white_space(printed, expected, same):
    assert same_output(printed, expected) is same


def test_the_code_of_a_completion_is_its_last_block():
    assert code_of("```py\n1\n```\ntext\n```python\n2\n```") == "2"
    assert code_of("```python\ncut off") == "cut off"
    assert code_of("x = 1") == "x = 1"
