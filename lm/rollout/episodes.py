"""Episodes: an engine completes the turns of a batch of tasks, and their environments reply until all have ended.

The loss covers only the model's own tokens. A reply is encoded after the sampled tokens, which are never decoded and
encoded again.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from jaxtyping import Int32, PRNGKeyArray

from lm.config.field import shown
from lm.data import bad_rows
from lm.data.bad_rows import BadRow, ColumnNeed
from lm.data.chat import as_messages, check_conversation, prompt_messages, variables_of
from lm.data.privileged import answer_tokens, context_columns, context_messages, with_answers
from lm.data.prompts import MessagesOf, PromptFeed, make_prompt_feed, offered_tools
from lm.data.sources import NOWHERE
from lm.data.split import Places
from lm.data.text_tokenizer import TextTokenizer
from lm.experiment import Stage, UserError
from lm.parallel.distributed import gather, raise_on_all
from lm.rollout.answer_rewards import TOKENS
from lm.rollout.code_tests import sandbox_notes
from lm.rollout.endpoint_judge import StepRecord
from lm.rollout.engine import Completion, Engine, Request, completion_text
from lm.rollout.environment import Environment, RewardsByName, VerifierEnvironment, find_environment
from lm.rollout.rewards import REWARD, between_calls, compute_rewards, reward_problem
from lm.rollout.timed import limited
from lm.rollout.trajectory import (
    AUTHORS,
    ENVIRONMENT,
    LENGTH,
    MODEL,
    MOST_TURNS,
    PROMPT,
    STOP,
    TIMEOUT,
    Trajectory,
    prompt_text,
)
from lm.rollout.verifiers import declared_columns, find_verifier, needed_columns

TURNS = 2**30  # folded into a rollout's key for its turns after the first; larger than any token index

Messages = list[dict[str, Any]]
# (ended episodes, their tasks) -> rewards of each episode; None where computing them took too long
Judge = Callable[["EnvironmentSpec", Sequence["Episode"]], list[RewardsByName | None]]


@dataclass(frozen=True)
class EnvironmentSpec:
    """The environment or the verifiers of a stage or eval, which turn rows into episodes and give rewards.

    `judge` is None if nothing here gives rewards, `columns` are those that every row needs, `messages` gives the first
    messages of a row, `where` names the stage or the eval in errors, `seconds` is the time limit of one call, `notes` are
    lines for the log, `record` holds the replies of a judge behind an endpoint, and `max_turns` is the number of the model's turns (0: no limit).
    """

    make: Callable[[], Any]
    judge: Judge | None
    columns: tuple[ColumnNeed, ...]
    messages: MessagesOf
    where: str
    seconds: float
    notes: tuple[str, ...] = ()
    record: StepRecord | None = None
    max_turns: int = 0


def environment_spec(
    verifiers: Sequence[str], environment: str, where: str, field: str, seconds: float, max_turns: int = 0
) -> EnvironmentSpec:
    """The environment if set, else the verifiers, else prompts without rewards.

    Args:
        field: prefix of the fields `verifier` and `environment` in errors.

    Raises:
        UserError: no such verifier or environment.
    """
    if environment:
        make = find_environment(environment, f"{field}.environment")
        columns = declared_columns(environment, make)
        return EnvironmentSpec(
            make, judge_environments, columns, FirstMessages(make, seconds), where, seconds, max_turns=max_turns
        )
    for verifier in verifiers:
        find_verifier(verifier, f"{field}.{'verifier' if len(verifiers) == 1 else 'verifiers'}")
    return EnvironmentSpec(
        functools.partial(VerifierEnvironment, verifiers),
        judge_answers if verifiers else None,
        tuple(dict.fromkeys(column for verifier in verifiers for column in needed_columns(verifier))),
        prompt_messages,
        where,
        seconds,
        sandbox_notes(verifiers),
    )


@dataclass(frozen=True)
class Tasks:
    """Source of a stage's episodes: prompts as a pure function of the step, and their environment.

    `privileged_feed` has the same tasks with the privileged prompts, if the objective has them; `answer` gives the tokens of the
    answer that a row has, if the stage trains on them.
    """

    feed: PromptFeed
    spec: EnvironmentSpec
    privileged_feed: PromptFeed | None = None
    answer: Callable[[Mapping[str, Any], str], list[int]] | None = None

    def report(self) -> str:
        """Lines for the log: the prompts, and the notes of their environment."""
        return "\n".join((self.feed.report(), *self.spec.notes))


def make_tasks(stage: Stage, tokenizer: TextTokenizer, seed: int, elsewhere: Places = NOWHERE) -> Tasks:
    """The tasks of a stage that samples. Prompts of `elsewhere` are left out.

    Raises:
        UserError: no such verifier or environment, or prompts that do not fit.
    """
    o: Any = stage.objective
    spec = environment_spec(
        o.verifier_names, o.environment_name, stage.name, f"{stage.name}.objective", o.reward_seconds, o.turn_limit
    )
    answer = functools.partial(answer_tokens, spec.messages, tokenizer) if o.reads_answers else None
    messages = with_answers(spec.messages, answer) if answer else spec.messages
    read = context_columns(o.privileged_prompt)
    told = functools.partial(context_messages, messages, o.privileged_prompt) if read else messages
    feed = make_prompt_feed(
        stage.sources,
        stage.batch_size,
        stage.seq_len - o.max_new_tokens,
        tokenizer,
        seed,
        columns=spec.columns,
        elsewhere=elsewhere,
        max_new_tokens=o.max_new_tokens,
        messages=told,
        also_read=read,
    )
    # The privileged prompts are the longer ones, so that they were checked.
    return Tasks(dataclasses.replace(feed, messages=spec.messages), spec, feed if read else None, answer)


@dataclass(frozen=True)
class FirstMessages:
    """The first messages of an environment for a row; a call raises BadRow if `reset` raises, takes too long or returns none."""

    make: Callable[[], Environment]
    seconds: float

    def __call__(self, task: Mapping[str, Any], where: str) -> Messages:
        return _reset(_created(self.make, self.seconds, where), self.seconds, task, where)

    @property
    def tools(self) -> list[Any]:
        """The definitions of the environment's own tools."""
        return [tool.definition for tool in getattr(self.make, "tools", ())]


