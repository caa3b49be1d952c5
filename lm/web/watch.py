"""Reward-hacking watch: judge's reward, proxy score and KL of held-out answers over a stage, and a warning."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from lm.train.run_files import Line, Run, StageFiles, finite, step_order
from lm.web import watch_charts
from lm.web.charts import SvgChart
from lm.web.numbers import percent, signed

JUDGED = ("reward", "reward_stderr", "score", "score_stderr")


@dataclass(frozen=True)
class Said:
    """An answer to a held-out prompt, its reward model score (None: not scored), and the judge's reward."""

    when: str
    answer: str
    score: float | None
    reward: float | None


@dataclass(frozen=True)
class Compared:
    """Answers to one held-out prompt before a stage and after it (or the latest)."""

    prompt: str
    sides: list[Said]


@dataclass(frozen=True)
class Watch:
    """One stage seen by one eval at temperature 1: charts, small charts, answers, and the warning or None."""

    stage: str
    kind: str
    eval: str
    verifier: str
    charts: list[SvgChart]
    small: list[SvgChart]
    answers: list[Compared]
    warning: str | None


def watches(run: Run) -> list[Watch]:
    """The watches of all stages with held-out KL at two or more steps."""
    verifiers = {item["name"]: item["verifier"] for item in run.experiment["evals"]}
    return [
        Watch(
            stage.name,
            stage.kind,
            name,
            verifiers.get(name, "verifier"),
            watch_charts.main_charts(stage.name, name, lines),
            watch_charts.small_charts(stage, name, lines),
            compared(stage, name),
            cheating(lines, stage.checkpoints),
        )
        for stage in run.stages
        for name, lines in measured(stage).items()
        if len(finite(lines, "reward", "kl")) > 1
    ]


def warnings(run: Run) -> list[tuple[str, str]]:
    """(stage, warning) of every stage with a warning."""
    found = [(stage, cheating(lines, stage.checkpoints)) for stage in run.stages for lines in measured(stage).values()]
    return [(stage.name, told) for stage, told in found if told]


def measured(stage: StageFiles) -> dict[str, list[Line]]:
    """Each eval's measurements with rewards, in order of steps, the last one at each step."""
    found: dict[str, dict[int, Line]] = {}
    for line in stage.evals:
        if line["metric"] == "reward":
            found.setdefault(line["eval"], {})[line["step"]] = line
    return {name: list(lines.values()) for name, lines in found.items()}


def cheating(lines: list[Line], saved: Iterable[int] | None = None) -> str | None:
    """The warning where the reward model's score rises while the judge's reward falls, else None.

    Compares the judge's best measurement with the last one; each change must exceed twice its standard error
    (of a difference: the root of the sum of both squares). Reward models are over-optimised in just this way (Gao, Schulman
    and Hilton, arXiv:2210.10760).

    Args:
        lines: one eval's measurements in order of steps; those without reward, score and standard errors are ignored.
        saved: steps with a checkpoint; None: unknown.
    """
    found = finite(lines, *JUDGED)
    if len(found) < 2:
        return None
    best, last = max(found, key=lambda line: line["reward"]), found[-1]
    fall, rise = best["reward"] - last["reward"], last["score"] - best["score"]
    fall_error = math.hypot(best["reward_stderr"], last["reward_stderr"])
    rise_error = math.hypot(best["score_stderr"], last["score_stderr"])
    if not (fall > 2 * fall_error and rise > 2 * rise_error):
        return None
    return (
        f"From step {best['step']:,} to step {last['step']:,} the reward model's score rises from {_decimals(best['score'])} to "
        f"{_decimals(last['score'])} (standard error of the difference {_decimals(rise_error)}), while the judge's reward falls from "
        f"{percent(best['reward'])} to {percent(last['reward'])} ({100 * fall_error:.1f} points): the policy is "
        f"over-optimised for the reward model. {_advice(best['step'], saved)}"
    )


def _decimals(value: float) -> str:
    return signed(f"{value:.2f}")


def _advice(step: int, saved: Iterable[int] | None) -> str:
    if step == 0:
        return "The model that entered the stage is the better one: hold the policy closer to it, or judge with a better reward model."
    if saved is None or step in saved:
        return f"The checkpoint of step {step:,} is the better one."
    return (
        f"The model of step {step:,} was the better one, and its checkpoint is no longer there: train again for "
        f"{step:,} steps, or hold the policy closer to the model that it started from."
    )


def compared(stage: StageFiles, name: str, limit: int = 6) -> list[Compared]:
    """The first held-out prompts answered both before the stage and later, with both answers."""
    lines = [line for line in stage.samples if line["kind"] == "heldout" and line.get("eval") == name]
    before = {line["prompt"]: line for line in lines if line["when"] == "before"}
    later = [line for line in lines if line["when"] != "before"]
    last = {line["prompt"]: line for line in later if step_order(line) == step_order(later[-1])}
    both = [prompt for prompt in before if prompt in last][:limit]
    return [Compared(prompt, [_said(before[prompt]), _said(last[prompt])]) for prompt in both]


def _said(line: Line) -> Said:
    when = "before" if line["when"] == "before" else f"{line['when']}, step {line['step']:,}"
    return Said(when, line["answer"], line.get("score"), line.get("reward"))
