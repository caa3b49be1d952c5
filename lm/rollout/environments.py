"""An environment gives prompts and judges completions; a rollout asks the model and weighs what it answers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Num, PRNGKeyArray

from lm.data.chat import prompt_messages
from lm.data.pipeline import PromptFeed, Prompts, make_prompt_feed
from lm.data.sources import NOWHERE
from lm.data.split import Places
from lm.data.tokenizer import Tokenizer
from lm.experiment import GRPO, PPO, Collect, Stage
from lm.model.transformer import Transformer
from lm.objectives.grpo import group_advantages
from lm.parallel.distributed import fetch, gather, together
from lm.rollout.rewards import Rewards, compute_rewards, timeouts_of
from lm.rollout.sampler import Answer, Samples, decode_rows, generate
from lm.rollout.verifiers import find_verifier, needed_columns
from lm.types import Batch, SharedPrompt


@dataclass(frozen=True)
class Environment:
    """Prompts as a pure function of the step, and a verifier. `where` names the stage in errors."""

    feed: PromptFeed
    verifier: str
    where: str
    reward_seconds: float

    def prompts(self, step: int) -> Prompts:
        """The batch of prompts of a step, with the rows that they came from."""
        return self.feed.batch(step)


@dataclass(frozen=True)
class Rollout:
    """What the model answered: the batches to learn from, and what people look at."""

    batches: list[Batch]
    prompts: list[str]
    answers: list[Answer]
    rewards: Float[np.ndarray, " N"]
    advantages: Float[np.ndarray, " N"]
    metrics: dict[str, float]


def make_environment(stage: Stage, tokenizer: Tokenizer, seed: int, elsewhere: Places = NOWHERE) -> Environment:
    """The environment of a stage that samples; without a verifier it only asks. Prompts of `elsewhere` are left out.

    Raises:
        UserError: no such verifier, or prompts that do not fit.
    """
    o = stage.objective
    assert isinstance(o, GRPO | PPO | Collect)
    if o.verifier:
        find_verifier(o.verifier, f"{stage.name}.objective.verifier")
    room, columns = stage.seq_len - o.max_new_tokens, needed_columns(o.verifier) if o.verifier else ()
    feed = make_prompt_feed(
        stage.sources,
        stage.batch_size,
        room,
        tokenizer,
        seed,
        columns=columns,
        elsewhere=elsewhere,
        max_new_tokens=o.max_new_tokens,
    )
    return Environment(feed, o.verifier, stage.name, o.reward_seconds)


def roll_out(
    model: Transformer, environment: Environment, stage: Stage, tokenizer: Tokenizer, step: int, key: PRNGKeyArray
) -> Rollout:
    """Sample a group of completions for each prompt of the step, reward them and compare them in their group.

    With `rollouts` above 1, further prompts are asked until there are as many groups with a preference as the step has
    prompts, and groups without one fill what is missing after the last. What is reported is of everything sampled.
    """
    o = stage.objective
    assert isinstance(o, GRPO)
    turns: list[Said] = []
    judged: list[Rewards] = []
    for turn in range(o.rollouts):
        prompts = environment.prompts(step * o.rollouts + turn)
        turns.append(ask(model, prompts, o, tokenizer, jax.random.fold_in(key, turn) if turn else key, o.group_size))
        judged.append(judge(environment, turns[-1].rows, turns[-1].answers))
        rewards = np.concatenate([some.values for some in judged])
        if has_preference(rewards, o.group_size).sum() >= stage.batch_size:
            break
    chosen = fill(rewards, o.group_size, stage.batch_size)
    said = Said.joined(turns)
    advantages, means = group_advantages(
        jnp.asarray(rewards), o.group_size, scale="group" if o.scale_advantages else "none"
    )
    metrics = {name: float(mean.value()) for name, mean in means.items()} | said.metrics()
    metrics |= timeouts_of(*judged)
    if o.rollouts > 1:
        metrics["rollouts"] = len(turns)
    advantages, rewards, said = np.asarray(advantages)[chosen], rewards[chosen], said.take(chosen)
    batches = spread(said.batch(advantages), o.updates_per_rollout)
    return Rollout(batches, said.asked(), said.answers, rewards, advantages, metrics)


def has_preference(rewards: Num[np.ndarray, " N"], group_size: int) -> Bool[np.ndarray, " P"]:
    """Of each group whether its rewards differ, as float32 numbers; missing ones (NaN) do not count.

    It is so exactly where `group_advantages` has advantages other than 0.
    """
    grouped = np.asarray(rewards, np.float32).reshape(-1, group_size)
    missing = np.isnan(grouped)
    return np.where(missing, np.inf, grouped).min(1) < np.where(missing, -np.inf, grouped).max(1)


def fill(rewards: Float[np.ndarray, " N"], group_size: int, groups: int) -> Int[np.ndarray, " B"]:
    """Rows of so many groups, in order: the first of those with a preference, then the first of the others."""
    chosen = np.argsort(~has_preference(rewards, group_size), kind="stable")[:groups]
    return (np.sort(chosen)[:, None] * group_size + np.arange(group_size)).reshape(-1)


@dataclass(frozen=True)
class Said:
    """Answers to prompts, `group_size` neighbours to each: the prompts' rows and tokens once an answer, and what was said."""

    rows: list[dict]
    tokens: Int[np.ndarray, "B P"]
    lengths: Int[np.ndarray, " B"]
    samples: Samples
    answers: list[Answer]
    group_size: int

    @staticmethod
    def joined(turns: list[Said]) -> Said:
        """What was said in several turns, one after another."""
        arrays = [(turn.tokens, turn.lengths, turn.samples) for turn in turns]
        tokens, lengths, samples = jax.tree.map(lambda *parts: np.concatenate(parts), *arrays)
        rows, answers = [row for turn in turns for row in turn.rows], [one for turn in turns for one in turn.answers]
        return Said(rows, tokens, lengths, samples, answers, turns[0].group_size)

    def take(self, chosen: Int[np.ndarray, " B"]) -> Said:
        """Some of the answers, whole groups."""
        tokens, lengths, samples = jax.tree.map(lambda x: x[chosen], (self.tokens, self.lengths, self.samples))
        rows, answers = ([every[i] for i in chosen] for every in (self.rows, self.answers))
        return Said(rows, tokens, lengths, samples, answers, self.group_size)

    def asked(self) -> list[str]:
        """What people would call the prompt of each answer: its last turn."""
        return [prompt_messages(row, "the prompt")[-1]["content"] for row in self.rows]

    def batch(self, advantages: Float[np.ndarray, " B"] | None = None) -> Batch:
        """The rows as a batch on the host."""
        given = np.zeros(len(self.rows), np.float32) if advantages is None else advantages
        return as_batch(self.tokens, self.lengths, self.samples, given, self.group_size)

    def metrics(self) -> dict[str, float]:
        """What is reported of the answers themselves."""
        ended = [answer.eos for answer in self.answers]
        length = float(np.asarray(self.samples.mask).sum(1).mean())
        return {"completion_length": length, "eos_rate": float(np.mean(ended))}