def _created(make: Callable[[], Any], seconds: float, where: str) -> Any:
    """An instance of an environment. Raises UserError if its class cannot be created."""
    outcome = limited(seconds, make)
    if hasattr(outcome.value, "reset"):
        return outcome.value
    problem = outcome.problem(seconds) or f"gave {shown(outcome.value)}"
    raise UserError(
        f"{where}: {getattr(make, '__name__', make)}() {problem}; it should be a class with reset, step and reward that is "
        "created without arguments"
    )


def _reset(environment: Environment, seconds: float, task: Mapping[str, Any], where: str) -> Messages:
    outcome = limited(seconds, environment.reset, task)
    if problem := outcome.problem(seconds):
        raise BadRow(f"{where}: {type(environment).__name__}.reset {problem}", bad_rows.TURNS)
    check_conversation(outcome.value, where, needs_answer=False)
    return _encodable(as_messages(outcome.value))


def _encodable(messages: Messages) -> Messages:
    """The messages with ? for what UTF-8 cannot encode, such as half a surrogate pair."""
    return [
        turn | {"content": turn["content"].encode(errors="replace").decode()} if turn.get("content") else turn
        for turn in messages
    ]


class Sampled(NamedTuple):
    """The trajectories of a rollout, and the number of episodes that exceeded a time limit; their reward is 0."""

    trajectories: list[Trajectory]
    timeouts: int


