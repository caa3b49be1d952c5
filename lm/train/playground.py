"""Several models answer the same tasks: the pass rate, speed and cost of each, and all answers to read."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lm.evals.answers import chances_of_full_reward, requests_of
from lm.evals.examples import Examples, read_examples, spec_of
from lm.evals.rows import mean_of
from lm.experiment import Eval, UserError
from lm.model.flops import forward_flops_per_token
from lm.model.transformer import num_params
from lm.rollout.engine import LocalEngine
from lm.rollout.episodes import Episode, conclude, run_episodes
from lm.rollout.trajectory import Trajectory, rewards_of
from lm.train.compilations import keep_compilations
from lm.train.loaded_run import LoadedRun, load_run


@dataclass(frozen=True)
class Player:
    """A model that answers: its name in the table, and the run's folder with a stage, or open weights (None)."""

    name: str
    folder: Path
    stage: str | None


@dataclass(frozen=True)
class PlayerResult:
    """What a model reached on the tasks that all models could be asked.

    rates: {k: (pass@k, its standard error over tasks)}; `timeouts`: answers whose judging took too long, which failed.
    tokens_per_s: sampled tokens, all answers together, without judging and compilation.
    flops: operations for an answer, its share of the prompt included; `length`: sampled tokens of an answer, their mean.
    cut: fraction of answers that ended at the limit of tokens.
    answers: of each task.
    """

    name: str
    parameters: int
    rates: dict[int, tuple[float, float]]
    tokens_per_s: float
    flops: float
    length: float
    cut: float
    timeouts: int
    answers: list[list[Trajectory]]

    @property
    def gflop(self) -> str:
        """10⁹ operations for an answer, for a table: with one decimal, or two digits of a small number."""
        billions = self.flops / 1e9
        return f"{billions:,.1f}" if billions >= 1 else f"{billions:.2g}"


@dataclass(frozen=True)
class Playground:
    """The tasks, the results of each model, and the number of tasks that some model could not be asked."""

    item: Eval
    tasks: list[dict[str, Any]]
    results: list[PlayerResult]
    left_out: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Sampled:
    """A model's episodes, `best_of` adjacent ones for each of its tasks, before they are judged."""

    player: Player
    parameters: int
    asked: Examples
    episodes: list[Episode]
    seconds: float
    flops: list[float]


def play(players: Sequence[Player], item: Eval, seed: int, tell: Callable[[str], None]) -> Playground:
    """Sample `item.best_of` answers of each model to each task of an eval, and judge them by its verifier.

    The models are loaded one after another. The answers of a model depend on it, the tasks and the seed alone.

    Raises:
        UserError: a model cannot be loaded, no task fits it, or no task fits all.
    """
    notes = spec_of(item).notes
    keep_compilations()
    sampled = [_sample(player, item, seed, tell) for player in players]
    common = set.intersection(*({_key(row) for row in one.asked.rows} for one in sampled))
    tasks = [row for row in sampled[0].asked.rows if _key(row) in common]
    if not tasks:
        raise UserError(f"{item.source.path}: no task can be asked of all of {', '.join(one.name for one in players)}")
    every = {_key(row) for one in sampled for row in one.asked.rows}
    results = [_result(one, item, common) for one in sampled]
    return Playground(item, tasks, results, len(every) - len(common), notes)


def _key(row: dict[str, Any]) -> str:
    return json.dumps(row, sort_keys=True, default=str)


def _sample(player: Player, item: Eval, seed: int, tell: Callable[[str], None]) -> _Sampled:
    loaded = load_run(player.folder, player.stage)
    asked = read_examples(item, loaded.tokenizer, loaded.model.config.max_len)
    tell(f"{player.name}: {asked.describe(item).partition(': ')[2]}, answers to each: {item.best_of}")
    engine, spec = LocalEngine(loaded.model, loaded.tokenizer), spec_of(item)
    episodes: list[Episode] = []
    seconds = 0.0
    for request, rows, kept in requests_of(item, asked, loaded.model.config.max_len, item.best_of, seed):
        if not episodes:  # compile first, which is not counted
            engine.complete(replace(request, limits=[1] * (len(rows) * item.best_of)))
        started = time.perf_counter()
        episodes += run_episodes(engine, spec, rows, request, loaded.tokenizer)[:kept]
        seconds += (time.perf_counter() - started) * kept / (len(rows) * item.best_of)
        tell(f"{player.name}: {len(episodes):,} of {len(asked.rows) * item.best_of:,} answers, {seconds:,.0f} s")
    flops = [_flops(loaded, one, item.best_of) for one in episodes]
    return _Sampled(player, num_params(loaded.model), asked, episodes, seconds, flops)


def _flops(loaded: LoadedRun, episode: Episode, each: int) -> float:
    """Operations of an episode's tokens; those of a prompt that its answers share are counted once for all of them."""
    model, vocabulary = loaded.model, loaded.tokenizer.vocab_size

    def whole(length: int) -> float:
        return length * forward_flops_per_token(model.config, vocabulary, length) if length else 0.0

    prompt, size = episode.prompt_length, len(episode.tokens)
    return whole(size) - whole(prompt) * (1 - 1 / each)


def _result(one: _Sampled, item: Eval, common: set[str]) -> PlayerResult:
    each = item.best_of
    wanted = [
        number
        for task, row in enumerate(one.asked.rows)
        if _key(row) in common
        for number in range(task * each, (task + 1) * each)
    ]
    trajectories, timeouts = conclude(spec_of(item), [one.episodes[number] for number in wanted])
    rewards = rewards_of(trajectories).reshape(-1, each)
    sizes = [2**k for k in range(each.bit_length()) if 2**k <= each]
    means = {k: tuple(mean_of("rate", chances_of_full_reward(rewards, k)).values()) for k in sizes}
    return PlayerResult(
        one.player.name,
        one.parameters,
        {k: (value, error) for k, (value, error) in means.items()},
        sum(episode.sampled for episode in one.episodes) / max(one.seconds, 1e-9),
        float(np.mean([one.flops[number] for number in wanted])),
        float(np.mean([found.length for found in trajectories])),
        float(np.mean([not found.ended for found in trajectories])),
        timeouts,
        [trajectories[start : start + each] for start in range(0, len(trajectories), each)],
    )
