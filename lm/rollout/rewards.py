"""Rewards of a batch of completions by a verifier, each within a time limit; an invalid reward stops the run."""

from __future__ import annotations

import atexit
import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jaxtyping import Bool, Float32

from lm.between_batches import between_batches
from lm.config.field import shown
from lm.data.chat import prompt_messages
from lm.data.workers import cores
from lm.experiment import UserError
from lm.rollout import verifiers
from lm.rollout.endpoint_judge import StepRecord
from lm.rollout.timed import START_SECONDS, CallOutcome, TimedWorker, limited, whole_outcome_of
from lm.rollout.verifiers import call_verifier, find_verifier, prepare_verifier
from lm.user_functions import is_function_name

SECONDS = 10.0  # time limit of a verifier for one completion
GRACE = 1.0  # seconds more for a verifier of STOPS_ITSELF before its worker is killed
STOPS_ITSELF = ("python_tests",)  # these end at their limit by `seconds_left`
IN_WORKERS = ("regex", "json_schema", "python_tests")
IN_THREADS = ("endpoint",)  # these wait for others
THREADS = 32
LOOK_SECONDS = 0.2  # time between two looks for a signal while calls run
LARGEST = 1e9  # for larger rewards, differences within a group lose their digits in float32
REWARD = f"a reward is a number from {-LARGEST:g} to {LARGEST:g}"

T = TypeVar("T")


class Rewards(NamedTuple):
    """The reward of each completion, and whether computing it took too long (then it is 0)."""

    values: Float32[np.ndarray, " N"]
    late: Bool[np.ndarray, " N"]

    @property
    def timeouts(self) -> int:
        """Number of rewards that took too long."""
        return int(self.late.sum())


def compute_rewards(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    completions: Sequence[str],
    where: str,
    seconds: float = SECONDS,
    record: StepRecord | None = None,
) -> Rewards:
    """The reward of each completion by the verifier `name`, for the row that it answers.

    Args:
        where: the stage or evaluation, for messages.
        seconds: time limit of one reward; a call that takes longer is stopped and its reward is 0.
        record: replies of a judge behind an endpoint, read from it and added to it.

    Raises:
        UserError: the verifier raised, or its reward is not a finite number; names the prompt.
    """
    outcomes = _outcomes(name, list(zip(rows, completions, strict=True)), seconds, record)
    for row, completion, outcome in zip(rows, completions, outcomes, strict=True):
        problem = (
            f"raised {outcome.error}" if outcome.error else "" if outcome.timed_out else reward_problem(outcome.value)
        )
        if problem:
            raise UserError(
                f"{where}: verifier {name!r} {problem} for the completion {shown(completion)} to the prompt "
                f"{shown(_prompt(row))}; {REWARD}"
            )
    values = np.array([0.0 if outcome.timed_out else outcome.value for outcome in outcomes], np.float32)
    return Rewards(values, np.array([outcome.timed_out for outcome in outcomes], bool))


def timeout_metric(count: int) -> dict[str, float]:
    """The metric `reward_timeouts`, the number of rewards that took too long; left out if there are none."""
    return {"reward_timeouts": float(count)} if count else {}


def _outcomes(
    name: str, answered: Sequence[tuple[Mapping[str, Any], str]], seconds: float, record: StepRecord | None
) -> list[CallOutcome]:
    """The outcome of each call. Code, patterns and schemas of others run in processes that can be killed, other verifiers in this one."""
    rule = name.partition(":")[0]
    if rule in IN_THREADS:
        return _in_threads(
            THREADS,
            [functools.partial(whole_outcome_of, call_verifier, name, *one, seconds, record) for one in answered],
        )
    if not is_function_name(name) and rule not in IN_WORKERS:
        made = []
        for row, completion in answered:
            between_calls()
            made.append(limited(seconds, find_verifier(name), row, completion))
        return made
    workers = _workers()[: len(answered)]

    def call(worker: TimedWorker, row: Mapping[str, Any], text: str) -> CallOutcome:
        if rule in IN_WORKERS:  # a new worker reads the rule first, which does not count
            worker.call(prepare_verifier, name, seconds=START_SECONDS)
        limit = seconds + GRACE * (rule in STOPS_ITSELF)
        return worker.call(call_verifier, name, dict(row), text, seconds, seconds=limit)

    stopped = threading.Event()

    def share(place: int) -> list[CallOutcome]:
        mine = answered[place :: len(workers)]
        return [call(workers[place], row, text) for row, text in mine if not stopped.is_set()]

    outcomes: list[CallOutcome] = [CallOutcome()] * len(answered)
    shares = [functools.partial(share, place) for place in range(len(workers))]
    for place, found in enumerate(_in_threads(len(workers), shares, stopped)):
        outcomes[place :: len(workers)] = found
    return outcomes


def _in_threads(count: int, calls: Sequence[Callable[[], T]], stopped: threading.Event | None = None) -> list[T]:
    """The results of calls in threads; a signal sets `stopped`, and the calls that have not begun are not made."""
    with ThreadPoolExecutor(max(1, count)) as threads:
        running = [threads.submit(call) for call in calls]
        try:
            while wait(running, LOOK_SECONDS).not_done:
                between_calls()
        except BaseException:
            if stopped is not None:
                stopped.set()
            threads.shutdown(wait=False, cancel_futures=True)
            raise
        return [one.result() for one in running]


def between_calls() -> None:
    """`between_batches` between the calls of verifiers and environments, where one process makes all of them."""
    if jax.process_count() == 1:
        between_batches()


@functools.cache
def _workers() -> tuple[TimedWorker, ...]:
    # Not this module: a worker that is replaced after a late call should be there soon, and importing jax takes a second.
    workers = tuple(TimedWorker(library=verifiers.__name__) for _ in range(cores()))
    for worker in workers:
        atexit.register(worker.close)
    return workers


def reward_problem(value: Any) -> str:
    """A text that says why a value is not a valid reward; empty if it is valid."""
    if not isinstance(value, bool | int | float | np.integer | np.floating | np.bool_):
        return f"gave {shown(value)} ({type(value).__name__})"
    magnitude: Any = abs(value)
    return "" if magnitude <= LARGEST else f"gave {shown(value)}"


def _prompt(row: Mapping[str, Any]) -> str:
    """The prompt of a row for messages: its last turn."""
    try:
        return prompt_messages(row, "the prompt")[-1]["content"]
    except UserError:
        return str(dict(row))
