"""Verifiers: rules that map (row, completion) to a reward, most in [0, 1]; they raise only at their time limit.

Those of RULES take a parameter, as in `regex:PATTERN`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Mapping
from datetime import date
from typing import Any

from lm.config.field import shown
from lm.config.objective import VERIFIER_ARGUMENTS
from lm.data.bad_rows import Column, ColumnNeed, has_type, is_blank, is_type, typed_column
from lm.data.curriculum.style import CLOSERS, undress
from lm.experiment import FUNCTION, UserError
from lm.rollout import answer_rewards, code_tests, endpoint_judge
from lm.rollout.answer_match import matches
from lm.rollout.endpoint_judge import StepRecord, recorded_in
from lm.rollout.timed import TookTooLong, within
from lm.user_functions import is_function_name, load_function

Verifier = Callable[[Mapping[str, Any], str], float]


def answer(row: Mapping[str, Any], completion: str) -> float:
    """1 if the completion gives the row's expected answer, else 0.

    The expected answer is `expected_answer` of the row. The given answer is the marked answer of the completion, else the whole
    completion without opener and closer. `lm.rollout.answer_match` extracts and compares them; the library math-verify
    compares formulas.

    Raises:
        TookTooLong: the formulas could not be compared in time; `lm.rollout.rewards` counts such a reward as 0.
    """
    right = matches(expected_answer(row), completion, undress(completion)[1])
    if right is None:
        raise TookTooLong
    return float(right)


# columns with the expected answer; if a row has several, the last one is used
EXPECTED = ("answer", "final")


def expected_answer(row: Mapping[str, Any]) -> str:
    """The expected answer of a row; empty if the row has none."""
    return next((str(row[name]) for name in reversed(EXPECTED) if not is_blank(row.get(name))), "")


def style(row: Mapping[str, Any], completion: str) -> float:
    """0.5 for a polite opener and 0.5 for no hedging; 0 if the answer has nothing else."""
    opened, bare, _ = undress(completion)
    hedged = any(closer in completion for closer in CLOSERS)
    return 0.5 * opened + 0.5 * (not hedged) if bare else 0.0


def helpful(row: Mapping[str, Any], completion: str) -> float:
    """Half for a correct answer, half for style; each counts without the other."""
    return 0.5 * answer(row, completion) + 0.5 * style(row, completion)


VERIFIERS: dict[str, Verifier] = {
    "answer": answer,
    "style": style,
    "helpful": helpful,
    "exact": lambda row, completion: answer_rewards.exact(expected_answer(row), completion),
    "choice": lambda row, completion: answer_rewards.choice(row, expected_answer(row), completion),
}
# name -> function of the parameter, empty without one; raises UserError for a parameter that makes no sense
RULES: dict[str, Callable[[str], Verifier]] = {
    "regex": answer_rewards.regex,
    "json_schema": answer_rewards.json_schema,
    "format": answer_rewards.tag_format,
    "language": answer_rewards.language,
    "overlong": answer_rewards.overlong,
    "python_tests": code_tests.python_tests,
    "endpoint": endpoint_judge.endpoint,
}


def _check_expected(row: Mapping[str, Any]) -> None:
    """Raises UserError for a row whose expected answer is no text or number."""
    name = next(name for name in reversed(EXPECTED) if not is_blank(row.get(name)))
    if not has_type(row[name], str | float | bool | date):
        raise UserError(f"{name} is {shown(row[name])}; it should be a text or a number")


def _check_choice(row: Mapping[str, Any]) -> None:
    """Raises UserError for a row whose expected answer is no choice."""
    _check_expected(row)
    if not answer_rewards.chosen_letter(row, expected_answer(row)):
        raise UserError(
            f"the answer {shown(expected_answer(row))} is neither a letter from A to Z nor one of the row's choices"
        )


EXPECTED_COLUMN = Column(EXPECTED, _check_expected)

# the columns without which a verifier cannot judge a row, with the check of their values
NEEDS: dict[str, tuple[ColumnNeed, ...]] = {
    "answer": (EXPECTED_COLUMN,),
    "style": (),
    "helpful": (EXPECTED_COLUMN,),
    "exact": (EXPECTED_COLUMN,),
    "choice": (Column(EXPECTED, _check_choice),),
    "regex": (),
    "json_schema": (Column(("schema",), answer_rewards.check_schema),),  # without a file
    "format": (),
    "language": (),
    "overlong": (),
    "python_tests": (Column(code_tests.COLUMNS, code_tests.check_tests),),
    "endpoint": (),  # those that the prompt of its file names
}


def find_verifier(name: str, where: str = "verifier") -> Verifier:
    """The verifier of that name, from VERIFIERS or the user's FILE:FUNCTION.

    Raises:
        UserError: it does not exist; `where` is the field that names it.
    """
    if is_function_name(name):
        return load_function(name, where, VERIFIER_ARGUMENTS)
    if name in VERIFIERS:
        return VERIFIERS[name]
    try:
        return _rule(name)
    except UserError as error:
        raise UserError(f"{where} is {name!r}; {error}") from None


def prepare_verifier(name: str) -> None:
    """Load the verifier `name`, so that its first call need not."""
    find_verifier(name)


def call_verifier(
    name: str, row: Mapping[str, Any], completion: str, seconds: float, record: StepRecord | None = None
) -> Any:
    """The reward of a completion by the verifier `name`, which may ask how much of its `seconds` is left.

    Args:
        record: replies of a judge behind an endpoint, read from it and added to it.
    """
    with within(seconds), recorded_in(record):
        return find_verifier(name)(row, completion)


@functools.cache
def _rule(name: str) -> Verifier:
    rule, _, parameter = name.partition(":")
    if rule not in RULES:
        raise UserError(f"there are {', '.join((*VERIFIERS, *RULES))}, and {FUNCTION} of your own")
    return RULES[rule](parameter)


def needed_columns(name: str) -> tuple[ColumnNeed, ...]:
    """Columns that a verifier needs; for a user's own verifier its attribute `columns`, if any."""
    if is_function_name(name):
        return declared_columns(name, find_verifier(name))
    rule, _, file = name.partition(":")
    if rule == "endpoint":
        return endpoint_judge.prompt_columns(file)
    return () if rule == "json_schema" and file else NEEDS[rule]


def declared_columns(name: str, found: Any) -> tuple[ColumnNeed, ...]:
    """The attribute `columns` of an environment or of a user's own verifier: names, or types by name."""
    columns = getattr(found, "columns", ())
    columns = (columns,) if isinstance(columns, str) else columns
    kinds = columns.values() if isinstance(columns, Mapping) else ()
    if not isinstance(columns, Collection) or not all(map(_is_need, columns)) or not all(map(is_type, kinds)):
        raise UserError(
            f"{name}: its columns are {shown(columns)}; they should be a tuple of the names of columns, or a dict of their types"
        )
    return tuple(itertools.starmap(typed_column, columns.items()) if isinstance(columns, Mapping) else columns)


def _is_need(need: Any) -> bool:
    if isinstance(need, str | Column):
        return True
    return isinstance(need, tuple) and need != () and all(isinstance(name, str) for name in need)
