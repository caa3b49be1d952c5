"""Checks of an environment or verifier on its tasks: known answers, bad answers, repetition, leaks into the held-out tasks, time."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lm.config.field import shown
from lm.data.bad_rows import check_columns, names_of_needs
from lm.data.curriculum.style import OPENERS, dress
from lm.data.sources import Rows, load_rows, split_rows
from lm.data.split import canonical_json, split_key
from lm.experiment import UserError
from lm.rollout.environments.table import ENVIRONMENTS
from lm.rollout.episodes import EnvironmentSpec, Episode, environment_spec, judge_environments, reply_to
from lm.rollout.timed import limited
from lm.rollout.trajectory import AUTHORS, ENVIRONMENT, MODEL, TIMEOUT
from lm.rollout.verifiers import EXPECTED, RULES, VERIFIERS, expected_answer
from lm.user_functions import is_function_name, load_function

COMPARED = 1000  # training tasks, and held-out tasks, that are compared
BAD_ANSWERS = {
    "empty": "",
    "garbage": "]]}} lorem ipsum \x00 %s %n {{",
    "very long": "9 + " * 25_000,
    "invalid UTF-8": "\udc80\udcff \ufffd",
    "cut tool call": '<tool_call>{"name": "calc", "argum',
}
STYLED = ("style", "helpful")  # verifiers that give the full reward only with an opener


@dataclass(frozen=True)
class CheckResult:
    """The result of one check in words, and what is wrong; empty if nothing is."""

    check: str
    result: str
    problem: str = ""


@dataclass
class Played:
    """Everything that was played: the total reward of each episode in order, and the seconds of each call."""

    rewards: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    ended: bool = True  # whether the environment ended the last episode itself


def check_tasks(
    name: str, data: str, heldout: str, holdout: float, count: int, seconds: float
) -> Iterator[CheckResult]:
    """The findings on an environment, FILE:CLASS or verifier.

    Args:
        data: path of the tasks; empty: those of the environment.
        heldout: path of held-out tasks; empty: a part `holdout` of `data`.
        count: number of tasks that are played.
        seconds: time limit of one call.

    Raises:
        UserError: there is no such environment, or no task of it can be read.
    """
    spec = _spec(name, seconds)
    rows = load_rows(data or _own_tasks(name))
    split = split_rows(rows, 0.0 if heldout else holdout)
    train, held = SplitSide(rows, split[0]), SplitSide(rows, split[1])
    if heldout:
        other = load_rows(heldout)
        held = SplitSide(other, range(len(other)))
    tasks = [row for row, _ in zip(held, range(count), strict=False)]
    for task in tasks:
        check_columns(task, spec.columns, f"{name}: {rows.path}", "it")
    if not tasks:
        raise UserError(f"{name}: {rows.path} has no held-out tasks at holdout {holdout:g}; raise --holdout")
    many = "generated" if rows.generated else f"{len(train.indices)} train, {len(held.indices)} held out"
    yield CheckResult("rows", f"{many}; {len(tasks)} held-out tasks are played")
    played, full = Played(), float(getattr(spec.make, "full_reward", 1.0))
    solutions = [solution_of(name, spec, task) for task in tasks]
    checks: Sequence[tuple[str, Callable[[], tuple[str, str]]]] = (
        ("solvable", lambda: _solvable(spec, tasks, solutions, full, played)),
        ("deterministic", lambda: _deterministic(spec, rows, tasks, solutions)),
        ("bad answers", lambda: _bad_answers(spec, tasks, solutions, full, played)),
        ("leaks", lambda: _leaks(spec, train, held)),
        ("reward range", lambda: _range(played, full)),
        ("time a call", lambda: _time(played, seconds)),
    )
    for check, run in checks:
        try:
            yield CheckResult(check, *run())
        except UserError as error:
            yield CheckResult(check, "failed", str(error))


@dataclass(frozen=True)
class SplitSide:
    """The rows of one side of a split, in order."""

    rows: Rows
    indices: Sequence[int]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self.rows[self.indices[place]] for place in range(len(self.indices)))


def _spec(name: str, seconds: float) -> EnvironmentSpec:
    """The environment or verifier of that name, told by what it is."""
    own = is_function_name(name) and not isinstance(load_function(name, "NAME"), type)
    kind = name.partition(":")[0]
    if own or name in VERIFIERS or kind in RULES:
        return environment_spec((name,), "", name, name, seconds)
    if not is_function_name(name) and kind not in ENVIRONMENTS:
        known = ", ".join((*ENVIRONMENTS, *VERIFIERS, *RULES))
        raise UserError(f"no environment or verifier {name!r}; there are {known}, and FILE:CLASS of your own")
    return environment_spec((), name, name, name, seconds)


def _own_tasks(name: str) -> str:
    kind, _, argument = name.partition(":")
    path = ENVIRONMENTS[kind].tasks.format(argument) if kind in ENVIRONMENTS else ""
    path = path or ("gen:instruct" if name in STYLED else "gen:arithmetic" if name in ("answer", "exact") else "")
    if not path:
        raise UserError(f"{name} has no tasks of its own; --data FILE names a file of them")
    return path


def solution_of(name: str, spec: EnvironmentSpec, task: Mapping[str, Any]) -> Sequence[str]:
    """The turns of an episode with the full reward, by `solution` of the environment; of a verifier that reads the row's answer this one, of another the column `solution`; () if unknown."""
    known = getattr(spec.make, "solution", None)
    if known is not None:
        outcome = limited(spec.seconds, known, task)
        texts = isinstance(outcome.value, list | tuple) and all(isinstance(one, str) for one in outcome.value)
        if problem := outcome.problem(spec.seconds) or ("" if texts else f"gave {shown(outcome.value)}"):
            raise UserError(f"{name}: solution(task) {problem}; it should give the model's turns, a list of texts")
        return outcome.value
    right = expected_answer(task) if spec.make is not getattr(spec.make, "func", None) else ""
    if spec.judge is judge_environments:
        return ()
    right = (
        expected_answer(task) if {*EXPECTED} & set(names_of_needs(spec.columns)) else str(task.get("solution") or "")
    )
    if name in STYLED:
        return [dress(right or "Yes", OPENERS[0], "")]
    return [right] if right else ()