def sample_trajectories(
    engine: Engine,
    tasks: Tasks,
    step: int,
    key: PRNGKeyArray,
    *,
    max_new_tokens: int,
    temperature: float,
    group_size: int = 1,
    judged: bool = True,
) -> Sampled:
    """Episodes of the step's tasks, `group_size` adjacent ones for each; every process gets all of them.

    Args:
        max_new_tokens: maximum tokens after the prompt, for all turns together, replies included.
        judged: whether to compute rewards.

    Raises:
        UserError: an environment or a verifier raised, or returned an invalid reply or a reward that is not finite.
    """
    prompts, width = tasks.feed.batch(step), tasks.feed.prompt_len
    encoded = [row[width - length :].tolist() for row, length in zip(prompts.tokens, prompts.lengths, strict=True)]
    request = Request(encoded, key, max_new_tokens, temperature, group_size, width)
    return conclude(tasks.spec, run_episodes(engine, tasks.spec, prompts.rows, request, tasks.feed.tokenizer), judged)


def run_episodes(
    engine: Engine,
    spec: EnvironmentSpec,
    rows: Sequence[Mapping[str, Any]],
    request: Request,
    tokenizer: TextTokenizer,
) -> list[Episode]:
    """Run all episodes to their ends, `group_size` adjacent ones for each row; `request` is that of the first turn, with a width."""
    episodes = [
        Episode(spec, row, tokens)
        for row, tokens in zip(rows, request.prompts, strict=True)
        for _ in range(request.group_size)
    ]
    key, budget, width = request.key, request.max_new_tokens, request.width + request.max_new_tokens
    for turn in itertools.count(1):
        going = [number for number, episode in enumerate(episodes) if not episode.finish]
        completions = engine.complete(request)
        for number in going:
            episodes[number].complete(completions[number], tokenizer)
        for number, reply in _replies(spec, episodes, going).items():
            episodes[number].proceed(reply, tokenizer, budget)
        if all(episode.finish for episode in episodes):
            return episodes
        # Rows keep their places and ended rows stay in the batch, so that the samples of a row do not depend on other rows.
        request = dataclasses.replace(
            request,
            prompts=[episode.tokens for episode in episodes],
            key=jax.random.fold_in(jax.random.fold_in(key, TURNS), turn),
            group_size=1,
            width=width,
            limits=[0 if episode.finish else budget - episode.used for episode in episodes],
        )
    raise AssertionError("unreachable")


def conclude(spec: EnvironmentSpec, episodes: Sequence[Episode], judged: bool = True) -> Sampled:
    """The trajectories of ended episodes, with rewards if `judge` is given. Raises the UserErrors of the judge."""
    rewards = _judge(spec, spec.judge, episodes) if judged and spec.judge else [{} for _ in episodes]
    found = [episode.trajectory(given or {}) for episode, given in zip(episodes, rewards, strict=True)]
    return Sampled(found, sum(given is None for given in rewards))