def ask(
    model: Transformer,
    prompts: Prompts,
    o: GRPO | PPO | Collect,
    tokenizer: Tokenizer,
    key: PRNGKeyArray,
    group_size: int = 1,
) -> Said:
    """Sample answers as an objective says; in every process all of them."""
    samples = fetch(
        generate(
            model, prompts.tokens, prompts.lengths, key, o.temperature, group_size=group_size,
            max_new_tokens=o.max_new_tokens, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id,
        )
    )  # fmt: skip
    tokens, lengths = (np.repeat(x, group_size, axis=0) for x in (prompts.tokens, prompts.lengths))
    rows = [row for row in prompts.rows for _ in range(group_size)]
    return Said(rows, tokens, lengths, samples, decode_rows(tokenizer, samples.tokens, samples.mask), group_size)


def spread(batch: Batch, updates: int) -> list[Batch]:
    """A batch for each update: the groups are spread over them, so that each update sees every prompt it can."""
    assert batch.shared is not None
    group, rest = divmod(batch.shared.rows, updates)
    batch = dataclasses.replace(batch, shared=None if rest else SharedPrompt(group, batch.shared.tokens))
    return [jax.tree.map(lambda x, i=i: x[i::updates], batch) for i in range(updates)]


def judge(environment: Environment, rows: list[dict], answers: list[Answer]) -> Rewards:
    """The rewards of all answers, in every process; each judges its share.

    Raises:
        UserError: the verifier raised, or gave what is no finite number; names the prompt.
    """
    count, number = jax.process_count(), jax.process_index()
    texts = [answer.text for answer in answers]
    own = together(
        lambda: compute_rewards(
            environment.verifier,
            rows[number::count],
            texts[number::count],
            environment.where,
            environment.reward_seconds,
        )
    )
    values, timeouts = np.zeros(len(rows), np.float32), 0
    for process, (judged, late) in enumerate(gather([own.values.tolist(), own.timeouts])):
        values[process::count] = judged
        timeouts += late
    return Rewards(values, timeouts)


def as_batch(
    tokens: np.ndarray, lengths: np.ndarray, samples: Samples, advantages: Float[np.ndarray, " B"], group_size: int = 1
) -> Batch:
    """Left-padded prompts with their completions behind them, one row each; only completions have weight.

    Args:
        group_size: of so many neighbours the prompt is the same.
    """
    rows, width = tokens.shape
    mask = np.asarray(samples.mask)
    real = np.concatenate([np.arange(width)[None] >= width - lengths[:, None], mask], axis=1)
    weights = np.concatenate([np.zeros((rows, width)), mask], axis=1).astype(np.float32)
    logp = np.concatenate([np.zeros((rows, width)), samples.logp], axis=1).astype(np.float32)
    return Batch(
        tokens=np.concatenate([tokens, samples.tokens], axis=1).astype(np.int32),
        weights=weights,
        segments=real.astype(np.int32),
        positions=np.maximum(np.cumsum(real, axis=1) - 1, 0).astype(np.int32),
        advantages=weights * advantages[:, None].astype(np.float32),
        old_logp=logp,
        shared=SharedPrompt(group_size, width),
    )