def play(spec: EnvironmentSpec, task: Mapping[str, Any], turns: Iterable[str], played: Played) -> float:
    """The total reward of an episode with these turns; it counts what each call took. Raises UserError as training would."""
    episode = Episode(spec, task, [0])
    for text in turns:
        episode.text = text
        episode.messages.append({"role": "assistant", "content": text, "author": AUTHORS[MODEL]})
        start = time.perf_counter()
        reply = reply_to(spec, episode)
        played.seconds.append(time.perf_counter() - start)
        played.ended = not isinstance(reply, list)
        if not isinstance(reply, list):
            break
        episode.messages += [turn | {"author": AUTHORS[ENVIRONMENT]} for turn in reply]
    start = time.perf_counter()
    assert spec.judge is not None
    found = [None] if reply == TIMEOUT else spec.judge(spec, [episode])
    played.seconds.append(time.perf_counter() - start)
    if found[0] is None:
        raise UserError(f"a call took longer than {spec.seconds:g} s at the answer {episode.text!r:.60}")
    played.rewards.append(episode.total(found[0]))
    return played.rewards[-1]


def _solvable(
    spec: EnvironmentSpec, tasks: list[Any], solutions: list[Any], full: float, played: Played
) -> tuple[str, str]:
    known = [(task, turns) for task, turns in zip(tasks, solutions, strict=True) if turns]
    if not known:
        return "not known: there is no `solution`", ""
    found, endless = [], []
    for task, turns in known:
        found.append(play(spec, task, turns, played))
        endless += [] if played.ended else [turns[-1]]
    bad = [number for number, reward in enumerate(found) if reward < full - 1e-6]
    problem = f"after the last turn of a known answer, {endless[0]!r:.60}, the episode goes on" if endless else ""
    if bad:
        task, turns = known[bad[0]]
        problem = (
            f"{len(bad)} of {len(known)} known answers do not get the full reward {full:g}; the first, {turns[-1]!r:.60} to "
            f"{split_key(task)!r:.60}, gets {found[bad[0]]:g}"
        )
    return f"{len(known) - len(bad)} of {len(known)} known answers get {full:g}", problem