class Episode:
    """An episode in progress: its messages, and its tokens with the author and log-probability of each."""

    def __init__(self, spec: EnvironmentSpec, task: Mapping[str, Any], tokens: Sequence[int]):
        self.spec, self.environment = spec, cast(Any, _created(spec.make, spec.seconds, spec.where))
        messages = _reset(self.environment, spec.seconds, task, spec.where)
        self.task, self.prompt_length = task, len(tokens)
        self.messages = [turn | {"author": AUTHORS[PROMPT]} for turn in messages]
        self.parts: list[
            tuple[np.ndarray, np.ndarray, np.ndarray]
        ] = []  # tokens, their authors, their log-probabilities
        self.text, self.finish, self.completed, self.version, self.turns = "", "", False, 0, 0
        self._add(tokens, PROMPT)

    @property
    def first_prompt(self) -> str:
        """The text of the turn that the model answers first."""
        return prompt_text(self.messages)

    @property
    def tokens(self) -> Int32[np.ndarray, " T"]:
        """All tokens so far."""
        return np.concatenate([tokens for tokens, _, _ in self.parts])

    @property
    def used(self) -> int:
        """Tokens after the prompt."""
        return sum(len(tokens) for tokens, _, _ in self.parts) - self.prompt_length

    @property
    def sampled(self) -> int:
        """Tokens that the model sampled."""
        return sum(int((authors == MODEL).sum()) for _, authors, _ in self.parts)

    def complete(self, completion: Completion, tokenizer: TextTokenizer) -> None:
        """Add a turn of the model."""
        self._add(completion.tokens, np.where(completion.sampled, MODEL, ENVIRONMENT), completion.logp)
        self.text, self.completed = completion_text(tokenizer, completion), completion.ended
        self.version, self.turns = completion.version, self.turns + 1
        self.messages.append({"role": "assistant", "content": self.text, "author": AUTHORS[MODEL]})

    def proceed(self, reply: Messages | str | None, tokenizer: TextTokenizer, budget: int) -> None:
        """Add the environment's reply; without a reply, or without room for a token after it, the episode ends."""
        if not isinstance(reply, list):
            self.finish = reply or (STOP if self.completed else LENGTH)
            return
        if self.turns == self.spec.max_turns:
            self._end_before(reply, MOST_TURNS if self.completed else LENGTH)
            return
        told = self.task if tokenizer.has_template else {}  # an environment may have columns of these names for itself
        tools = offered_tools(self.spec.messages, told, "the task") if tokenizer.has_template else None
        reply = reply if tokenizer.has_template else _without_tool_role(reply)
        tokens = tokenizer.continuation(self.messages, reply, tools, variables_of(told, "the task"))
        if not self.completed or self.used + len(tokens) >= budget:
            self._end_before(reply, LENGTH)
            return
        self._add(tokens, ENVIRONMENT)
        self.messages += [turn | {"author": AUTHORS[ENVIRONMENT]} for turn in reply]

    def _end_before(self, reply: Messages, finish: str) -> None:
        """End without the reply, for which there is no room; an error that it reports is marked on the model's turn."""
        self.finish = finish
        if any(turn.get("error") for turn in reply):
            self.messages[-1] = self.messages[-1] | {"error": True}

    def trajectory(self, rewards: RewardsByName) -> Trajectory:
        """The finished episode as a trajectory."""
        tokens, authors, logp = map(np.concatenate, zip(*self.parts, strict=True))
        return Trajectory(
            task=self.task,
            messages=tuple(self.messages),
            tokens=tokens,
            authors=authors,
            logp=logp,
            finish=self.finish,
            version=self.version,
            rewards=rewards,
            reward=self.total(rewards),
        )

    def total(self, rewards: RewardsByName) -> float:
        """The sum of the rewards that the policy learns from."""
        unrewarded = getattr(self.environment, "unrewarded", ())
        return float(sum(value for name, value in rewards.items() if name not in unrewarded))

    def _add(self, tokens: Any, author: Any, logp: Any = 0.0) -> None:
        """Add tokens with their author and log-probability; these may be arrays, or one value for all tokens."""
        size = len(tokens)
        self.parts.append(
            (np.asarray(tokens, np.int32), np.full(size, author, np.int8), np.full(size, logp, np.float32))
        )


def _without_tool_role(reply: Messages) -> Messages:
    """The reply for a chat format that has no tool turns: their contents in one user turn."""
    if reply[0]["role"] != "tool":
        return reply
    failed = {"error": True} if any(turn.get("error") for turn in reply) else {}
    return [{"role": "user", "content": "\n".join(turn["content"] for turn in reply), **failed}]


def _shared_out(numbers: Sequence[int], act: Callable[[list[int]], list[Any]]) -> dict[int, Any]:
    """The results of `act` (JSON values) for all numbers, in every process; each process calls it for its share of them."""
    count, number = jax.process_count(), jax.process_index()
    own = [one for one in numbers if one % count == number]
    shares = gather([own, raise_on_all(lambda: act(own))])
    return dict(sorted((one, value) for some in shares for one, value in zip(*some, strict=True)))


