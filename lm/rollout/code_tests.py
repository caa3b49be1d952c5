"""Reward for programs: the Python code of a completion runs in a jail, and tests judge it from outside.

The verdict never comes from the process that runs the completion's code. A program with stdin and stdout is judged here by its
output. Functions are called over a socket by tests that run in a jail of their own, and only data crosses: no code of the completion
can print, raise, exit, replace or compare its way to a pass. It sees the arguments of a test when it is called, never what the test expects.
"""

from __future__ import annotations

import json
import math
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from lm.config.field import shown
from lm.data.bad_rows import is_blank
from lm.experiment import UserError
from lm.rollout.timed import TookTooLong, seconds_left
from lm.sandbox.jail import Jail, JailLimits, JailOutcome, JailProgram, find_jail, program

UNJAILED = "unjailed"  # the parameter that allows code to run without a jail
TESTS = (
    "tests",
    "test_list",
    "test",
)  # columns with tests, as in MBPP (a list of asserts) and HumanEval (`check(candidate)`)
COLUMNS = (*TESTS, "inputs")
FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)
UNLIMITED_SECONDS = 10.0  # of all tests together, where the caller sets no limit


def python_tests(parameter: str) -> Callable[[Mapping[str, Any], str], float]:
    """The verifier `python_tests`: 1 if the completion's code passes all tests of the row, else 0.

    Columns: `tests` (Python code, or a list of it) with `entry_point` for `check(candidate)` and `setup`; or `inputs` and `outputs`, lists
    of the same length: texts for stdin and stdout, or with `entry_point` lists of arguments and results.

    Raises:
        UserError: the parameter is not UNJAILED or empty, or this machine has no jail.
    """
    if parameter not in ("", UNJAILED):
        raise UserError(f"python_tests has the parameter {parameter!r}; it should be {UNJAILED}, or none")
    jail = find_jail(bool(parameter))

    def score(row: Mapping[str, Any], completion: str) -> float:
        code = code_of(completion)
        if is_blank(code):
            return 0.0
        entry = row.get("entry_point") or ""
        if _has_inputs(row) and not entry:
            return float(all(_prints(jail, code, given, wanted) for given, wanted in _pairs(row)))
        tests = [_call_test(entry, *pair) for pair in _pairs(row)] if _has_inputs(row) else _tests(row)
        return float(_passes(jail, code, tests, str(row.get("setup") or row.get("test_setup_code") or ""), entry))

    return score


def check_tests(row: Mapping[str, Any]) -> None:
    """Raises UserError for a row whose tests are not Python code, or whose inputs and outputs are not lists of the same length."""
    if _has_inputs(row):
        _pairs(row)
    else:
        _tests(row)


def _has_inputs(row: Mapping[str, Any]) -> bool:
    """Whether a row is judged by its inputs; rows with tests may have empty ones beside them."""
    return not is_blank(row.get("inputs")) and row["inputs"] != []


def sandbox_notes(verifiers: Sequence[str]) -> tuple[str, ...]:
    """One line that says which sandbox runs the code, for verifiers that run code."""
    names = [name for name in verifiers if name.partition(":")[0] == "python_tests"]
    return tuple(f"{name}: model-written code runs in {find_jail(name.endswith(UNJAILED)).about}" for name in names)


def code_of(completion: str) -> str:
    """The code of a completion: its last fenced block after the reasoning, else all of it."""
    answer = completion.rpartition("</think>")[2]
    blocks = FENCE.findall(answer)
    return blocks[-1] if blocks else answer


def same_output(printed: str, expected: str) -> bool:
    """Whether two outputs are the same lines, ignoring the amount of white space and empty lines at the end."""
    one, other = ([" ".join(line.split()) for line in text.strip().splitlines()] for text in (printed, expected))
    return one == other


def _prints(jail: Jail, code: str, given: Any, wanted: Any) -> bool:
    outcome = _in_time(jail.run(program(code, str(given)), _limits()))
    return outcome.ok and same_output(outcome.stdout.decode("utf-8", "replace"), str(wanted))


def _passes(jail: Jail, code: str, tests: list[str], setup: str, entry: str) -> bool:
    """Whether all tests pass: one jail serves the functions of the code, another runs the tests."""
    limits = _limits()
    ours, theirs = socket.socketpair()
    arguments = {"tests": tests, "setup": setup, "entry_point": entry}
    with ThreadPoolExecutor(1) as thread:
        served = thread.submit(jail.run, JailProgram("calls", {"code": code}), limits, theirs)
        judged = jail.run(JailProgram("tests", arguments), limits, ours)
        server = served.result()
    if judged.ok:
        outcomes = json.loads(judged.stdout)
        return len(outcomes) == len(tests) > 0 and not any(outcomes)
    _in_time(server)
    _in_time(judged)
    return False


def _in_time(outcome: JailOutcome) -> JailOutcome:
    """The outcome, unless the program ran out of time, which counts as a reward that took too long."""
    if outcome.status in ("timeout", "cpu"):
        raise TookTooLong
    return outcome


def _limits() -> JailLimits:
    left = seconds_left() if seconds_left() < math.inf else UNLIMITED_SECONDS
    if left <= 0:
        raise TookTooLong
    return JailLimits(seconds=left, cpu_seconds=left)


def _call_test(entry: str, given: Any, wanted: Any) -> str:
    """A test that calls a function (or, as `Solution().name`, a method) with a list of arguments."""
    called = f"{entry}(*{list(given)!r})" if isinstance(given, list | tuple) else f"{entry}({given!r})"
    return f"assert {called} == {wanted!r}"


def _pairs(row: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    inputs, outputs = row.get("inputs"), row.get("outputs")
    if not isinstance(inputs, list | tuple) or not isinstance(outputs, list | tuple) or len(inputs) != len(outputs):
        raise UserError(
            f"inputs is {shown(inputs)} and outputs {shown(outputs)}; they should be lists of the same length"
        )
    return list(zip(inputs, outputs, strict=True))


def _tests(row: Mapping[str, Any]) -> list[str]:
    found: Any = next((row[name] for name in TESTS if not is_blank(row.get(name))), None)
    tests = [found] if isinstance(found, str) else found
    if not isinstance(tests, Sequence) or not tests or not all(isinstance(test, str) for test in tests):
        raise UserError(f"{' or '.join(TESTS)} is {shown(found)}; it should be Python code, or a list of it")
    return list(tests)