def _deterministic(spec: EnvironmentSpec, rows: Rows, tasks: list[Any], solutions: list[Any]) -> tuple[str, str]:
    again = getattr(rows.fetch, "__wrapped__", rows.fetch)
    for index in range(min(3, len(rows))):
        if canonical_json(again(index)) != canonical_json(again(index)):
            return "no", f"row {index} differs when it is read again"
    for task, turns in zip(tasks, solutions, strict=True):
        if spec.messages(task, spec.where) != spec.messages(task, spec.where):
            return "no", f"the first messages of {split_key(task)!r:.60} differ in two episodes"
        rewards = {play(spec, task, turns or ["1"], Played()) for _ in range(2)}
        if len(rewards) > 1:
            return "no", f"the rewards of the same answer to {split_key(task)!r:.60} differ: {sorted(rewards)}"
    return "the same messages and rewards twice", ""


def _bad_answers(
    spec: EnvironmentSpec, tasks: list[Any], solutions: list[Any], full: float, played: Played
) -> tuple[str, str]:
    problems, count = [], 0
    for kind, text in BAD_ANSWERS.items():
        reward, count = play(spec, tasks[0], [text], played), count + 1
        problems += [f"{kind} answer gets {reward:g}"] if reward >= full else []
    for (task, turns), (other, wrong) in itertools.pairwise(zip(tasks, solutions, strict=True)):
        if wrong and spec.columns and wrong != turns and split_key(task) != split_key(other):
            reward, count = play(spec, task, wrong, played), count + 1
            problems += [f"the answer to another task, {wrong[-1]!r:.40}, gets {reward:g}"] if reward >= full else []
    said = f"{count - len(problems)} of {count} get less: {', '.join(BAD_ANSWERS)}, those of other tasks"
    return said, f"{problems[0]}, and the full reward is {full:g}" if problems else ""


def _leaks(spec: EnvironmentSpec, train: SplitSide, held: SplitSide) -> tuple[str, str]:
    seen = {_identity(spec, row) for row in itertools.islice(train, COMPARED if train.rows.generated else None)}
    those = [_identity(spec, row) for row in itertools.islice(held, COMPARED)]
    leaked = [one for one in those if one in seen]
    problem = (
        f"{len(leaked)} of {len(those)} held-out tasks are training tasks; the first is {leaked[0]!r:.100}"
        if leaked
        else ""
    )
    return f"{len(leaked)} of {len(those)} held-out tasks among {len(seen)} training tasks", problem


def _identity(spec: EnvironmentSpec, row: Mapping[str, Any]) -> str:
    """What makes a task what it is: its first messages, and its answer, or the columns that the environment needs."""
    answer = expected_answer(row) or canonical_json([row.get(name) for name in names_of_needs(spec.columns)])
    return canonical_json([[turn["content"] for turn in spec.messages(row, spec.where)], answer])


def _range(played: Played, full: float) -> tuple[str, str]:
    if not played.rewards:
        return "not known: no episode gave a reward", ""
    low, high = min(played.rewards), max(played.rewards)
    problem = f"a reward is {high:g}, above the full reward {full:g}" if high > full + 1e-6 else ""
    return f"{low:g} to {high:g} in {len(played.rewards)} episodes", problem


def _time(played: Played, limit: float) -> tuple[str, str]:
    mean, most = sum(played.seconds) / max(1, len(played.seconds)), max(played.seconds, default=0.0)
    return f"{1000 * mean:.2g} ms on average, {1000 * most:.2g} ms at most (limit {limit:g} s)", ""