def _replies(
    spec: EnvironmentSpec, episodes: Sequence[Episode], going: Sequence[int]
) -> dict[int, Messages | str | None]:
    """The reply to each running episode: messages, None if it is over, TIMEOUT if the environment took too long."""
    return _shared_out(going, lambda own: [reply_to(spec, episodes[number]) for number in own])


def reply_to(spec: EnvironmentSpec, episode: Episode) -> Messages | str | None:
    """The reply to the latest turn: messages, None if the episode is over, TIMEOUT. Raises UserError if `step` raised or gave no messages."""
    between_calls()
    outcome = limited(spec.seconds, episode.environment.step, episode.text)
    where = f"{spec.where}: {type(episode.environment).__name__}.step"
    if outcome.error:
        raise UserError(f"{where} raised {outcome.error} at the completion {shown(episode.text)}")
    if outcome.timed_out or outcome.value is None:
        return TIMEOUT if outcome.timed_out else None
    if not isinstance(outcome.value, list | tuple):
        raise UserError(f"{where} gave {shown(outcome.value)}; it returns a list of messages, or None")
    check_conversation([*episode.messages, *outcome.value], where, needs_answer=False)
    return _encodable(as_messages(outcome.value))


def _judge(spec: EnvironmentSpec, judge: Judge, episodes: Sequence[Episode]) -> list[RewardsByName | None]:
    """The rewards of every episode; None for those whose environment took too long."""

    def judged(own: list[int]) -> list[RewardsByName | None]:
        kept = [number for number in own if episodes[number].finish != TIMEOUT]
        found = judge(spec, [episodes[number] for number in kept])
        by_number = dict(zip(kept, found, strict=True))
        return [by_number.get(number) for number in own]

    return list(_shared_out(range(len(episodes)), judged).values())


def judge_answers(spec: EnvironmentSpec, episodes: Sequence[Episode]) -> list[RewardsByName | None]:
    """The verifiers' rewards of each answer. A user's own verifier runs in processes that can be killed.

    Raises:
        UserError: the verifier raised, or its reward is not finite; names the prompt.
    """
    if not episodes:
        return []
    names = episodes[0].environment.verifiers
    rows = [{**one.task, TOKENS: one.sampled} for one in episodes]
    answers = [one.text for one in episodes]
    found = [compute_rewards(name, rows, answers, spec.where, spec.seconds, spec.record) for name in names]
    late = np.any([one.late for one in found], axis=0)
    values = np.stack([one.values for one in found], axis=1).tolist()
    return [None if late[i] else dict(zip(names, values[i], strict=True)) for i in range(len(episodes))]


def judge_environments(spec: EnvironmentSpec, episodes: Sequence[Episode]) -> list[RewardsByName | None]:
    """The rewards that each episode's environment gives, computed in this process.

    Raises:
        UserError: `reward` raised, or a reward is not finite; names the prompt.
    """
    return [_rewards(spec, episode) for episode in episodes]


def _rewards(spec: EnvironmentSpec, episode: Episode) -> RewardsByName | None:
    between_calls()
    outcome = limited(spec.seconds, episode.environment.reward)
    if outcome.timed_out:
        return None
    found = outcome.value if isinstance(outcome.value, Mapping) else {"reward": outcome.value}
    problem = "" if found else "gave no rewards"
    problem = (
        f"raised {outcome.error}"
        if outcome.error
        else problem or next(filter(None, map(reward_problem, found.values())), "")
    )
    if problem:
        raise UserError(
            f"{spec.where}: {type(episode.environment).__name__}.reward {problem} for the completion "
            f"{shown(episode.text)} to the prompt {shown(episode.first_prompt)}; rewards are by name, and {REWARD}"
        )
    return {str(name): float(value) for name, value in found.items()}
